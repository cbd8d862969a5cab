# ruff: noqa: E402  the benchmarks are not a package: their folder is put on sys.path first
"""benchmarks/step_model.py and passes.py: their work is the budget's, their paddings brute force's, their passes the
graph's."""

import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from jepa.config.file import load_config
from jepa.config.schema import Config
from jepa.data.masks import sample_masks
from jepa.model.attention import require
from jepa.model.vit import Block
from jepa.train.budget import flops_per_image, mean_tokens
from numerics import needs_gpu

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import passes
import scaling
import step_model
import step_report
from step_model import GPUS, LEVERS, Attention, Product, Step, step

pytestmark = pytest.mark.slow

SHIPPED = sorted((ROOT / "engine/configs").glob("in*_[ic]jepa.yaml"))


def shipped(path: Path, *overrides: str) -> Config:
    return load_config(path, ["engine.global_batch_size=null", *overrides])


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    pairs = itertools.product(step_report.configs().values(), GPUS, (1, 8))
    return [step(config, gpu, scaling.wire, ranks) for config, gpu, ranks in pairs]


@pytest.mark.parametrize("overrides", [[], ["engine.skip_unread=false"]], ids=str)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_useful_work_is_the_budgets(path: Path, overrides: list[str]) -> None:
    config = shipped(path, *overrides)
    wanted = sum(flops_per_image(config).values()) * config.data.batch_size
    for gpu in GPUS:
        rows = step(config, gpu).rows
        assert sum(row.useful for row in rows) == pytest.approx(wanted, rel=1e-9)
        assert all(row.useful <= row.work for row in rows if row.unit == "FLOP" and row.name.startswith("products"))


def test_a_product_takes_as_long_as_its_tiles_laid_out_one_by_one() -> None:
    rng = random.Random(seed := random.randrange(2**32))
    print("seed", seed)
    for gpu in GPUS:
        m, n, k = (rng.randint(1, 3000) for _ in range(3))
        every = []
        for (tall, wide), relative in step_model.TILES.items():
            busy = [0.0] * gpu.sms  # seconds of each SM; every tile goes to one that is free first
            for _ in itertools.product(range(0, m, tall), range(0, n, wide)):
                first = busy.index(min(busy))
                terms = k + step_model.EDGE
                busy[first] += 2 * tall * wide * terms * gpu.sms / (gpu.peak * gpu.products * relative)
            every.append(max(busy))
        moved = 2 * (m * k + k * n + m * n) / (gpu.memory * step_model.MEMORY_SHARE)
        assert Product(m, n, k).seconds(gpu, splits=(1,)) == pytest.approx(max(min(every), moved), rel=1e-9)


def test_splitting_pays_for_the_predictors_weight_gradients_only() -> None:
    weight_gradient, forward = Product(1536, 384, 57_856), Product(57_856, 1536, 384)
    for gpu in GPUS:
        assert weight_gradient.seconds(gpu) < 0.5 * weight_gradient.seconds(gpu, splits=(1,))
        assert forward.seconds(gpu) == forward.seconds(gpu, splits=(1,))


@pytest.mark.parametrize(("C", "padded", "forward", "backward"), [
    (24, 32, (128, 128), (128, 128)), (32, 32, (128, 128), (128, 128)), (64, 64, (128, 128), (128, 128)),
    (80, 96, (128, 64), (64, 128)), (88, 96, (128, 64), (64, 128)),
])  # fmt: skip
def test_padded_attention_counts_every_tile(
    C: int, padded: int, forward: tuple[int, int], backward: tuple[int, int]
) -> None:
    lengths = [(random.randint(1, 300), random.randint(1, 300)) for _ in range(3)]
    print(lengths)
    sums = []
    for rows, columns in (forward, backward):
        tiles = [1 for q, k in lengths for _ in itertools.product(range(0, q, rows), range(0, k, columns))]
        sums.append(2 * len(tiles) * rows * columns / len(lengths))
    one = Attention(6, 4, C, tuple(lengths), (1, 1), backward=True)
    assert one.padded() == pytest.approx((2 * 24 * padded * sums[0], 5 * 24 * padded * sums[1]))
    assert one.padded(native=True) == pytest.approx((2 * 24 * C * sums[0], 5 * 24 * C * sums[1]))
    assert replace(one, backward=False).padded()[1] == 0


def test_lengths_are_those_of_the_masks() -> None:
    config = shipped(ROOT / "engine/configs/in1k_vitb16_ep600_ijepa.yaml", "data.batch_size=8")
    lengths = step_model.lengths(config.mask_spec, 8)
    for number in (0, len(lengths) - 1):
        masks = sample_masks(config.mask_spec, seed=0, step=number, first=0, batch=8)
        assert lengths[number] == (masks.context.shape[-1], masks.target.shape[-1])
    contexts = sum(context for context, _ in lengths) / len(lengths)
    assert contexts == pytest.approx(mean_tokens(config).context, rel=0.2)


def test_levers_only_save_time_and_each_saves_some(steps: list[Step]) -> None:
    best = dict.fromkeys(LEVERS, 0.0)
    for base in steps:
        for lever in LEVERS:
            changed = step(base.config, base.gpu, scaling.wire, base.ranks, [lever])
            for before, after in zip(base.rows, changed.rows, strict=True):
                assert after.seconds <= before.seconds * (1 + 1e-12), (lever, before, after)
            best[lever] = max(best[lever], base.seconds - changed.seconds)
        every = step(base.config, base.gpu, scaling.wire, base.ranks, LEVERS)
        assert 0 < every.seconds < base.seconds and all(row.seconds >= 0 for row in every.rows)
    assert all(worth > 0 for worth in best.values()), best
    with pytest.raises(ValueError, match="no lever"):
        step(steps[0].config, GPUS[0], on=["faster"])


def test_a_step_is_slower_than_its_limits(steps: list[Step]) -> None:
    for s in steps:
        assert s.images_per_second < s.limit and s.mfu == pytest.approx(s.images_per_second / s.limit)
        assert s.seconds == pytest.approx(sum(row.seconds for row in s.rows))
        for row in s.rows:
            rate = {"FLOP": s.gpu.peak, "byte": s.gpu.memory}[row.unit]
            assert row.name == "links" or row.seconds > row.work / rate, row


def test_ranks_share_the_optimizer_and_send_what_scaling_counts(steps: list[Step]) -> None:
    for alone, eight in zip(steps[::2], steps[1::2], strict=True):
        one, many = ({row.name: row for row in s.rows} for s in (alone, eight))
        assert many["AdamW and average"].work == pytest.approx(one["AdamW and average"].work / 8)
        assert "links" not in one and many["links"].work == sum(scaling.wire(eight.config, 8).values())
        bandwidth = step_model.LINK_SHARE * eight.gpu.nvlink
        assert many["links"].seconds == pytest.approx(many["links"].work / bandwidth)


def test_the_report_states_every_figure(steps: list[Step], tmp_path: Path) -> None:
    text = step_report.markdown(scaling.wire)
    assert "MODEL, not a measurement" in text and all(f"*{lever}*" in text for lever in LEVERS)
    for s in steps:
        assert f"| {1e3 * s.seconds:.1f} | {s.images_per_second:.0f} | {s.mfu:.1%} |" in text
    step_report.picture(scaling.wire, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000


# --- passes


def graphs(some: bool, grad: bool, D: int, heads: int, ratio: float, B: int, K: int, U: int) -> list[fx.GraphModule]:
    """The graphs that Inductor would get for a block: forward and backward, or inference."""
    found: list[fx.GraphModule] = []

    def take(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        found.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=take, bw_compiler=take, inference_compiler=take, decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    torch._dynamo.reset()
    block = Block(D, heads, ratio).bfloat16().requires_grad_(grad)
    x, rows = (torch.randn(B, n, D, dtype=torch.bfloat16, requires_grad=grad) for n in (K, U))
    y = torch.compile(block, backend=backend, dynamic=False)(*((x, rows) if some else (x,)))
    if grad:
        y.sum().backward()
    return found


PRODUCTS = ("addmm", "mm", "bmm", "attention")
VIEWS = {"view", "permute", "unbind", "alias", "expand", "slice", "squeeze", "unsqueeze", "getitem"}


def least(graph: fx.GraphModule, rows: int, wanted: int, D: int, F: int) -> passes.Passes:
    """What must be read and written between the products: each tensor that a product (or the caller) gives to or takes
    from anything else, once."""

    def name(node: fx.Node) -> str:
        return getattr(node.target, "__name__", str(node.target)).split(".")[0]

    def is_product(node: fx.Node) -> bool:
        return node.op == "call_function" and name(node).startswith(PRODUCTS)

    def is_view(node: fx.Node) -> bool:
        return node.op == "call_function" and name(node) in VIEWS

    def whole(node: fx.Node) -> fx.Node:
        while is_view(node) and not is_product(node.all_input_nodes[0]):
            node = node.all_input_nodes[0]
        return node

    read, written = set(), set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or is_view(node):
            continue
        outside = is_product(node) or node.op == "output"
        for given in map(whole, node.all_input_nodes):
            made_between = given.op == "call_function" and not is_product(given) and not is_view(given)
            if made_between and outside:
                written.add(given)
            elif not made_between and not outside:
                read.add(given)
    fields: Counter[str] = Counter()
    for node in [*read, *written]:
        value = node.meta["val"]
        assert isinstance(value, torch.Tensor)
        if kind := passes.classify(value.numel() * value.element_size() / 2, rows, wanted, D, F):
            fields[kind[0]] += kind[1]
    return passes.Passes(**fields)


@pytest.mark.parametrize("some", [False, True])
def test_passes_are_at_least_those_of_the_graph(some: bool) -> None:
    require("sdpa")
    D, ratio, B, K, U = 48, 4.5, 3, 11, 5
    found = [g for grad in (False, True) for g in graphs(some, grad, D, 4, ratio, B, K, U)]
    kinds = [kind for kind in passes.COUNTED if kind.endswith("some rows") == some]
    for kind, graph in zip(kinds, found, strict=True):
        assert least(graph, B * K, B * U, D, int(ratio * D)) == passes.LEAST[kind], kind
        counted, fewest = passes.COUNTED[kind], passes.LEAST[kind]
        for field in ("width", "hidden", "wanted_width", "wanted_hidden"):
            assert getattr(fewest, field) <= getattr(counted, field) <= 2 * getattr(fewest, field), (kind, field)


@needs_gpu
def test_passes_are_those_of_the_compiled_code() -> None:
    assert passes.count(384, 12) == passes.COUNTED
