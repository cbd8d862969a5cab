# ruff: noqa: E402  the benchmarks are not a package: their folder is put on sys.path first
"""benchmarks/gpu.py: the budget is kept, what did not fit is named, failures stop nothing, nothing outlives a stage.

Its stages run end to end on the null GPU: tests/nullgpu/test_bench.py.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu

ABOUT = {"hardware": "a GPU", "driver": "1", "versions": {"torch": "2"}, "commit": "c", "command": "x", "left out": "y"}


def stage(name: str, code: str, seconds: int = 60, least: int = 0) -> gpu.Stage:
    return gpu.Stage(name, "does it", ("-c", code), seconds, least)


@pytest.fixture(autouse=True)
def begins_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BEGIN", time.monotonic())


def outcomes(out: Path) -> dict[str, tuple[str, str]]:
    stages = json.loads((out / "gpu.json").read_text())["stages"]
    return {row["stage"]: (row["outcome"], row["said"]) for row in stages}


def test_every_stage_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = tmp_path / "gpu.json"
    plan = [
        stage("fine", "print('as expected')"),
        stage("wrong", "import sys; print('a page about it'); sys.exit('off by 3')"),
        stage("reads", f"import json; print(len(json.load(open({str(summary)!r}))['stages']))"),
        stage("large", "", least=10**6),
    ]
    assert gpu.run(plan, tmp_path, 1000, ABOUT) == 1
    found = outcomes(tmp_path)
    assert found["fine"] == ("ok", "as expected")
    assert found["wrong"] == ("failed", "off by 3")
    assert found["reads"] == ("ok", "2")  # the summary is written after each stage
    assert found["large"][0] == "skipped" and "it needs 1000000" in found["large"][1]
    printed = capsys.readouterr().out
    assert "a page about it" in printed and printed.endswith((tmp_path / "gpu.md").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "gpu-logs"}


def test_what_fits_is_no_failure(tmp_path: Path) -> None:
    assert gpu.run([stage("fine", ""), stage("large", "", least=10**6)], tmp_path, 1000, ABOUT) == 0


@pytest.mark.parametrize(("budget", "estimate", "outcome"), [(2, 60, "cut short"), (1000, 1, "failed")])
def test_a_stage_is_stopped_with_all_that_it_started(tmp_path: Path, budget: int, estimate: int, outcome: str) -> None:
    child = f"import time; time.sleep(5); open({str(tmp_path / 'late')!r}, 'w')"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    gpu.run([stage("long", code, estimate)], tmp_path, budget, ABOUT)
    assert time.monotonic() - begin < 5
    assert outcomes(tmp_path)["long"][0] == outcome and outcomes(tmp_path)["long"][1].endswith("begun")
    time.sleep(max(0, begin + 6 - time.monotonic()))
    assert not (tmp_path / "late").exists()


def test_the_plan_needs_no_gpu_and_keeps_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "ijepa/src/models").mkdir(parents=True)
    words = ("--plan", "--checkout", tmp_path / "ijepa", "--out", tmp_path / "out")
    command = [sys.executable, ROOT / "benchmarks/gpu.py", *words]
    text = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    order = [
        text.index(f"\n{name}" if i else name)
        for i, name in enumerate(("tests", "kernels", "step", "blocks", "levers"))
    ]
    assert order == sorted(order)
    for line in text.splitlines():
        assert "python benchmarks/" not in line or str(tmp_path / "out") in line
    assert "reference=CHECKOUT --reference-sdpa --reference-compile" in text and not (tmp_path / "out").exists()


def test_the_estimates_of_what_matters_most_fit_the_budget() -> None:
    plan = gpu.stages(argparse.Namespace(out=Path("out"), wheels=Path("none"), checkout=Path("ijepa")))
    important = [s for s in plan if s.name in ("tests", "kernels, vit_huge_14", "step, H/14", "blocks, vit_huge_14")]
    assert len(important) == 4 and sum(s.seconds for s in important) < 600


@pytest.mark.slow
def test_the_files_with_gpu_tests_are_those_of_the_plan() -> None:
    """Except the loader's, which need DALI and Pillow."""
    choice = ["-m", "gpu", "--ignore=tests/data"]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", *choice, "--collect-only", "tests"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | {"PYTEST_ADDOPTS": ""})
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {*gpu.tests_on_a_gpu()}, done.stdout + done.stderr
