"""Mask sampling time per image: C++ on one core and on all, its Python specification, the published code.

    python benchmarks/masks.py [--grid 16 16] [--batch 128] [--reference PATH] [--out FILE]

PATH is a checkout of facebookresearch/ijepa, whose collator is then timed in the same run. Before anything is
timed, C++ and the specification must draw the same masks. Contenders take turns; each figure is the median over
the turns, each turn a mean over new steps, because block sizes vary from step to step.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("kernels", "engine")]

from machine import provenance
from published import checkout

from jepa.data.masks import MODES, Masks, MaskSpec, sample_masks, sample_masks_ref
from jepa.ranks.program import Parser, run_program

SEED = 0


def published(path: Path, spec: MaskSpec, batch: int) -> Callable[[int], int]:
    """The published collator on one-pixel images, so that its time is that of the masks."""
    collate = checkout(path).collator.MaskCollator(
        input_size=(spec.height, spec.width),
        patch_size=1,
        enc_mask_scale=spec.enc_mask_scale,
        pred_mask_scale=spec.pred_mask_scale,
        aspect_ratio=spec.aspect_ratio,
        nenc=spec.num_enc_masks,
        npred=spec.num_pred_masks,
        min_keep=spec.min_keep,
        allow_overlap=spec.allow_overlap,
    )
    images = [torch.zeros(1)] * batch
    return lambda step: collate(images)[1][0].shape[-1]


def ours(
    sample: Callable[..., Masks], spec: MaskSpec, batch: int, cut: tuple[int, int] | None = None
) -> Callable[[int], int]:
    def call(step: int) -> int:
        return sample(spec, seed=SEED, step=step, first=0, batch=batch, cut=cut).context.shape[-1]

    return call


def check(specs: dict[str, MaskSpec], batch: int) -> None:
    for mode, spec in specs.items():
        for step in range(3):
            drawn, expected = (
                sample(spec, seed=SEED, step=step, first=5, batch=batch, cut=(0, batch + 10))
                for sample in (sample_masks, sample_masks_ref)
            )
            if not all(map(torch.equal, drawn[:2], expected[:2])):
                raise SystemExit(f"C++ and the specification disagree ({mode}, step {step}): nothing timed")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--grid", type=int, nargs=2, default=(16, 16), metavar=("H", "W"), help="patches (ViT-H/14: 16 16)"
    )
    parser.add_argument("--batch", type=int, default=128, help="images per rank")
    parser.add_argument("--global-batch", type=int, default=2048, help="images that the ranks cut to one length")
    parser.add_argument("--reference", type=Path, help="a checkout of facebookresearch/ijepa")
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("jepa_masks::sample", "CPU"):
        raise SystemExit("jepa_kernels was built without csrc: no C++ sampler to time")

    height, width = args.grid
    specs = {mode: MaskSpec(height, width, mode=mode) for mode in MODES}
    check(specs, args.batch)
    cores = os.cpu_count() or 1
    everyone = (0, max(args.global_batch, args.batch))
    # name, threads, steps per turn, one step -> patches kept
    contenders: list[tuple[str, int, int, Callable[[int], int]]] = []
    if args.reference:
        contenders.append(("published sampler", 1, 1, published(args.reference, specs["reference"], args.batch)))
    for mode in MODES:
        contenders.append((f"specification, {mode}", 1, 1, ours(sample_masks_ref, specs[mode], args.batch)))
    for mode, threads in itertools.product(MODES, sorted({1, cores})):
        contenders.append((f"C++, {mode}", threads, 20, ours(sample_masks, specs[mode], args.batch)))
    for mode, threads in itertools.product(("reference", "unbiased"), sorted({1, cores})):
        name = f"C++, {mode}, cut over {everyone[1]} images"
        contenders.append((name, threads, 5, ours(sample_masks, specs[mode], args.batch, everyone)))

    times: list[list[float]] = [[] for _ in contenders]
    kept: list[list[int]] = [[] for _ in contenders]
    for turn in range(args.turns + 1):
        for i, (_, threads, steps, call) in enumerate(contenders):
            torch.set_num_threads(threads)
            start = time.perf_counter()
            lengths = [call(turn * steps + step) for step in range(steps)]
            elapsed = time.perf_counter() - start
            if turn:  # the first is a warm-up
                times[i].append(elapsed / steps / args.batch * 1e6)
                kept[i] += lengths

    about = provenance(torch.device("cpu"))
    print(f"{about['hardware']}; torch {about['versions']['torch']}, commit {about['commit']}")
    print(f"grid {args.grid[0]} x {args.grid[1]}, batch {args.batch}, C++ = specification: checked\n")
    print(f"{'sampler':40} {'cores':>5} {'us/image':>9} {'min':>8} {'max':>8} {'context kept':>13}")
    rows = []
    for (name, threads, _, _), us, lengths in zip(contenders, times, kept, strict=True):
        tokens = statistics.mean(lengths) / (args.batch if name.endswith("packed") else 1)
        row = (statistics.median(us), min(us), max(us), tokens)
        print(f"{name:40} {threads:5} {row[0]:9.2f} {row[1]:8.2f} {row[2]:8.2f} {row[3]:13.1f}")
        figures = dict(zip(("us_per_image", "min", "max", "context_kept"), row, strict=True))
        rows.append({"sampler": name, "cores": threads, **figures})
    if args.out:
        result = {**about, "grid": list(args.grid), "batch": args.batch, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_program(main, ValueError, OSError))
