"""Speed of every op of jepa_kernels, against its competitors and the limits of this machine.

    python benchmarks/kernels.py [--device cuda|cpu] [--op NAME ...] [--size vit_huge_14] [--batch 128] [--out FOLDER]

Contenders: `ours`; `eager`, plain PyTorch (for adamw_ema, torch's foreach AdamW and lerp); `compiled`, torch.compile
of that; and other implementations. Before anything is timed, outputs and gradients are compared with float64 on the
same inputs: at most twice eager's error, plus 2e-6. Contenders take turns; figures are medians. On a GPU, calls are
timed with events, with cold caches, queued after work that hides host overhead; a call below 0.1 ms is timed as one of
twenty in a CUDA graph, each on its own buffers. `forward` runs without autograd, `backward` on a retained graph, `both`
as in training. GB/s and TFLOP/s count the work the op needs, not what a contender does; the limit is that of memory
(the faster of a copy and an in-place scaling, larger than the caches: data that fits into them may exceed it) or of a
matrix product, measured in the same run. MB is the peak memory that a call adds: the allocator's count on a GPU, the
profiler's on a CPU. `host ms`, for ops over many tensors, is the host time of a call, measured on as many tensors of a
few elements. In the roofline a copied element counts as one operation. The files are written after each op.
"""

import json
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

import torch
from contenders import OPS, SIZES, Size
from machine import ROOT, ceilings, hardware, milliseconds, peak_bytes, provenance

from jepa.ranks.device import choose
from jepa.ranks.program import Parser, run_program


def host_milliseconds(op: str, size: Size, device: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Of each contender but the compiled one, which would be recompiled."""
    calls = OPS[op](replace(size, D=1, patch=1), device, dtype).calls["step"]
    return milliseconds({name: call for name, call in calls.items() if name != "compiled"}, "cpu", seconds)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--size", choices=SIZES, help="default: vit_huge_14 on a GPU, vit_small_16 on a CPU")
    parser.add_argument("--batch", type=int, help="images (default: 128 on a GPU, 16 on a CPU)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, CPU: float32")
    parser.add_argument("--seconds", type=float, default=1, help="per figure (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="default: %(default)s")
    args = parser.parse_args()
    args.device = choose(args.device).type
    device, gpu = torch.device(args.device), args.device == "cuda"
    in_cpp = torch._C._dispatch_has_kernel_for_dispatch_key("jepa_kernels::gather", "CPU")
    if not gpu and not in_cpp:
        sys.exit("jepa_kernels has no CPU kernels here: build them with `python setup.py build_ext --inplace`")
    size_name = args.size or ("vit_huge_14" if gpu else "vit_small_16")
    size = replace(SIZES[size_name], B=args.batch or (SIZES[size_name].B if gpu else 16))
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    torch.manual_seed(0)
    if gpu:
        torch.cuda.set_stream(torch.cuda.Stream())  # a backward runs on its forward's stream: capture graphs there

    memory, matmul = ceilings(args.device, 2 * args.seconds)
    table = [
        f"{hardware(device)}; {size_name}, {size.B} images, {dtype}",
        f"ceilings: memory {memory / 1e9:.1f} GB/s, float32 matmul {matmul / 1e12:.3f} TFLOP/s",
        f"{'op':17}{'mode':9}{'contender':21}{'ms':>9}{'GB/s':>8}{'TFLOP/s':>9}{'of limit':>10}{'x ours':>8}{'MB':>8}"
        f"{'host ms':>9}",
    ]
    print("\n".join(table), flush=True)
    rows: list[dict[str, Any]] = []
    report = {
        **provenance(device),
        "CPU kernels": in_cpp,
        "size": {"name": size_name, "dtype": str(dtype), **asdict(size)},
        "ceilings": {"memory GB/s": memory / 1e9, "float32 matmul TFLOP/s": matmul / 1e12},
        "rows": rows,
    }
    where = re.sub("[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()) if gpu else "cpu"
    file = args.out / f"kernels-{where}-{size_name}"
    for op in args.op:
        case = OPS[op](size, args.device, dtype)
        case.check()
        for mode, calls in case.calls.items():
            copies = case.copies and partial(case.copies, mode)
            times = milliseconds(calls, args.device, args.seconds, copies)
            host = host_milliseconds(op, size, args.device, dtype, args.seconds) if mode == "step" else {}
            for name, ms in times.items():
                row = figures(op, mode, name, ms, case.work[mode], memory, matmul)
                row |= {"times ours": ms / times["ours"], "peak MB": peak_bytes(calls[name], device)[1] / 1e6}
                row["host ms"] = host.get(name)
                rows.append(row)
                table.append(line(row))
                print(table[-1], flush=True)
        del case, calls
        write(report, table, file)
    print(f"written: {file}.json, .md and .png")


def write(report: dict[str, Any], table: list[str], file: Path) -> None:
    """Writes the results so far, as JSON, table and picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    about = [f"commit {report['commit']}, {report['versions']}", f"    {report['command']}", "", *table]
    file.with_suffix(".md").write_text("\n".join(["```", *(row.rstrip() for row in about), "```", ""]))
    roofline(report, file.with_suffix(".png"))


def figures(
    op: str, mode: str, name: str, ms: float, work: tuple[float, float], memory: float, matmul: float
) -> dict[str, Any]:
    moved, computed = work
    return {
        "op": op,
        "mode": mode,
        "contender": name,
        "ms": ms,
        "GB/s": moved / ms / 1e6,
        "TFLOP/s": computed / ms / 1e9,
        "share of limit": max(moved / memory, computed / matmul) * 1e3 / ms,
        "operations per byte": computed / moved,
    }


def line(row: dict[str, Any]) -> str:
    host = "" if row["host ms"] is None else f"{row['host ms']:9.3f}"
    return (
        f"{row['op']:17}{row['mode']:9}{row['contender']:21}{row['ms']:9.3f}{row['GB/s']:8.1f}{row['TFLOP/s']:9.3f}"
        f"{row['share of limit']:10.1%}{row['times ours']:8.2f}{row['peak MB']:8.0f}{host}"
    )


def roofline(report: dict[str, Any], file: Path) -> None:
    from matplotlib import pyplot as plt

    memory, matmul = (x * scale for x, scale in zip(report["ceilings"].values(), (1e9, 1e12), strict=True))
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    knee = matmul / memory
    axes.loglog([0.01, knee, 100 * knee], [0.01 * memory, matmul, matmul], color="black", label="limit")
    ours = [row for row in report["rows"] if row["contender"] == "ours"]
    eager = [row for row in report["rows"] if row["contender"] == "eager"]
    for name, rows, marker, colour in (("eager", eager, "x", "tab:red"), ("ours", ours, "o", "tab:blue")):
        x, y = [row["operations per byte"] for row in rows], [row["TFLOP/s"] * 1e12 for row in rows]
        axes.plot(x, y, marker, color=colour, label=name)
    heights = {f"{row['op']} {row['mode']}": (row["operations per byte"], row["TFLOP/s"] * 1e12) for row in ours}
    place = 0.0
    for name, (x, y) in sorted(heights.items(), key=lambda item: item[1][1]):
        place = max(place * 1.35, y)  # labels stacked, each connected to its point
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "color": "grey", "linewidth": 0.5}
        axes.annotate(name, (x, y), (8 * knee, place), fontsize=8, va="center", arrowprops=line)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys())
    axes.set(xlabel="operations per byte that must be moved", ylabel="operations/s", title=report["hardware"])
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_program(main, ValueError, OSError))
