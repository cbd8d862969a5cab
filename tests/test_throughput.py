# ruff: noqa: E402  the benchmarks are no package: their folder is put on sys.path first
"""benchmarks/throughput.py and scaling.py on a tiny model: figures agree with one another and with torch's counts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import jepa_kernels
from jepa import distributed, masks, zero
from jepa.budget import memory_per_rank
from jepa.config import parse_config
from small import MAPPING, run_ranks

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import levers
import machine
import scaling
import throughput

WARMUP, STEPS, BATCH = 2, 4, 3


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("throughput")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(MAPPING))
    words = ["--config", folder / "tiny.yaml", "--device", "cpu", "--steps", STEPS, "--warmup", WARMUP]
    words += ["--without", "all", "--out", folder / "out", f"data.batch_size={BATCH}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET"):
        environment.pop(name, None)
    command = [sys.executable, ROOT / "benchmarks/throughput.py", *words]
    done = subprocess.run([str(w) for w in command], env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "out.png").stat().st_size and "recompilations after the warm-up: 0" in done.stdout
    return json.loads((folder / "out.json").read_text())


def test_figures_are_those_of_the_times(result: dict[str, Any]) -> None:
    (row,) = result["model"]["rows"]
    seconds = row["seconds"]
    assert len(seconds) == STEPS
    assert row["images_per_second"] * row["step_ms"] / 1e3 == pytest.approx(BATCH)
    assert row["step_ms"] == pytest.approx(1e3 * sum(seconds) / STEPS)
    assert 1e3 * min(seconds) <= row["p50_ms"] <= row["p95_ms"] <= 1e3 * max(seconds) * (1 + 1e-9)
    work = 1e9 * row["gflop_per_image"] * BATCH * STEPS
    assert row["of_measured"] * sum(seconds) * result["model"]["matmul_flops"] == pytest.approx(work)
    assert 0 < row["of_measured"] < 1
    assert 0 < row["parts_ms"]["optimizer and average"] < row["parts_ms"]["whole end of step"]


def test_memory_holds_the_state_and_the_activations(result: dict[str, Any]) -> None:
    (row,) = result["model"]["rows"]
    memory = memory_per_rank(parse_config(result["config"]), 1)
    state = memory.weights + memory.moments + memory.ema + memory.teacher
    assert state < row["peak_bytes"] < 20 * state  # a tiny model's activations weigh more than its weights


def test_every_lever_is_switched_and_changes_no_loss(result: dict[str, Any]) -> None:
    expected = throughput.switchable(parse_config(result["config"]), "model", "cpu")
    assert (
        {"optimizer", "kernels", "sampler", "attention", "dead_compute"}
        <= result["model"]["levers"].keys()
        == expected.keys()
    )
    assert result["model"]["loss_errors"]["every lever off"] <= throughput.TOLERANCE
    for lever in result["model"]["levers"].values():
        assert len(lever["seconds"]) == STEPS and lever["times_longer_without"] > 0


def counted_flops(given: dict[str, Any]) -> float:
    """Per image, as torch counts them in the timed steps."""
    config = parse_config(given)
    ranks = distributed.Ranks(0, 1, torch.device("cpu"), dist.HashStore(), dist.group.WORLD)
    images = throughput.Synthetic(config, ranks.device, 1)
    engine, teacher = throughput.start_model(config, ranks.device)
    zero.schedule(engine, torch.tensor([1e-4, 0.0, 0.99], dtype=torch.float64))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for step in range(WARMUP, WARMUP + STEPS):
            throughput.take_step(config, ranks, engine, teacher, images.batches(step), step)
    return counter.get_total_flops() / (STEPS * BATCH)


def test_flops_are_those_that_torch_counts(result: dict[str, Any]) -> None:
    (counted,) = run_ranks(1, counted_flops, result["config"])
    (row,) = result["model"]["rows"]
    # Not counted by the formula: the products of VICReg and batch norm's are no matrix products of the network.
    assert 1e9 * row["gflop_per_image"] == pytest.approx(counted, rel=0.03)


def test_switching_off_the_kernels_calls_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = sys.modules["jepa_kernels.patchify"]
    reference = module.patchify_ref
    monkeypatch.setattr(module, "patchify_ref", lambda *args: calls.append(1) or reference(*args))
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    options = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3), "patch_size": 4}
    before = jepa_kernels.patchify(images, None, **options)
    with levers.references(torch.device("cpu")):
        plain = jepa_kernels.patchify(images, None, **options)
    assert len(calls) == 1
    after = jepa_kernels.patchify(images, None, **options)
    assert len(calls) == 1 and torch.equal(before, after)
    torch.testing.assert_close(before, plain)


def test_switching_off_the_sampler_calls_its_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    reference = masks._sample_ref
    monkeypatch.setattr(masks, "_sample_ref", lambda *args: calls.append(1) or reference(*args))
    spec = masks.MaskSpec(8, 8, min_keep=4)
    drawn = masks.sample_masks(spec, seed=1, step=2, first=0, batch=3)
    with levers.specification(torch.device("cpu")):
        specified = masks.sample_masks(spec, seed=1, step=2, first=0, batch=3)
    masks.sample_masks(spec, seed=1, step=2, first=0, batch=3)
    assert len(calls) == 1 and all(map(torch.equal, drawn[:2], specified[:2]))


def test_peak_counts_what_lies_there_at_once() -> None:
    a, b, c = (int(n) for n in torch.randint(10_000, 100_000, (3,)))
    before = torch.ones(50_000)

    def work() -> torch.Tensor:
        kept, passing = torch.ones(a), torch.ones(b)
        del passing
        return torch.cat([kept, torch.ones(c)])

    result, peak = machine.peak_bytes(work, before.device)
    assert len(result) == a + c
    most = 4 * max(a + b, a + c + (a + c))  # before b is freed; and when the two are joined
    assert most <= peak <= most + 4096


def test_a_recompilation_is_seen() -> None:
    @torch.compile(backend="eager", dynamic=False)
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice(torch.ones(3))
    before = throughput.recompilations()
    twice(torch.ones(3))
    assert throughput.recompilations() == before
    twice(torch.ones(4))
    assert throughput.recompilations() == before + 1


def test_bytes_sent_are_those_of_the_model() -> None:
    rows = scaling.check(stages=(1,), worlds=(2,))
    assert {row["op"] for row in rows} == {"all_gather", "all_reduce"} and not scaling.disagreeing(rows), rows
