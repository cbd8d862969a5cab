"""The kernel benchmarks run, at sizes that take seconds; they check their own results before printing a time."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import jepa_kernels

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch):
    def run(script: str, *words: str) -> None:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # compiling takes a minute and tests nothing here
        try:
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        except SystemExit as ended:
            assert not ended.code

    return run


@pytest.mark.skipif((Path(jepa_kernels.__file__).parent / "NO_EXT").exists(), reason="it measures the CPU kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_op_is_right_and_measured(run, tmp_path, dtype):
    words = f"--device cpu --dtype {dtype} --size vit_tiny_16 --batch 2 --seconds 0 --out {tmp_path}"
    run("kernels.py", *words.split())
    rows = json.loads((tmp_path / "kernels-cpu-vit_tiny_16.json").read_text())["rows"]
    ops = runpy.run_path(str(BENCHMARKS / "contenders.py"))["OPS"].keys()
    for name in ("ours", "eager"):
        assert {row["op"] for row in rows if row["contender"] == name} == ops
    for row in rows:
        assert row["ms"] > 0
        assert (row["host ms"] is None) == (row["mode"] != "step" or row["contender"] == "compiled")
    table = (tmp_path / "kernels-cpu-vit_tiny_16.md").read_text()
    assert table.count(f" {'ours':21}") == sum(row["contender"] == "ours" for row in rows)


def test_the_plain_loop_and_the_one_with_kernels_have_equal_losses(run, capsys):
    words = {"steps": 2, "batch": 2, "image": 64, "width": 64, "depth": 1}
    run("plain_ijepa.py", "--device", "cpu", *(f"--{name}={value}" for name, value in words.items()))
    assert "largest relative difference" in capsys.readouterr().out


def test_blocks_are_compared(run, tmp_path):
    run("blocks.py", *f"--device cpu --model vit_tiny_16 --batch 2 --seconds 0 --out {tmp_path}".split())
    result = json.loads((tmp_path / "blocks-cpu-vit_tiny_16.json").read_text())
    for row in result["attention"]:
        assert all(row["times"][by]["both"] > 0 for by in ("sdpa", "math")) and row["flops"] > 0
    assert all(min(row["times"].values()) > 0 for row in result["weight_gradients"])
    assert "| attention | by |" in (tmp_path / "blocks-cpu-vit_tiny_16.md").read_text()
