# ruff: noqa: E402  the benchmarks are not a package: their folder is put on sys.path first
"""benchmarks/throughput.py and scaling.py on a tiny model: figures agree with each other and with torch's counts."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import jepa_kernels
from jepa.config.file import parse_config
from jepa.config.schema import ConfigError
from jepa.data import masks
from jepa.ranks import distributed
from jepa.train import zero
from jepa.train.memory import memory_per_rank
from processes import write_config, write_images
from small import run_ranks, small_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import levers
import machine
import runners
import scaling
import throughput

pytestmark = pytest.mark.slow

WARMUP, STEPS, BATCH = 2, 4, 3
CHECKOUT = os.environ.get("IJEPA_CHECKOUT")  # of facebookresearch/ijepa; if set, its step is a contender too


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    modes = [word for mode in throughput.MODES for word in ("--mode", mode)]
    return run(tmp_path_factory.mktemp("throughput"), "--without", "all", "--with", "all", *modes)


def run(folder: Path, *words: object) -> dict[str, Any]:
    """The program's results for a tiny model."""
    config = write_config(folder / "tiny.yaml", write_images(folder / "images"))
    words += ("--config", config, "--device", "cpu", "--steps", STEPS, "--warmup", WARMUP, "--out", folder / "out")
    words += (f"data.batch_size={BATCH}",)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET"):
        environment.pop(name, None)
    command = [sys.executable, ROOT / "benchmarks/throughput.py", *words]
    done = subprocess.run([str(w) for w in command], env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "out.png").stat().st_size and "recompiled steps of the engine after the warm-up: 0" in done.stdout
    return json.loads((folder / "out.json").read_text())


def test_figures_are_those_of_the_times(result: dict[str, Any]) -> None:
    base, *others = result["model"]["rows"]
    assert base["seconds"] == others[0]["beside"]
    for row in (base, *others, *result["train"]["rows"]):
        seconds = row["seconds"]
        assert len(seconds) == STEPS
        assert row["images_per_second"] * row["p50_ms"] / 1e3 == pytest.approx(BATCH)
        assert row["mean_ms"] == pytest.approx(1e3 * sum(seconds) / len(seconds))
        assert row["p50_ms"] == pytest.approx(1e3 * np.median(seconds))
        assert row["p95_ms"] == pytest.approx(1e3 * statistics.quantiles(seconds, n=20, method="inclusive")[-1])
    work = 1e9 * base["gflop_per_image"] * BATCH
    done = base["of_measured"] * result["model"]["matmul_flops"] * np.array(base["seconds"])
    assert done.min() <= work <= done.max()
    assert base["of_measured"] * result["model"]["matmul_flops"] == pytest.approx(base["flops"])
    assert 0 < base["of_measured"] < 1 and base["recompiled"] == result["train"]["recompilations"] == 0
    assert 0 < base["parts_ms"]["optimizer and average"] < base["parts_ms"]["whole end of step"]
    assert result["data"]["images_per_second"] > 0 and result["train"]["rows"][0]["data_wait_ms"] >= 0


def test_memory_holds_the_state_and_the_activations(result: dict[str, Any]) -> None:
    row = result["model"]["rows"][0]
    memory = memory_per_rank(parse_config(result["config"]), 1)
    state = memory.weights + memory.moments + memory.ema + memory.teacher
    assert state < row["peak_bytes"] < 20 * state  # a tiny model's activations weigh more than its weights


def test_every_lever_is_moved_beside_the_engine(result: dict[str, Any]) -> None:
    off = ("optimizer", "kernels", "sampler", "attention", "skip_unread")
    names = [
        *(f"without {name}" for name in off),
        *(f"with {name}" for name in ("checkpointing", "deterministic", "packed", "token_budget")),
    ]
    model = result["model"]
    assert [row["contender"] for row in model["rows"]] == ["engine", *names]
    for row in model["rows"][1:]:
        pairs = zip(row["seconds"], row["beside"], strict=True)
        assert model["times_longer"][row["contender"]] == pytest.approx(np.median([a / b for a, b in pairs]))
    # (Packed masks change the loss.)
    assert {"every lever off", "with checkpointing", "with deterministic"} == model["loss_errors"].keys()
    assert [row["contender"] for row in result["train"]["rows"]] == ["train", "without prefetch"]


@pytest.mark.skipif(not CHECKOUT, reason="needs IJEPA_CHECKOUT=PATH, a checkout of facebookresearch/ijepa")
def test_the_published_code_has_the_engines_losses(tmp_path: Path) -> None:
    named = [f"meta.{key}=null" for key in ("embed_dim", "depth", "num_heads", "pred_num_heads")]
    against = (
        "--against",
        f"reference={CHECKOUT}",
        "--reference-sdpa",
        "loss.objective=ijepa",
        "meta.pred_emb_dim=24",
        *named,
    )
    model = run(tmp_path, *against)["model"]
    assert [row["contender"] for row in model["rows"]] == ["engine", "published code", "published code + SDPA"]
    assert all(error <= throughput.TOLERANCE for error in model["loss_errors"].values())


def one_is_wrong() -> tuple[throughput.Checked, str]:
    """Results for contenders whose losses are slightly off, and the error for an engine whose own losses are."""
    config = small_config("loss.objective=ijepa")
    ranks = distributed.Ranks(0, 1, torch.device("cpu"), dist.HashStore(), dist.group.WORLD)

    def make(off: float) -> throughput.Make:
        def engine(c: throughput.Config) -> throughput.Engine:
            made = throughput.Engine("engine", c, ranks, [])
            run = made.run

            def a_little_off(*args: Any) -> tuple[Any, Any, Any]:
                start, end, loss = run(*args)
                return start, end, loss * (1 + off)

            made.run = a_little_off
            return made

        return engine

    def fails(c: throughput.Config) -> throughput.Engine:
        raise RuntimeError("no such kernel\nand a page about it")

    others = {"near": make(-1e-6), "with far": make(3e-5), "broken": fails}
    found = throughput.check(make(0), make(1e-6), others, config, ranks)
    with pytest.raises(throughput.BenchmarkError) as raised:
        throughput.check(make(0), make(3e-5), {}, config, ranks)
    return found, str(raised.value)


@pytest.mark.ranks
def test_nothing_is_timed_where_losses_differ() -> None:
    ((found, said),) = run_ranks(1, one_is_wrong)
    assert found.errors["near"] == pytest.approx(1e-6, rel=0.2)
    assert found.failed.keys() == {"with far", "broken"} and "3.0e-05" in found.failed["with far"]
    assert found.failed["broken"] == "RuntimeError: no such kernel"
    assert said.startswith("every lever off: the losses of 3 steps are 3.0e-05")


def one_fails() -> list[dict[str, Any]]:
    """The rows if one contender fails to start."""
    engine = throughput.Engine

    def broken(name: str, *args: Any) -> throughput.Engine:
        if name == "with packed":
            raise RuntimeError("no such kernel\nand a page about it")
        return engine(name, *args)

    throughput.Engine = broken
    ranks = distributed.Ranks(0, 1, torch.device("cpu"), dist.HashStore(), dist.group.WORLD)
    asked = {"without": [], "more": ["packed"], "references": {}, "mode": ["model"], "quiet": True}
    args = argparse.Namespace(**asked, steps=2, warmup=2, block=1)
    kept: list[list[dict[str, Any]]] = []
    keep = lambda part: kept.append(part["rows"])  # noqa: E731
    rows = throughput.run_model(args, small_config(), ranks, lambda message: None, keep)["rows"]
    assert all(part == rows[: len(part)] for part in kept)
    return rows


@pytest.mark.ranks
def test_a_contender_that_fails_costs_the_others_nothing() -> None:
    ((engine, failed),) = run_ranks(1, one_fails)
    assert len(engine["seconds"]) == 2 and engine["images_per_second"] > 0
    assert failed == {"contender": "with packed", "failed": "RuntimeError: no such kernel"}


def test_a_lever_that_would_not_show_is_refused() -> None:
    config = small_config()
    ranks = distributed.Ranks(0, 1, torch.device("cpu"), dist.HashStore(), None)
    on, extras = levers.switchable(config, "model", ranks), levers.addable(config, ranks)
    for given, here, known in ((["prefetch"], on, levers.LEVERS), (["global_cut"], extras, levers.EXTRAS)):
        with pytest.raises(ConfigError, match=given[0]):
            throughput.chosen(given, here, known, ["model"])
    assert throughput.chosen(["prefetch"], on, levers.LEVERS, ["model", "train"]) == {}


def counted_flops(given: dict[str, Any]) -> float:
    """Per image, as torch counts them in the timed steps."""
    config = parse_config(given, ["engine.attention=math"])  # whose products torch sees
    ranks = distributed.Ranks(0, 1, torch.device("cpu"), dist.HashStore(), dist.group.WORLD)
    images = throughput.Synthetic(config, ranks.device, 1)
    model_engine, teacher = runners.start_model(config, ranks.device)
    zero.schedule(model_engine, torch.tensor([1e-4, 0.0, 0.99], dtype=torch.float64))
    with FlopCounterMode(display=False) as counter:
        for step in range(WARMUP, WARMUP + STEPS):
            runners.take_step(config, ranks, model_engine, teacher, images.batches(step), step)
    return counter.get_total_flops() / (STEPS * BATCH)


@pytest.mark.ranks
def test_flops_are_those_that_torch_counts(result: dict[str, Any]) -> None:
    (counted,) = run_ranks(1, counted_flops, result["config"])
    row = result["model"]["rows"][0]
    # Not in the formula: VICReg's and batch norm's products, which are not matrix products of the network.
    assert 1e9 * row["gflop_per_image"] == pytest.approx(counted, rel=0.03)


def test_every_op_but_the_optimizers_has_a_definition() -> None:
    assert {*jepa_kernels.OPS} - levers.definitions().keys() == {"adamw_ema_", "adamw_ema_coefficients_"}


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
    most = 4 * max(a + b, a + c + (a + c))  # before b is freed; and during the concatenation
    assert most <= peak <= most + 4096


@pytest.mark.parametrize("frees", [0, 4, 12])
def test_peak_is_that_of_a_count_kept_beside(frees: int) -> None:
    """Allocations, frees, views and in-place ops in random order, and frees of older tensors, which do not count."""
    older = [torch.empty(80_000) for _ in range(3)]
    older += machine.peak_bytes(lambda: [torch.empty(90_000) for _ in range(3)], torch.device("cpu"))[0]
    actions = ["allocate"] * 12 + ["free"] * frees + ["view", "in place", "free older"] * 4
    order = [actions[i] for i in torch.randperm(len(actions))]
    counted = []

    def work() -> list[torch.Tensor]:
        held: list[torch.Tensor] = []
        for action in order:
            if action == "allocate":
                held.append(torch.empty(int(torch.randint(10_000, 100_000, ()))))
            elif action == "free older":
                older.pop()
            elif held:
                tensor = held.pop(int(torch.randint(len(held), ())))
                if action == "view":
                    held.append(tensor[5_000:].view(-1))  # keeps all of the storage
                elif action == "in place":
                    held.append(tensor.zero_())
                del tensor
            counted.append(sum(tensor.untyped_storage().nbytes() for tensor in held))
        return held

    _, peak = machine.peak_bytes(work, torch.device("cpu"))
    assert max(counted) <= peak <= max(counted) + 4096


def test_peak_counts_autograds_threads_in_order_of_time() -> None:
    """Backwards nested deeply run on threads of autograd's own. What they allocate lies on top of what this thread has
    allocated before and keeps, and below what it allocates afterwards."""
    a, b, c, d = (int(n) for n in torch.randint(10_000, 100_000, (4,)))
    kept, threads = [], set()

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, depth: int) -> torch.Tensor:
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            if ctx.depth:
                with torch.enable_grad():
                    inner = Nested.apply(torch.zeros(1, requires_grad=True), ctx.depth - 1)
                inner.backward()
            else:
                threads.add(threading.get_native_id())
                kept.append(torch.empty(b))
                torch.empty(c)
            return grad, None

    def work() -> list[torch.Tensor]:
        first = torch.empty(a)
        Nested.apply(torch.zeros(1, requires_grad=True), 100).backward()
        return [first, torch.empty(d)]

    _, peak = machine.peak_bytes(work, torch.device("cpu"))
    assert threads and threading.get_native_id() not in threads
    most = 4 * (a + b + max(c, d))
    assert most <= peak <= most + 4096


class Squaring:
    """A contender whose step n squares a matrix of side `sides[n]`, compiled: a new side compiles again."""

    def __init__(self, name: str, config: throughput.Config, sides: list[int]) -> None:
        self.name, self.config, self.sides, self.times = name, config, sides, runners.Times()
        self.ranks = distributed.Ranks(0, 1, torch.device("cpu"), dist.HashStore(), None)
        self.clock = machine.Clock(self.ranks.device)
        self.square = torch.compile(lambda x: x @ x, backend="eager", dynamic=False)

    def run(self, step: int, _: Any) -> tuple[float, float, Any]:
        start = self.clock.mark()
        result = self.square(torch.ones(2 * [self.sides[step]]))
        return start, self.clock.mark(), result


def test_steps_that_recompile_enter_no_figure() -> None:
    torch._dynamo.reset()
    config, first, images = small_config(), 2, SimpleNamespace(batches=lambda step: None)
    contenders: Any = [Squaring("a", config, [3] * 8), Squaring("b", config, [5, 5, 5, 6, 5, 7, 5, 5])]
    ours, theirs = contenders
    for contender in contenders:
        for step in range(first):
            contender.run(step, None)
    bar = SimpleNamespace(update=lambda: None)
    throughput.measure(contenders, images, first, 6, 4, bar)
    assert [step.graphs for step in ours.times.steps] == [0] * 6
    assert [step.graphs for step in theirs.times.steps] == [0, 1, 0, 1, 0, 0]
    clean = [step.seconds for step in theirs.times.steps if not step.graphs]
    row = throughput.figures(theirs, theirs.times.steps, {})
    assert row["recompiled"] == 2 and row["graphs"] == [0, 1, 0, 1, 0, 0] and len(row["seconds"]) == 6
    assert row["mean_ms"] == pytest.approx(1e3 * np.mean(clean)) and row["p50_ms"] == pytest.approx(
        1e3 * np.median(clean)
    )
    assert row["p95_ms"] <= 1e3 * max(clean)
    assert row["images_per_second"] == pytest.approx(config.data.batch_size / np.median(clean))
    pairs = [(a.seconds, b.seconds) for a, b in zip(theirs.times.steps, ours.times.steps, strict=True) if not a.graphs]
    ratio = throughput.paired("b", theirs.times.steps, ours.times.steps)
    assert len(pairs) == 4 and ratio == pytest.approx(np.median([a / b for a, b in pairs]))
    dirty = [step for step in theirs.times.steps if step.graphs]
    with pytest.raises(throughput.BenchmarkError, match="b: compiled a graph in each of 2 timed steps"):
        throughput.figures(theirs, dirty, {})
    with pytest.raises(throughput.BenchmarkError, match="no pair of steps"):
        throughput.paired("b", dirty, ours.times.steps[:2])


@pytest.mark.ranks
def test_bytes_sent_are_those_of_the_model() -> None:
    rows = scaling.check(stages=(1,), worlds=(2,))
    assert {row["op"] for row in rows} == {"all_gather", "all_reduce"} and not scaling.disagreeing(rows), rows
