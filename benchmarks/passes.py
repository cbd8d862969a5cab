"""What the compiled code of a transformer block moves between its matrix products, counted from Inductor's kernels.

    python benchmarks/passes.py    # counts again; fails if it does not find the figures below

Needs a CUDA build of torch and a GPU, but no result of it: the null GPU (tests/nullgpu) will do. Without one, the
figures below (torch 2.13, compute capability 9.0; the same for widths 384 and 1280) serve `step_model.py`, and
tests/benchmarks/test_step_model.py derives `LEAST` from the traced graph.

A pass is one full-size tensor read or written by a kernel, once, in units of rows x D (the block's width) or rows x F
(its MLP's). Attention and the products are not in it, nor are tensors that do not grow with rows x width: weights, row
statistics, partial sums. Caches are ignored.
"""

import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("kernels", "engine")]

import torch

from jepa.model.attention import require
from jepa.model.execution import compile_blocks
from jepa.model.vit import Block


@dataclass(frozen=True)
class Passes:
    """Passes over tensors D and F wide, on all rows of a block and on the rows that it outputs, if these are fewer."""

    width: int = 0
    hidden: int = 0
    wanted_width: int = 0
    wanted_hidden: int = 0
    launches: int = 0
    """All kernels of the graph; attention counts as one."""

    def values(self, rows: float, wanted: float, D: int, F: int) -> float:
        return rows * (self.width * D + self.hidden * F) + wanted * (self.wanted_width * D + self.wanted_hidden * F)


# Of a whole block, and of one that outputs some rows: the target encoder's and the predictor's last.
COUNTED = {
    "inference": Passes(9, 2, launches=9),
    "forward": Passes(9, 2, launches=9),
    "backward": Passes(23, 4, launches=25),
    "inference, some rows": Passes(2, 0, 9, 2, launches=11),
    "forward, some rows": Passes(2, 0, 9, 2, launches=11),
    "backward, some rows": Passes(9, 0, 15, 4, launches=34),
}
# The least: what products and attention give or take, or leaves the graph, is read or written once, everything else is
# kept on the chip.
LEAST = {
    "inference": Passes(6, 2),
    "forward": Passes(6, 2),
    "backward": Passes(13, 3),
    "inference, some rows": Passes(2, 0, 6, 2),
    "forward, some rows": Passes(2, 0, 6, 2),
    "backward, some rows": Passes(7, 0, 9, 3),
}


def classify(values: float, rows: int, wanted: int, D: int, F: int) -> tuple[str, int] | None:
    """The field of Passes that a tensor of so many values counts in, and how often; None if it is not full-size."""
    sizes = {"width": rows * D, "hidden": rows * F, "wanted_width": wanted * D, "wanted_hidden": wanted * F}
    return next(((name, int(values // size)) for name, size in sizes.items() if values and values % size == 0), None)


def count(D: int, heads: int, ratio: float = 4.5) -> dict[str, Passes]:
    """Compiles a block for CUDA as the engine does, in bf16, and counts as in `COUNTED`. `ratio`, F / D, is not a whole
    number, so that F differs from every multiple of D."""
    from torch._inductor import config
    from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode

    B, K, U, F = 8, 113, 44, int(ratio * D)
    found: list[Passes] = []

    def look(nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
        fields: Counter[str] = Counter()
        for node in nodes:
            if isinstance(node, ExternKernelSchedulerNode):
                fields["launches"] += type(node.node).__name__ != "MultiOutput"  # which unpacks a result
                continue
            fields["launches"] += 1
            for moved in node.get_read_write_buffer_accesses(include_reads=True, include_writes=True).values():
                if kind := classify(moved / 2, B * K, B * U, D, F):
                    fields[kind[0]] += kind[1]
        found.append(Passes(**fields))
        return nodes

    require("sdpa")
    settings: Any = {"_post_fusion_custom_pass": look, "force_disable_caches": True}
    with config.patch(settings):
        for some in (False, True):
            torch._dynamo.reset()
            block = Block(D, heads, ratio).to("cuda", torch.bfloat16)
            compile_blocks(torch.nn.ModuleList([block]))
            x, rows = (torch.zeros(B, n, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (K, U))
            given = (x, rows) if some else (x,)
            with torch.no_grad():
                block(*given)
            y = block(*given)
            y.backward(torch.zeros_like(y))
    return dict(zip(COUNTED, found, strict=True))


def main() -> int:
    different = False
    for D, heads in ((384, 12), (1280, 16)):
        for name, passes in count(D, heads).items():
            different |= passes != COUNTED[name]
            print(f"width {D}, {name}: {asdict(passes)}" + (f", was {COUNTED[name]}" * (passes != COUNTED[name])))
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
