"""How fast the engine trains here, against what, how close to the limit, and what each of its levers is worth.

    python benchmarks/throughput.py --config engine/configs/in1k_vith14_ep300_ijepa.yaml
    python benchmarks/throughput.py --config X data.batch_size=8 meta.use_bfloat16=false --device cpu --without all \\
        --against reference=PATH_TO_A_CHECKOUT_OF_facebookresearch/ijepa
    torchrun --nproc_per_node 8 benchmarks/throughput.py --config X --mode data --mode train data.root_path=/data/photos

Modes: `data`, the loader alone; `model`, the training step on synthetic images; `train`, both together. The step is
engine/train.py's own. Before anything is timed, the fp32 losses of three steps must agree to 1e-5 between the config
as it is, the same with every lever off, and the published code. Contenders take turns on the same images and masks.

A step's work is that of its matrix products, 2 per multiply-add, for the tokens that its masks really kept
(jepa/budget.py: a block of width D and MLP width F on n tokens is n (8 D^2 + 4 D F) + 4 n^2 D; a backward is twice its
forward). MFU is work / time / the rate of a large matrix product in the same dtype, measured in the same run, and / the
data sheet's where it is known; work that no loss reads counts for nobody. A recompilation after the warm-up fails the
run.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("kernels", "engine")]

import torch
import torch.distributed as dist
import torch.nn.functional as F
from levers import LEVERS, Lever, switchable, without
from machine import ROOT, Clock, datasheet_flops, matmul_flops, peak_bytes, provenance
from published import Published, as_floats
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from jepa import distributed, zero
from jepa.budget import Kept, flops_per_image
from jepa.config import Config, ConfigError, load_config, parse_config
from jepa.data import Batch
from jepa.masks import sample_masks
from jepa.replay import masks_of
from jepa.tokens import target_rows
from train import open_loader, start_model, take_step

MODES = ("data", "model", "train")
TOLERANCE = 1e-5  # of fp32 losses, relative
NUMBERS = (1e-4, 0.04, 0.996)  # lr, weight decay and momentum of every step
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
Batches = Iterator[tuple[int, int, Batch]]


class BenchmarkError(RuntimeError):
    """A run whose figures would mean nothing."""


class Synthetic:
    """Smooth random images, the same ones for every contender: micro-batch k of step s is always the same."""

    def __init__(self, config: Config, device: torch.device, accumulation: int, number: int = 4) -> None:
        S, B = config.data.crop_size, config.data.batch_size
        generator = torch.Generator().manual_seed(config.engine.seed)
        self.accumulation, self.pool = accumulation, []
        for _ in range(number):
            coarse = torch.rand(B, 3, max(2, S // 16), max(2, S // 16), generator=generator)
            smooth = F.interpolate(coarse, [S, S], mode="bicubic").clamp(0, 1)
            self.pool.append((255 * smooth).byte().permute(0, 2, 3, 1).contiguous().to(device))

    def images(self, step: int, micro: int) -> torch.Tensor:
        return self.pool[(step * self.accumulation + micro) % len(self.pool)]

    def batches(self, step: int) -> Batches:
        for micro in range(self.accumulation):
            yield step, micro, Batch(self.images(step, micro), [])


@dataclass
class Times:
    """Of the timed steps of one contender: seconds, the tokens kept, seconds by part; and its peak memory."""

    peak: int = 0
    seconds: list[float] = field(default_factory=list)
    tokens: list[Kept] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    waited: float = 0.0


class Engine:
    """A contender: the engine as engine/train.py runs it, under a config and without some levers."""

    def __init__(self, name: str, config: Config, ranks: distributed.Ranks, levers: list[Lever]) -> None:
        self.name, self.ranks, self.clock, self.times = name, ranks, Clock(ranks.device), Times()
        self.config = without(config, levers)
        self.contexts = [lever.without for lever in levers if lever.without]
        self.engine, self.teacher = start_model(self.config, ranks.device)
        self.numbers = torch.tensor(NUMBERS, dtype=torch.float64, device=zero.pacemaker(self.engine, ranks.device))

    def run(self, step: int, batches: Batches) -> tuple[Any, Any, float]:
        """Marks before and after the step, and its loss if anyone asks: `float` of the third waits for it."""
        with contextlib.ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context(self.ranks.device))
            start = self.clock.mark()
            zero.schedule(self.engine, self.numbers)
            done = take_step(self.config, self.ranks, self.engine, self.teacher, batches, step)
            return start, self.clock.mark(), done.losses[-1].total.detach()

    @contextlib.contextmanager
    def timing_parts(self) -> Iterator[None]:
        """Times the end of a step, and its optimizer's share, for as long as this is open."""
        spans: dict[str, list[tuple[Any, Any]]] = {"optimizer and average": [], "whole end of step": []}
        wrapped = [(self.engine.basic_optimizer, "optimizer and average"), (self.engine, "whole end of step")]

        def timed(call: Callable[..., Any], into: list[tuple[Any, Any]]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                start = self.clock.mark()
                result = call(*args, **kwargs)
                into.append((start, self.clock.mark()))
                return result

            return run

        for owner, part in wrapped:
            owner.step = timed(owner.step, spans[part])
        steps = len(self.times.seconds)
        yield
        for owner, part in wrapped:
            del owner.step
            total = sum(self.clock.seconds(*span) for span in spans[part])
            self.times.parts[part] = [total / max(1, len(self.times.seconds) - steps)]

    def close(self) -> None:
        self.engine.destroy()
        del self.engine, self.teacher


class Reference:
    """A contender: the published code, on the same images and masks."""

    def __init__(
        self, name: str, path: Path, config: Config, ranks: distributed.Ranks, sdpa: bool, compiled: bool
    ) -> None:
        self.name, self.config, self.ranks, self.times = name, config, ranks, Times()
        self.clock = Clock(ranks.device)
        self.code = Published(path, config, ranks.device, sdpa, compiled)

    def run(self, step: int, batches: Batches) -> tuple[Any, Any, float]:
        _, micro, batch = next(batches)
        device, masks = self.ranks.device, masks_of(self.config, self.ranks, step, micro)
        context, target = ([*blocks.to(device)] for blocks in (masks.context, masks.target))
        pixels = as_floats(batch.images, self.config)
        start = self.clock.mark()
        loss, middle = self.code.step(pixels, context, target, NUMBERS, self.clock)
        end = self.clock.mark()
        self.times.parts.setdefault("optimizer and average", []).append(self.clock.seconds(middle, end))
        return start, end, loss

    def timing_parts(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        del self.code


Contender = Engine | Reference


def fp32(config: Config) -> Config:
    attention = "sdpa" if config.engine.attention == "flash_attn" else config.engine.attention  # it has no fp32
    changes = ["meta.use_bfloat16=false", "engine.precision=null", f"engine.attention={attention}"]
    return parse_config(config.model_dump(), changes)


def losses(make: Callable[[], Contender], images: Synthetic, steps: int = 3) -> list[float]:
    """The mean over the ranks of each step's loss."""
    contender = make()
    mine = [float(contender.run(step, images.batches(step))[2]) for step in range(steps)]
    contender.close()
    gc.collect()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return [statistics.mean(of_step) for of_step in zip(*every, strict=True)]


def check(makers: dict[str, Callable[[Config], Contender]], config: Config, images: Synthetic) -> dict[str, float]:
    """The largest relative difference of each contender's fp32 losses to the first's. Raises BenchmarkError."""
    found = {name: losses(lambda make=make: make(fp32(config)), images) for name, make in makers.items()}
    first = next(iter(found.values()))
    errors = {name: max(abs(a - b) / abs(b) for a, b in zip(run, first, strict=True)) for name, run in found.items()}
    if wrong := {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCE}:
        raise BenchmarkError(f"fp32 losses of {len(first)} steps differ by more than {TOLERANCE}: {wrong}; not timed")
    return errors


def kept(config: Config, ranks: distributed.Ranks, step: int) -> Kept:
    """Patches of an image in a context, in a target and in the rows that the targets need, in a step of this rank."""
    found = []
    for micro in range(config.batch(ranks.world_size).accumulation):
        masks = masks_of(config, ranks, step, micro)
        contexts = config.mask.num_enc_masks * config.data.batch_size
        rows = target_rows(masks.target, config.grid**2)[2]
        found.append((masks.context.numel() / contexts, masks.target.shape[-1], rows))
    return Kept(*(statistics.mean(column) for column in zip(*found, strict=True)))


def measure(contenders: list[Contender], images: Synthetic, first: int, steps: int, block: int, bar: tqdm) -> None:
    """Times `steps` steps of each, in turns of `block`, every contender on the same steps."""
    for round_ in range(0, steps, block):
        turn = contenders if round_ // block % 2 == 0 else contenders[::-1]
        for contender in turn:
            contender.clock.drain()
            marks = []
            steps_now = range(first + round_, first + min(steps, round_ + block))
            for step in steps_now:
                marks.append(contender.run(step, images.batches(step))[:2])
                bar.update()
            contender.times.seconds += [contender.clock.seconds(*span) for span in marks]
            contender.times.tokens += [kept(contender.config, contender.ranks, step) for step in steps_now]


def start(make: Callable[[], Contender], images: Synthetic, warmup: int, device: torch.device) -> Contender:
    """Makes a contender and warms it up; the peak memory is that of these steps."""

    def begin() -> Contender:
        contender = make()
        for step in range(2):
            contender.run(step, images.batches(step))
        return contender

    contender, peak = peak_bytes(begin, device)
    for step in range(2, warmup):
        contender.run(step, images.batches(step))
    contender.times.peak = peak
    contender.times.parts.clear()
    return contender


def host_waits(contender: Contender, images: Synthetic, first: int, steps: int = 5) -> dict[str, float] | None:
    """Calls in a step that make the host wait for the GPU, by name, as the profiler sees them; None on a CPU."""
    if contender.ranks.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, warnings.catch_warnings():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for step in range(first, first + steps):
            contender.run(step, images.batches(step))
        torch.cuda.set_sync_debug_mode("default")
        # The profiler's own synchronisation at its end is not the step's: it is counted once and taken off.
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.name in WAITS]
    found = {name: names.count(name) / steps for name in WAITS if name in names}
    if "cudaDeviceSynchronize" in found:
        found["cudaDeviceSynchronize"] -= 1 / steps
    return {name: count for name, count in found.items() if count > 0}


def recompilations() -> int:
    return counters["stats"]["unique_graphs"]


def figures(contender: Contender, rates: dict[str, float | None]) -> dict[str, Any]:
    """One row. Images/s are those of the mean step; MFU is all the work over all the time."""
    config, times, ranks = contender.config, contender.times, contender.ranks
    micro, accumulation, _ = config.batch(ranks.world_size)
    images = micro * accumulation
    work = [images * flops_per_image(config, tokens).total for tokens in times.tokens]
    seconds = statistics.mean(times.seconds)
    ordered = sorted(times.seconds)
    row = {
        "contender": contender.name,
        "images_per_second": images / seconds,
        "step_ms": 1e3 * seconds,
        "p50_ms": 1e3 * statistics.median(ordered),
        "p95_ms": 1e3 * ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
        "gflop_per_image": statistics.mean(work) / images / 1e9,
        "context_tokens": statistics.mean(tokens.context for tokens in times.tokens),
        "target_tokens": statistics.mean(tokens.target for tokens in times.tokens),
        "peak_bytes": times.peak,
        "data_wait_ms": 1e3 * times.waited / len(ordered),
        "parts_ms": {name: 1e3 * statistics.median(values) for name, values in times.parts.items()},
        "seconds": times.seconds,
    }
    for name, rate in rates.items():
        row[name] = None if rate is None else sum(work) / sum(times.seconds) / rate
    return row


def paired(contender: Contender, base: Contender) -> float:
    """How much longer a step takes than base's, the median over steps of the same images and masks."""
    pairs = zip(contender.times.seconds, base.times.seconds, strict=False)
    return statistics.median(a / b for a, b in pairs)


def data_rate(config: Config, ranks: distributed.Ranks, steps: int) -> float:
    """Images/s of the loader of this rank with nothing else running, after a step of warm-up."""
    batches = open_loader(config, ranks).batches(0, steps + 1)
    micro, accumulation, _ = config.batch(ranks.world_size)
    for _ in range(accumulation):
        next(batches)
    begin = time.perf_counter()
    for _ in range(steps * accumulation):
        next(batches)
    return micro * accumulation * steps / (time.perf_counter() - begin)


def train_steps(contender: Engine, steps: int, warmup: int, ahead: bool, bar: tqdm) -> None:
    """Times whole steps, images from files. `ahead`: as the loader makes them, else one by one when asked for."""
    loader = open_loader(contender.config, contender.ranks)

    def one_by_one() -> Batches:
        for step, micro in itertools.product(range(warmup + steps), range(loader.accumulation)):
            begin = time.perf_counter()
            batch = loader.batch(step, micro)
            loader.wait_seconds += time.perf_counter() - begin
            yield step, micro, batch

    batches = loader.batches(0, warmup + steps) if ahead else one_by_one()
    for step in range(warmup):
        contender.run(step, batches)
    contender.clock.drain()
    waited, marks = loader.wait_seconds, [contender.clock.mark()]
    for step in range(warmup, warmup + steps):
        marks.append(contender.run(step, batches)[1])
        bar.update()
    contender.times.seconds = [contender.clock.seconds(a, b) for a, b in itertools.pairwise(marks)]
    contender.times.tokens = [kept(contender.config, contender.ranks, s) for s in range(warmup, warmup + steps)]
    contender.times.waited = loader.wait_seconds - waited


def sampler_ms(config: Config, steps: int = 50) -> float:
    spec, batch = config.mask_spec, config.data.batch_size
    begin = time.perf_counter()
    for step in range(steps):
        sample_masks(spec, seed=0, step=step, first=0, batch=batch)
    return 1e3 * (time.perf_counter() - begin) / steps


def run_model(args: argparse.Namespace, config: Config, ranks: distributed.Ranks, say: Callable[[str], None]) -> dict:
    device, dtype = ranks.device, torch.bfloat16 if config.precision == "bf16" else torch.float32
    images = Synthetic(config, device, config.batch(ranks.world_size).accumulation)
    levers = switchable(config, "model", device.type)
    wanted = [*levers] if "all" in args.without else [name for name in args.without if LEVERS[name].mode == "model"]
    if absent := [name for name in wanted if name not in levers]:
        raise ConfigError([f"--without {name}: this config does not have it on" for name in absent])

    makers: dict[str, Callable[[Config], Contender]] = {"engine": lambda c: Engine("engine", c, ranks, [])}
    plain = [*levers.values()]
    checked = makers | {"every lever off": lambda c: Engine("every lever off", c, ranks, plain)}
    for name, (sdpa, compiled) in args.references.items():
        makers[name] = lambda c, n=name, s=sdpa, t=compiled: Reference(n, args.reference, c, ranks, s, t)
        checked[name] = makers[name]
    if args.references and config.batch(ranks.world_size).accumulation > 1:
        raise ConfigError(["engine.gradient_accumulation_steps: the published code accumulates nothing: give 1"])
    errors = check(checked, config, images)
    say("fp32 losses of 3 steps against the engine's: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))

    rate = [matmul_flops(device, dtype)]
    contenders = [start(lambda m=make: m(config), images, args.warmup, device) for make in makers.values()]
    base = contenders[0]
    assert isinstance(base, Engine)
    compiled_before = recompilations()
    with tqdm(total=args.steps * (len(contenders) + 2 * len(wanted)), unit="step", disable=args.quiet) as bar:
        measure(contenders, images, args.warmup, args.steps, args.block, bar)
        rate.append(matmul_flops(device, dtype))
        speed = {name: paired(c, base) for name, c in zip(makers, contenders, strict=True)}
        recompiled = recompilations() - compiled_before
        waits = host_waits(base, images, args.warmup)
        rates = {"of_measured": statistics.mean(rate), "of_datasheet": datasheet_flops(device, dtype)}
        rows = []
        for contender in contenders:
            rows.append(figures(contender, rates))
        for contender in contenders[1:]:
            contender.close()
        base.times.seconds, base.times.tokens = [], []
        with base.timing_parts():
            measure([base], images, args.warmup, min(args.steps, 5), args.block, bar)
        rows[0]["parts_ms"] = {name: 1e3 * values[0] for name, values in base.times.parts.items()}
        worth = {}
        for name in wanted:
            base.times.seconds, base.times.tokens = [], []
            other = start(lambda n=name: Engine(n, config, ranks, [levers[n]]), images, args.warmup, device)
            measure([base, other], images, args.warmup, args.steps, args.block, bar)
            worth[name] = {"times_longer_without": paired(other, base), "what": levers[name].what}
            worth[name] |= {"peak_bytes": other.times.peak, "seconds": other.times.seconds}
            other.close()
    base.close()
    parts = {"mask sampler": sampler_ms(config)}
    limit = statistics.mean(rate) / (rows[0]["gflop_per_image"] * 1e9)
    return {
        "loss_errors": errors, "matmul_flops": statistics.mean(rate), "matmul_samples": rate, "dtype": str(dtype),
        "datasheet_flops": rates["of_datasheet"], "limit_images_per_second": limit, "rows": rows,
        "times_longer": speed, "levers": worth, "recompilations": recompiled, "host_waits": waits, "parts_ms": parts,
    }  # fmt: skip


def run_train(args: argparse.Namespace, config: Config, ranks: distributed.Ranks) -> dict:
    device, dtype = ranks.device, torch.bfloat16 if config.precision == "bf16" else torch.float32
    rates = {"of_measured": matmul_flops(device, dtype), "of_datasheet": datasheet_flops(device, dtype)}
    rows = []
    with tqdm(unit="step", disable=args.quiet) as bar:
        for name in ["train", *("prefetch" for w in args.without if w in ("all", "prefetch"))]:
            contender = Engine(name, config, ranks, [])
            train_steps(contender, args.steps, args.warmup, name == "train", bar)
            rows.append(figures(contender, rates) | {"contender": "train" if name == "train" else "without prefetch"})
            contender.close()
    return {"rows": rows}


def report(result: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    lines = [f"{result['hardware']}; torch {result['versions']['torch']}, commit {result['commit']}"]
    lines += [f"`{result['command']}`, {result['ranks']} rank(s), {result['batch']} images a step and rank"]
    for mode in ("model", "train"):
        if mode not in result:
            continue
        part = result[mode]
        head = ["", "images/s", "step ms", "p50", "p95", "of matmul", "of data sheet", "peak MB", "data wait ms"]
        lines += ["", f"**{mode}**", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in part["rows"]:
            shares = ["" if row[k] is None else f"{row[k]:.1%}" for k in ("of_measured", "of_datasheet")]
            cells = [f"{row['images_per_second']:.2f}", *(f"{row[k]:.1f}" for k in ("step_ms", "p50_ms", "p95_ms"))]
            cells += [
                *shares,
                f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else "",
                f"{row['data_wait_ms']:.2f}",
            ]
            lines.append("| " + " | ".join([row["contender"], *cells]) + " |")
    if "model" in result:
        part = result["model"]
        row = part["rows"][0]
        waits = part["host_waits"]
        lines += [
            "",
            f"matrix product {part['matmul_flops'] / 1e9:.1f} GFLOP/s in {part['dtype']}: at most "
            f"{part['limit_images_per_second']:.2f} images/s at {row['gflop_per_image']:.2f} GFLOP an image "
            f"({row['context_tokens']:.1f} context tokens, {row['target_tokens']:.1f} in a target)",
            f"recompilations after the warm-up: {part['recompilations']}; host waits a step: "
            + ("not applicable on a CPU" if waits is None else str(waits or 0)),
        ]
        for other in part["rows"]:
            lines += [f"{other['contender']}: {name} {ms:.2f} ms" for name, ms in other["parts_ms"].items()]
        lines += [f"{name} {ms:.3f} ms a batch" for name, ms in part["parts_ms"].items()]
        others = {name: x for name, x in part["times_longer"].items() if name != "engine"}
        lines += [f"a step of {name} takes {x:.3f} x the engine's (median over pairs)" for name, x in others.items()]
        if part["levers"]:
            lines += ["", "| without | a step takes | peak MB |", "|---|---|---|"]
            for name, lever in part["levers"].items():
                lines.append(f"| {name} | {lever['times_longer_without']:.3f} x | {lever['peak_bytes'] / 1e6:.0f} |")
    if "data" in result:
        lines += ["", f"loader alone: {result['data']['images_per_second']:.0f} images/s a rank"]
        if "model" in result:
            model, data = result["model"]["rows"][0]["images_per_second"], result["data"]["images_per_second"]
            limit = "the model" if data >= model else "the data"
            lines.append(f"the model takes {model:.1f}: {limit} is the limit ({data / model:.2f} x)")
    return "\n".join(lines)


def picture(part: dict[str, Any], title: str, file: Path) -> None:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [row["contender"] for row in part["rows"]]
    left.barh(names[::-1], [row["images_per_second"] for row in part["rows"]][::-1])
    left.axvline(
        part["limit_images_per_second"], color="black", linestyle="--", label="limit: the matrix product's rate"
    )
    left.set(xlabel="images/s", title=title)
    left.legend(loc="lower right", fontsize=7)
    levers = {name: 100 * (lever["times_longer_without"] - 1) for name, lever in part["levers"].items()}
    right.barh([*levers][::-1], [*levers.values()][::-1])
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="% that a step takes longer without it")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("--mode", action="append", choices=MODES, help="repeatable (default: model)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: engine.device of the config")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, at least 2 (default: %(default)s)")
    parser.add_argument("--block", type=int, help="steps of a turn (default: 10 on a GPU, 1 on a CPU)")
    parser.add_argument("--against", metavar="reference=PATH", help="a checkout of facebookresearch/ijepa")
    parser.add_argument("--reference-sdpa", action="store_true", help="and once more with attention not materialised")
    parser.add_argument("--reference-compile", action="store_true", help="and once more with torch.compile")
    parser.add_argument("--without", action="append", default=[], choices=["all", *LEVERS], help="repeatable")
    parser.add_argument(
        "--out", type=Path, metavar="PREFIX", help="default: benchmarks/results/throughput-DEVICE-CONFIG"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    args.mode = args.mode or ["model"]
    args.references = {}
    if args.against:
        kind, _, path = args.against.partition("=")
        if kind != "reference" or not path:
            parser.error(f"--against {args.against}: wanted reference=PATH")
        args.reference = Path(path).expanduser()
        args.references["published code"] = (False, False)
        if args.reference_sdpa or args.reference_compile:
            added = " + ".join(
                name for name, on in (("SDPA", args.reference_sdpa), ("torch.compile", args.reference_compile)) if on
            )
            args.references[f"published code + {added}"] = (args.reference_sdpa, args.reference_compile)
    if args.warmup < 2 or args.steps < 1:
        parser.error("--warmup must be at least 2 and --steps at least 1")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = [f"engine.device={args.device}"] if args.device else []
    config = load_config(args.config, [*args.overrides, *device])
    ranks = distributed.start(config.engine.device)
    args.quiet = not ranks.is_first
    args.block = args.block or (10 if ranks.device.type == "cuda" else 1)

    def say(message: str) -> None:
        if ranks.is_first:
            print(message, flush=True)

    say(f"{provenance(ranks.device)['hardware']}, {ranks.world_size} rank(s), {config.precision}")
    result = provenance(ranks.device) | {"ranks": ranks.world_size, "batch": config.data.batch_size}
    result["config"] = config.model_dump(mode="json")
    if "model" in args.mode:
        result["model"] = run_model(args, config, ranks, say)
    if "data" in args.mode:
        result["data"] = {"images_per_second": data_rate(config, ranks, args.steps)}
    if "train" in args.mode:
        result["train"] = run_train(args, config, ranks)
    if ranks.is_first:
        name = re.sub("[^a-z0-9]+", "-", f"throughput-{ranks.device.type}-{Path(args.config).stem}".lower())
        out = args.out or ROOT / "benchmarks/results" / name
        out.parent.mkdir(parents=True, exist_ok=True)
        text = report(result)
        print(text)
        Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")
        Path(f"{out}.md").write_text(text + "\n")
        if "model" in result:
            picture(result["model"], f"{Path(args.config).stem}, {result['hardware']}"[:70], Path(f"{out}.png"))
        print(f"written: {out}.json, .md" + (", .png" if "model" in result else ""))
    return result


def main() -> int:
    args = arguments()
    try:
        result = run(args)
    except (ConfigError, BenchmarkError, ValueError) as error:
        print(f"benchmarks/throughput.py, rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if result.get("model", {}).get("recompilations"):
        print("recompiled after the warm-up: give more --warmup, or mark what varies as dynamic", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
