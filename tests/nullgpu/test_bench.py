"""The plan for a GPU (benchmarks/gpu.py), end to end: every stage runs, writes its files, and is accounted for.

    tests/nullgpu/run PYTHON -m pytest tests/nullgpu --confcutdir=tests/nullgpu

No result of the null GPU is right: the tests in the plan fail, and the benchmarks run past their checks (ungated.py).
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("nullgpu", reason="needs the null GPU: start it with tests/nullgpu/run", exc_type=ImportError)

import gpu
import torch
from machine import provenance

CHECKOUT = os.environ.get("IJEPA_CHECKOUT")
ONCE: tuple[str, ...] = ("tests", "kernels, vit_huge_14", "blocks, vit_huge_14", "levers, H/14")
ONCE += ("step, H/14",) if CHECKOUT else ()  # without the published code, the levers' program does no less


def plan(out: Path) -> list[gpu.Stage]:
    """The first of each kind, at tiny sizes."""
    checkout = Path(CHECKOUT) if CHECKOUT else None
    args = argparse.Namespace(out=out, wheels=out / "none", checkout=checkout)
    return [open_gate(gpu.tiny(stage)) for stage in gpu.stages(args) if stage.name in ONCE]


def open_gate(stage: gpu.Stage) -> gpu.Stage:
    program, *words = stage.command
    if stage.name == "tests":  # plain: to print a tensor of the null GPU may take any amount of memory
        return replace(stage, command=(*stage.command, "--assert=plain"))
    return replace(stage, command=("tests/nullgpu/ungated.py", Path(program).name, *words))


def test_the_whole_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # this process's own
        monkeypatch.delenv(name, raising=False)
    about = provenance(torch.device("cuda")) | {"left out": None}
    assert gpu.run(plan(tmp_path), tmp_path, 3600, about) == 1  # the tests failed
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert {stage["stage"]: stage["outcome"] for stage in found} == dict.fromkeys(ONCE, "ok") | {"tests": "failed"}
    assert found[0]["said"].startswith("2 failed")
    for name in ("kernels-nvidia_h200-vit_tiny_16", "blocks-cuda-vit_tiny_16"):
        assert (tmp_path / f"{name}.json").stat().st_size and (tmp_path / f"{name}.md").stat().st_size
    config = "cuda-in1k_vith14_ep300_ijepa"
    others = {"levers": ["without kernels", "with packed"]}
    others |= {"throughput": ["published code", "published code + SDPA + torch.compile"]} if CHECKOUT else {}
    for name, contenders in others.items():
        result = json.loads((tmp_path / f"{name}-{config}.json").read_text())["model"]
        assert [row["contender"] for row in result["rows"]] == ["engine", *contenders]
        assert all(row["recompiled"] == 0 and row["p50_ms"] > 0 for row in result["rows"])
        assert (tmp_path / f"{name}-{config}.png").stat().st_size
    assert (tmp_path / "gpu.md").read_text().count("| ok |") == len(ONCE) - 1
