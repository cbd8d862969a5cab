"""What runs between our kernels in a transformer block: the fastest implementation here?

    python benchmarks/blocks.py [--device cuda|cpu] [--model vit_huge_14] [--batch 128] [--seconds 1] [--out FOLDER]

Three tables. Attention, forward and with backward, at each length and head dim of the model's encoder, target encoder
and predictor, for each backend that runs here: `engine.attention` is sdpa, flash_attn, xformers or math; the others
show whether sdpa picks the best one. The predictor's weight gradients, small outputs summed over many rows, as one
matrix product and split along the rows. Residual + layer norm, and bias + GELU, eager and fused by Inductor, against
the bytes they must move. Each result is first compared with float64: at most twice the error of the plain formula in
the same dtype; one that is worse is not timed, and the exit code is 1. TFLOP/s and GB/s count the necessary work; the
limits are measured in the same run. The files are written after each row of the tables.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("kernels", "engine")]

import torch
import torch.nn.functional as F
from contenders import SIZES, M, Size
from machine import ROOT, Call, ceilings, matmul_flops, milliseconds, provenance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jepa.config.schema import MODELS as MODELS
from jepa.config.schema import ConfigError
from jepa.model.attention import attend, require
from jepa.ranks.device import choose
from jepa.ranks.program import Parser, run_program

SPLITS = (4, 16)
CHECKED = 2  # sequences compared with float64
NARROW = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}  # (outputs, inputs) of a layer, in widths
Contender = Callable[..., Tensor]
Rows = Iterator[dict[str, Any]]


class Wrong(RuntimeError):
    """A contender whose result is too inaccurate to be timed."""


@dataclass(frozen=True)
class Shape:
    """Attention in `batch` sequences: Kq queries, K keys, H heads of C channels."""

    name: str
    batch: int
    Kq: int
    K: int
    H: int
    C: int

    @property
    def flops(self) -> float:
        """Of the forward; the backward takes 2.5 times as many, since it recomputes the scores."""
        return 4 * self.batch * self.H * self.Kq * self.K * self.C


def shapes(size: Size, heads: int) -> list[Shape]:
    C, c, both = size.D // heads, size.Dp // heads, size.Kc + size.Kt
    return [
        Shape("target encoder", size.B, size.N, size.N, heads, C),
        Shape("context encoder", size.B, size.Kc, size.Kc, heads, C),
        Shape("predictor", M * size.B, both, both, heads, c),
        Shape("predictor, last block", M * size.B, size.Kt, both, heads, c),
    ]


def backends() -> dict[str, Contender]:
    """attend(q, k, v) of every installed backend; whether it supports a shape shows when it is called."""
    require("sdpa")
    found: dict[str, Contender] = {"sdpa": partial(attend, backend="sdpa"), "math": partial(attend, backend="math")}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        found[f"sdpa: {name.split('_')[0].lower()}"] = partial(_only, getattr(SDPBackend, name))
    found["sdpa, heads of 64 or 128"] = _wider
    for name in ("flash_attn", "xformers"):
        try:
            require(name)
            found[name] = partial(attend, backend=name)
        except ConfigError:
            continue
    return found


def _only(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _wider(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads zero-padded to the widths that kernels are made for."""
    C = q.shape[-1]
    more = (64 if C <= 64 else 128) - C
    q, k, v = (F.pad(x, (0, more)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=C**-0.5).transpose(1, 2)[..., :C]


def with_gradients(function: Contender, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def check(name: str, function: Contender, plain: Contender, inputs: list[Tensor], dy: Tensor) -> None:
    """Raises Wrong if the output's or a gradient's error against float64 exceeds twice that of `plain`, plus 1e-6."""
    exact = with_gradients(plain, [x.double() for x in inputs], dy.double())
    got, reference = (with_gradients(f, inputs, dy) for f in (function, plain))
    for what, a, b, e in zip(("output", *("gradient",) * len(inputs)), got, reference, exact, strict=True):
        error, allowed = ((x.double() - e).norm() / e.norm() for x in (a, b))
        if not error <= 2 * allowed + 1e-6:
            raise Wrong(f"{name}: {what} is off by {error:.1e}, the plain formula by {allowed:.1e}")


def race(
    functions: dict[str, Contender], plain: Contender, inputs: list[Tensor], dy: Tensor, args: Any, few: Any
) -> dict[str, dict[str, float | str]]:
    """Milliseconds of each forward, and of forward and backward; or why not timed. `few`: the part to check."""
    forward: dict[str, Call] = {}
    both: dict[str, Call] = {}
    found: dict[str, dict[str, float | str]] = {}
    for name, function in functions.items():
        try:
            check(name, function, plain, *few)
            with torch.no_grad():
                function(*inputs)
        except (RuntimeError, NotImplementedError, ValueError) as error:  # Wrong, or no kernel for this shape
            why = str(error).strip().splitlines()[0][:100]
            found[name] = {"why": f"wrong: {why}" if isinstance(error, Wrong) else why}
            continue
        forward[name] = partial(_without_graph, function, inputs)
        both[name] = partial(with_gradients, function, inputs, dy)
    alone, together = (milliseconds(calls, args.device, args.seconds) for calls in (forward, both))
    return found | {name: {"forward": alone[name], "both": together[name]} for name in forward}


@torch.no_grad()
def _without_graph(function: Contender, inputs: list[Tensor]) -> Tensor:
    return function(*inputs)


def attention(size: Size, heads: int, dtype: torch.dtype, args: argparse.Namespace) -> Rows:
    for shape in shapes(size, heads):
        q, dy = (torch.randn(shape.batch, shape.Kq, shape.H, shape.C, device=args.device).to(dtype) for _ in range(2))
        k, v = torch.randn(shape.batch, shape.K, 2, shape.H, shape.C, device=args.device).to(dtype).unbind(2)
        few = [x[:CHECKED] for x in (q, k, v)], dy[:CHECKED]
        times = race(backends(), partial(attend, backend="math"), [q, k, v], dy, args, few)
        yield {"shape": vars(shape), "flops": shape.flops, "times": times}


def weight_gradients(size: Size, dtype: torch.dtype, args: argparse.Namespace) -> Rows:
    rows_all = M * size.B * (size.Kc + size.Kt) // max(SPLITS) * max(SPLITS)
    for name, (out, inner) in NARROW.items():
        dy, x = (torch.randn(rows_all, w * size.Dp, device=args.device).to(dtype) for w in (out, inner))
        functions: dict[str, Contender] = {"one product": lambda dy, x: dy.T @ x}
        functions |= {f"split in {n}": partial(_split, n) for n in SPLITS}
        check_products(f"weight gradient of {name}", functions, dy, x)
        calls = {n: partial(f, dy, x) for n, f in functions.items()}
        shape = f"{name} [{out * size.Dp}, {inner * size.Dp}] over {rows_all} rows"
        flops = 2 * rows_all * out * inner * size.Dp**2
        yield {"shape": shape, "flops": flops, "times": milliseconds(calls, args.device, args.seconds)}


def check_products(name: str, functions: dict[str, Contender], dy: Tensor, x: Tensor) -> None:
    """Raises Wrong if an error against float64 exceeds twice that of the first function, plus 1e-6."""
    exact = dy.double().T @ x.double()
    errors = {n: float((f(dy, x).double() - exact).norm() / exact.norm()) for n, f in functions.items()}
    allowed = 2 * next(iter(errors.values())) + 1e-6
    if bad := {n: e for n, e in errors.items() if not e <= allowed}:
        raise Wrong(f"{name}: {bad}, allowed {allowed:.1e}")


def _split(parts: int, dy: Tensor, x: Tensor) -> Tensor:
    """Split-K over the rows, so that a small output fills a GPU; the parts are summed in float32."""
    products = torch.bmm(dy.view(parts, -1, dy.shape[1]).transpose(1, 2), x.view(parts, -1, x.shape[1]))
    return products.sum(0, dtype=torch.float32).to(dy.dtype)


def _residual_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    both = x + y
    return F.layer_norm(both, both.shape[-1:], weight, bias, 1e-6) + both


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def between(size: Size, dtype: torch.dtype, args: argparse.Namespace) -> Rows:
    """The residual sum and its norm are both written (added here, so that a contender has one output)."""
    rows = size.B * size.N
    for plain, width, passes in ((_residual_norm, size.D, (3, 7)), (_bias_gelu, 4 * size.D, (2, 5))):
        x, dy = (torch.randn(rows, width, device=args.device).to(dtype) for _ in range(2))
        vectors = [torch.randn(width, device=args.device).to(dtype) for _ in range(2 if plain is _residual_norm else 1)]
        inputs = [x, torch.randn_like(x), *vectors] if plain is _residual_norm else [x, *vectors]
        few = [t[:256] if t.ndim > 1 else t for t in inputs], dy[:256]
        times = race({"eager": plain, "compiled": torch.compile(plain, dynamic=False)}, plain, inputs, dy, args, few)
        name = plain.__name__.strip("_").replace("_", " + ")
        bytes_ = {what: n * x.numel() * x.element_size() for what, n in zip(("forward", "both"), passes, strict=True)}
        yield {"shape": f"{name} [{rows}, {width}]", "bytes": bytes_, "times": times}


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['hardware']}; torch {result['versions']['torch']}, commit {result['commit']}; {result['model']}, "
    ]
    lines[0] += f"{result['batch']} images, {result['dtype']}"
    lines += [f"`{result['command']}`", ""]
    lines += [f"limits: memory {result['memory'] / 1e9:.1f} GB/s, matrix product {result['matmul'] / 1e12:.3f} TFLOP/s"]
    lines += [
        "",
        "| attention | by | forward, ms | TFLOP/s | with backward, ms | TFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["attention"]:
        s, best = row["shape"], _best(row["times"])
        name = f"{s['name']}: {s['batch']} x {s['H']} heads of {s['C']}, {s['Kq']} queries, {s['K']} keys"
        for by, t in row["times"].items():
            if "why" in t:
                cells = [f"not timed: {t['why']}", "", "", ""]
            else:
                rates = (row["flops"] / t["forward"] / 1e9, 3.5 * row["flops"] / t["both"] / 1e9)
                cells = [f"{t['forward']:.3f}", f"{rates[0]:.3f}", f"{t['both']:.3f}", f"{rates[1]:.3f}"]
            lines.append("| " + " | ".join([name, f"**{by}**" if by == best else by, *cells]) + " |")
            name = ""
    lines += ["", "| weight gradient | by | ms | TFLOP/s | of the limit |", "|---|---|---|---|---|"]
    for row in result["weight_gradients"]:
        for by, ms in row["times"].items():
            rate = row["flops"] / ms * 1e3
            lines.append(f"| {row['shape']} | {by} | {ms:.3f} | {rate / 1e12:.3f} | {rate / result['matmul']:.0%} |")
    lines += ["", "| between the matmuls | by | forward, ms | of memory | with backward, ms | of memory |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in result["between"]:
        for by, t in row["times"].items():
            if "why" in t:
                lines.append(f"| {row['shape']} | {by} | not timed: {t['why']} | | | |")
                continue
            shares = [row["bytes"][what] / t[what] * 1e3 / result["memory"] for what in ("forward", "both")]
            cells = [f"{t['forward']:.3f}", f"{shares[0]:.0%}", f"{t['both']:.3f}", f"{shares[1]:.0%}"]
            lines.append("| " + " | ".join([row["shape"], by, *cells]) + " |")
    return "\n".join(lines)


def _best(times: dict[str, dict[str, Any]]) -> str:
    return min(times, key=lambda name: times[name].get("both", math.inf))


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--model", choices=SIZES, help="default: vit_huge_14 on a GPU, vit_small_16 on a CPU")
    parser.add_argument("--batch", type=int, help="images (default: 128 on a GPU, vit_giant_16: 16; 8 on a CPU)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, CPU: float32")
    parser.add_argument("--seconds", type=float, default=1, help="per figure (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="default: %(default)s")
    args = parser.parse_args()
    args.device = choose(args.device).type
    gpu = args.device == "cuda"
    model = args.model or ("vit_huge_14" if gpu else "vit_small_16")
    size = replace(SIZES[model], B=args.batch or (SIZES[model].B if gpu else 8))
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    heads = MODELS[model.rpartition("_")[0]].num_heads
    torch.manual_seed(0)
    device = torch.device(args.device)
    result = provenance(device) | {"model": model, "batch": size.B, "dtype": str(dtype)}
    result |= {"memory": ceilings(args.device, 2 * args.seconds)[0], "matmul": matmul_flops(device, dtype)}
    result |= {"attention": [], "weight_gradients": [], "between": []}
    out = args.out / f"blocks-{args.device}-{model}"
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for part, rows in (
            ("attention", attention(size, heads, dtype, args)),
            ("weight_gradients", weight_gradients(size, dtype, args)),
            ("between", between(size, dtype, args)),
        ):
            for row in rows:
                result[part].append(row)
                write(result, out)
        result["matmul"] = max(result["matmul"], matmul_flops(device, dtype))  # the limit is the best rate seen
    except Wrong as error:
        print(f"benchmarks/blocks.py: {error}: not timed", file=sys.stderr)
        return 1
    write(result, out)
    print(table(result))
    print(f"written: {out}.json, .md")
    times = [(by, t) for row in result["attention"] + result["between"] for by, t in row["times"].items()]
    wrong = [f"{by}: {t['why']}" for by, t in times if t.get("why", "").startswith("wrong")]
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


def write(result: dict[str, Any], out: Path) -> None:
    """Writes the results so far."""
    Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{out}.md").write_text(table(result) + "\n")


if __name__ == "__main__":
    sys.exit(run_program(main, ValueError, OSError))
