"""Training throughput: images/s, MFU, memory, host waits, against the published code, and the effect of each lever.

    python benchmarks/throughput.py --config engine/configs/in1k_vith14_ep300_ijepa.yaml
    python benchmarks/throughput.py --config X data.batch_size=8 meta.use_bfloat16=false --device cpu --without all \\
        --against reference=PATH_TO_A_CHECKOUT_OF_facebookresearch/ijepa
    torchrun --nproc_per_node 8 benchmarks/throughput.py --config X --mode data --mode train data.root_path=/data/photos

Modes: `data`, the loader alone; `model`, the training step on synthetic images; `train`, both together. The step is
the one in engine/train.py. Before anything is timed, the fp32 losses of three steps must agree to 1e-5 between the
config as given, the same with every lever off, each added lever that keeps the loss, and the published code (on a GPU
with at most 32 images, as fp32 needs more memory). In bf16 the engine's error may be at most twice the plain step's.
`--without` turns a lever off, `--with` turns one on. Each other contender then alternates with the engine on the same
images and masks and is freed before the next one is created, so that at most two are in memory.

A step in which a graph was compiled enters no figure: it is counted as `recompiled`. If the engine has one after the
warm-up, the run fails. Images/s is that of the median step (p50); its mean stands beside it. Peak memory is that of the
contender alone: over all timed steps on a GPU, over its creation and first two steps on a CPU. The files are written
after each contender: a run that is stopped leaves those it finished.
"""

import argparse
import gc
import itertools
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("kernels", "engine")]

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
from levers import EXTRAS, LEVERS, Lever, addable, switchable
from machine import ROOT, datasheet_flops, matmul_flops, provenance
from runners import (
    Batches,
    Contender,
    Engine,
    Reference,
    Step,
    Synthetic,
    counting,
    graph_count,
    host_waits,
    measure,
    record,
    start,
)
from throughput_report import picture, report
from tqdm import tqdm

from jepa.config.file import load_config, parse_config
from jepa.config.schema import Config, ConfigError
from jepa.config.words import command_line
from jepa.data.masks import sample_masks
from jepa.ranks import distributed
from jepa.ranks.program import Parser, program, run_program
from jepa.train.budget import flops_per_image
from train import open_loader

MODES = ("data", "model", "train")
TOLERANCE = 1e-5  # relative, on fp32 losses
ROUNDING = 2**-9  # allowance for rounding in bf16
AT_ONCE = 32  # images per micro-batch when comparing losses in fp32 on a GPU
Make = Callable[[Config], Contender]


class BenchmarkError(RuntimeError):
    """A run whose figures would be meaningless."""


def fp32(config: Config, images: int, accumulation: int) -> Config:
    """The same config in fp32, with `images` per micro-batch."""
    attention = "sdpa" if config.engine.attention == "flash_attn" else config.engine.attention  # no fp32 kernels
    changes = ["meta.use_bfloat16=false", "engine.precision=null", f"engine.attention={attention}"]
    changes += ["engine.target_precision=bf16"]
    changes += [f"data.batch_size={images}", "engine.global_batch_size=null"]
    changes += [f"engine.gradient_accumulation_steps={accumulation}"]
    return parse_config(config.model_dump(), changes)


def losses(make: Make, config: Config, images: Synthetic, steps: int = 3) -> list[float]:
    """The loss of each step, averaged over the ranks."""
    contender = make(config)
    try:
        mine = [float(contender.run(step, images.batches(step))[2]) for step in range(steps)]
    finally:
        contender.close()
    del contender
    free()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return [statistics.mean(of_step) for of_step in zip(*every, strict=True)]


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def apart(losses: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))


class Checked(NamedTuple):
    errors: dict[str, float]
    """Relative difference of each contender's losses from the engine's in fp32."""
    failed: dict[str, str]
    """Contenders that are not timed, and why."""


def check(engine: Make, plain: Make, others: dict[str, Make], config: Config, ranks: distributed.Ranks) -> Checked:
    """Compares losses. Raises BenchmarkError if the engine's differ from those with every lever off. Any other
    contender that is too far off, or fails, is not timed."""
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # for the published conv2d
    try:
        return _check(engine, plain, others, config, ranks)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def _check(engine: Make, plain: Make, others: dict[str, Make], config: Config, ranks: distributed.Ranks) -> Checked:
    few = min(config.data.batch_size, AT_ONCE) if ranks.device.type == "cuda" else config.data.batch_size
    accumulation = config.batch(ranks.world_size).accumulation
    exact = fp32(config, few, accumulation)
    images = Synthetic(exact, ranks.device, accumulation)
    wanted = losses(engine, exact, images)
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}

    def compare(name: str, make: Make, config: Config, allowed: float) -> None:
        error = errors[name] = apart(losses(make, config, images), wanted)
        if not error <= allowed:
            raise BenchmarkError(
                f"{name}: the losses of {len(wanted)} steps are {error:.1e} off the engine's in fp32, "
                f"allowed {allowed:.1e}"
            )

    compare("every lever off", plain, exact, TOLERANCE)
    low, allowed = None, 0.0
    if config.precision == "bf16":
        low = parse_config(
            exact.model_dump(), ["meta.use_bfloat16=true", f"engine.attention={config.engine.attention}"]
        )
        allowed = 2 * apart(losses(plain, low, images), wanted) + ROUNDING
        compare("engine in bf16", engine, low, allowed)
    for name, make in others.items():
        try:
            try:
                compare(name, make, exact, TOLERANCE)
            except ConfigError:  # FlashAttention has no fp32 kernels: compare in bf16 only
                if low is None:
                    raise
            if low is not None and name.startswith("with "):
                compare(f"{name} in bf16", make, low, allowed)
        except Exception as error:
            failed[name] = reason(error)
        finally:
            free()
    return Checked(errors, failed)


def reason(error: Exception) -> str:
    """The error in one line, for the table; all of it goes to stderr."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def figures(contender: Contender, steps: list[Step], rates: dict[str, float | None]) -> dict[str, Any]:
    """One row of the table, from the steps in which nothing was compiled. Images/s is that of the median step; FLOP/s
    is the median of the steps' own, since masks differ. Raises BenchmarkError if every step compiled something."""
    config, times, ranks = contender.config, contender.times, contender.ranks
    micro, accumulation, _ = config.batch(ranks.world_size)
    images = micro * accumulation
    needed = parse_config(config.model_dump(), ["engine.skip_unread=true"])  # work that no loss reads is not counted
    clean = [step for step in steps if not step.graphs]
    if not clean:
        raise BenchmarkError(f"{contender.name}: compiled a graph in each of {len(steps)} timed steps: raise --warmup")
    seconds = [step.seconds for step in clean]
    work = [images * sum(flops_per_image(needed, step.kept).values()) for step in clean]
    p50 = statistics.median(seconds)
    row: dict[str, Any] = {
        "contender": contender.name,
        "images_per_second": images / p50,
        "p50_ms": 1e3 * p50,
        "mean_ms": 1e3 * statistics.mean(seconds),
        "p95_ms": 1e3 * float(np.quantile(seconds, 0.95)),
        "gflop_per_image": statistics.mean(work) / images / 1e9,
        "flops": statistics.median(done / taken for done, taken in zip(work, seconds, strict=True)),
        "context_tokens": statistics.mean(step.kept.context for step in clean),
        "target_tokens": statistics.mean(step.kept.target for step in clean),
        "peak_bytes": times.peak,
        "recompiled": len(steps) - len(clean),
        "data_wait_ms": 1e3 * times.waited / len(steps),
        "parts_ms": {name: 1e3 * value for name, value in times.parts.items()},
        "seconds": [step.seconds for step in steps],
        "graphs": [step.graphs for step in steps],
    }
    for name, rate in rates.items():
        row[name] = None if rate is None else row["flops"] / rate
    return row


def paired(name: str, steps: list[Step], base: list[Step]) -> float:
    """Step time relative to base's: the median over the pairs of steps in which nothing was compiled."""
    ratios = [a.seconds / b.seconds for a, b in zip(steps, base, strict=True) if not (a.graphs or b.graphs)]
    if not ratios:
        raise BenchmarkError(f"{name}: no pair of steps without a recompilation: raise --warmup or --steps")
    return statistics.median(ratios)


def data_rate(config: Config, ranks: distributed.Ranks, steps: int) -> float:
    """Images/s of this rank's loader with nothing else running, after one step of warm-up."""
    batches = open_loader(config, ranks).batches(0, steps + 1)
    micro, accumulation, _ = config.batch(ranks.world_size)
    for _ in range(accumulation):
        next(batches)
    begin = time.perf_counter()
    for _ in range(steps * accumulation):
        next(batches)
    return micro * accumulation * steps / (time.perf_counter() - begin)


def train_steps(contender: Engine, steps: int, warmup: int, ahead: bool, bar: tqdm) -> None:
    """Times whole steps on images from files. `ahead`: batches are prefetched; otherwise made on demand."""
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
    with counting(contender):
        waited, marks, graphs = loader.wait_seconds, [contender.clock.mark()], [graph_count()]
        for step in range(warmup, warmup + steps):
            marks.append(contender.run(step, batches)[1])
            graphs.append(graph_count())
            bar.update()
    record(contender, range(warmup, warmup + steps), itertools.pairwise(marks), graphs)
    contender.times.waited = loader.wait_seconds - waited


def sampler_ms(config: Config, steps: int = 50) -> float:
    spec, batch = config.mask_spec, config.data.batch_size
    begin = time.perf_counter()
    for step in range(steps):
        sample_masks(spec, seed=0, step=step, first=0, batch=batch)
    return 1e3 * (time.perf_counter() - begin) / steps


def chosen(given: list[str], here: dict[str, Lever], known: dict[str, Lever], modes: list[str]) -> dict[str, Lever]:
    """The requested levers of mode `model`. Raises ConfigError for one that would have no effect in this run."""
    if "all" in given:
        return here
    for name in given:
        if known[name].mode not in modes:
            raise ConfigError([f"{name}: only has an effect in --mode {known[name].mode}"])
        if known[name].mode == "model" and name not in here:
            raise ConfigError([f"{name}: no effect on this config here, or not installed"])
    return {name: here[name] for name in given if name in here}


def run_model(
    args: argparse.Namespace,
    config: Config,
    ranks: distributed.Ranks,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The results of mode `model`; `keep` is given those so far after each contender."""
    device, dtype = ranks.device, config.dtype
    if args.references and config.batch(ranks.world_size).accumulation > 1:
        raise ConfigError(["engine.gradient_accumulation_steps: the published code has no accumulation: set it to 1"])
    on, extras = switchable(config, "model", ranks), addable(config, ranks)
    less, more = chosen(args.without, on, LEVERS, args.mode), chosen(args.more, extras, EXTRAS, args.mode)

    def ours(name: str, levers: list[Lever]) -> Make:
        return lambda c: Engine(name, c, ranks, levers)

    def published(name: str, sdpa: bool, compiled: bool) -> Make:
        return lambda c: Reference(name, args.reference, c, ranks, sdpa, compiled)

    references = {name: published(name, *switched) for name, switched in args.references.items()}
    levers = {f"without {n}": ours(f"without {n}", [lever]) for n, lever in less.items()}
    levers |= {f"with {n}": ours(f"with {n}", [lever]) for n, lever in more.items()}
    compared = references | {f"with {n}": levers[f"with {n}"] for n, lever in more.items() if lever.same}
    errors, failed = check(ours("engine", []), ours("every lever off", [*on.values()]), compared, config, ranks)
    say("loss differences from the engine in fp32: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    for name, why in failed.items():
        say(f"{name} is not timed: {why}")
    timed = {name: make for name, make in (references | levers).items() if name not in failed}

    images = Synthetic(config, device, config.batch(ranks.world_size).accumulation)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise it silently falls back to eager
    rate = [matmul_flops(device, dtype)]
    base = start(partial(ours("engine", []), config), images, args.warmup, device)
    rows: list[dict[str, Any]] = []
    longer: dict[str, float] = {}
    others = len(timed)
    steps = args.steps * max(1, 2 * others) + min(args.steps, 5) * (1 + others)
    with tqdm(total=steps, unit="step", disable=args.quiet) as bar:
        if not others:
            measure([base], images, args.warmup, args.steps, args.block, bar)
        rate.append(matmul_flops(device, dtype))
        rates = {"of_measured": statistics.mean(rate), "of_datasheet": datasheet_flops(device, dtype)}
        later = args.warmup + args.steps  # so that no timed step is compiled for here, uncounted
        with base.timing_parts():
            measure([base], images, later, min(args.steps, 5), args.block, bar)
        waits = host_waits(base, images, later)
        parts = {"mask sampler": sampler_ms(config)} if config.method.masked else {}

        def so_far() -> dict[str, Any]:
            """The engine's row is from its turns with the first other contender."""
            engine = figures(base, base.times.steps[: args.steps], rates)
            limit = rates["of_measured"] / (engine["gflop_per_image"] * 1e9)
            return {
                "loss_errors": errors, "matmul_flops": rates["of_measured"], "matmul_samples": rate,
                "dtype": str(dtype), "datasheet_flops": rates["of_datasheet"], "limit_images_per_second": limit,
                "rows": [engine, *rows, *({"contender": name, "failed": why} for name, why in failed.items())],
                "times_longer": longer, "levers": {n: x.what for n, x in (less | more).items()},
                "recompilations": sum(step.graphs > 0 for step in base.times.steps), "host_waits": waits,
                "masked": config.method.masked, "parts_ms": parts,
            }  # fmt: skip

        for name, make in timed.items():
            other: Contender | None = None
            before = len(base.times.steps)
            try:
                other = start(partial(make, config), images, args.warmup, device)
                measure([base, other], images, args.warmup, args.steps, args.block, bar)
                theirs, beside = other.times.steps[:], base.times.steps[before:]
                ratio = paired(name, theirs, beside)
                with other.timing_parts():
                    measure([other], images, args.warmup, min(args.steps, 5), args.block, bar)
                rows.append(figures(other, theirs, rates) | {"beside": [step.seconds for step in beside]})
                longer[name] = ratio
            except Exception as error:
                # The other contenders' results are kept; the exit code reports the failure.
                rows.append({"contender": name, "failed": reason(error)})
            finally:
                if other is not None:
                    other.close()
                other = None
                free()
            if base.times.steps:
                keep(so_far())
        if not base.times.steps:  # every other contender failed before its first turn
            measure([base], images, args.warmup, args.steps, args.block, bar)
    result = so_far()
    base.close()
    return result


def run_train(args: argparse.Namespace, config: Config, ranks: distributed.Ranks) -> dict[str, Any]:
    device, dtype = ranks.device, config.dtype
    rates = {"of_measured": matmul_flops(device, dtype), "of_datasheet": datasheet_flops(device, dtype)}
    rows = []
    with tqdm(unit="step", disable=args.quiet) as bar:
        for name in ["train", *("prefetch" for w in args.without if w in ("all", "prefetch"))]:
            contender = Engine(name, config, ranks, [])
            train_steps(contender, args.steps, args.warmup, name == "train", bar)
            row = figures(contender, contender.times.steps, rates)
            rows.append(row | {"contender": "train" if name == "train" else "without prefetch"})
            contender.close()
            del contender
            free()
    return {"rows": rows, "recompilations": sum(row["recompiled"] for row in rows)}


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("--mode", action="append", choices=MODES, help="repeatable (default: model)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: engine.device of the config")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps, at least 2 (default: %(default)s)")
    parser.add_argument("--block", type=int, help="steps per turn (default: 10 on a GPU, 1 on a CPU)")
    parser.add_argument("--against", metavar="reference=PATH", help="a checkout of facebookresearch/ijepa")
    parser.add_argument("--reference-sdpa", action="store_true", help="also time it with SDPA")
    parser.add_argument("--reference-compile", action="store_true", help="also time it with torch.compile")
    parser.add_argument("--without", action="append", default=[], choices=["all", *LEVERS], help="repeatable")
    parser.add_argument(
        "--with",
        action="append",
        default=[],
        choices=["all", *EXTRAS],
        dest="more",
        help="repeatable; all: those installed",
    )
    parser.add_argument(
        "--out", type=Path, metavar="PREFIX", help="default: benchmarks/results/throughput-DEVICE-CONFIG"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(command_line(sys.argv[1:]))
    args.mode = args.mode or ["model"]
    args.references = {}
    if args.against:
        kind, _, path = args.against.partition("=")
        if kind != "reference" or not path:
            parser.error(f"--against {args.against}: expected reference=PATH")
        args.reference = Path(path).expanduser()
        if not (args.reference / "src/models").is_dir():
            parser.error(f"--against {args.against}: no checkout of facebookresearch/ijepa (no src/models)")
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
    ranks = distributed.start(config.engine.device, deterministic=config.engine.deterministic)
    args.quiet = not ranks.is_first
    args.block = args.block or (10 if ranks.device.type == "cuda" else 1)

    def say(message: str) -> None:
        if ranks.is_first:
            print(message, flush=True)

    say(f"{provenance(ranks.device)['hardware']}, {ranks.world_size} rank(s), {config.precision}")
    result = provenance(ranks.device) | {"ranks": ranks.world_size, "batch": config.data.batch_size}
    result["config"] = config.model_dump(mode="json")
    if "model" not in args.mode and (args.against or args.more or {*args.without} - {"all", "prefetch"}):
        raise ConfigError(["--against, --with and --without (except prefetch) need --mode model"])
    name = re.sub("[^a-z0-9]+", "-", f"throughput-{ranks.device.type}-{Path(args.config).stem}".lower())
    out = args.out or ROOT / "benchmarks/results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"{Path(args.config).stem}, {result['hardware']}"[:70]

    def keep(part: dict[str, Any]) -> None:
        result["model"] = part
        if ranks.is_first:
            write(result, out, title)

    if "model" in args.mode:
        keep(run_model(args, config, ranks, say, keep))
    if "data" in args.mode:
        result["data"] = {"images_per_second": data_rate(config, ranks, args.steps)}
    if "train" in args.mode:
        result["train"] = run_train(args, config, ranks)
    if ranks.is_first:
        write(result, out, title)
        print(report(result))
        print(f"written: {out}.json, .md" + (", .png" if "model" in result else ""))
    return result


def write(result: dict[str, Any], out: Path, title: str) -> None:
    """Writes the results so far, as JSON, table and picture."""
    Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{out}.md").write_text(report(result) + "\n")
    if "model" in result:
        picture(result["model"], title, Path(f"{out}.png"))


def main() -> int:
    mistakes = (distributed.NotMet, BenchmarkError, ValueError, OSError)
    return run_program(work, *mistakes, name=lambda: f"{program()}, rank {os.environ.get('RANK', '0')}")


def work() -> int:
    try:
        result = run(arguments())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    rows = [row for mode in ("model", "train") for row in result.get(mode, {}).get("rows", [])]
    if failed := [row["contender"] for row in rows if "failed" in row]:
        print(f"failed (see the table): {', '.join(failed)}", file=sys.stderr)
        return 1
    if any(row["recompiled"] for row in rows if not row["contender"].startswith("published")):
        print("recompiled after the warm-up: raise --warmup, or mark the varying sizes as dynamic", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
