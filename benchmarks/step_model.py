"""GPU time of a training step by category, from counted work: a MODEL on paper, against which GPU runs are held.

`scaling.py` prints it. Counted: the model's matrix products at the mean tokens of its masks, and the tiles they are cut
into; attention, its head dim and lengths padded as FlashAttention-2 pads them; what compiled blocks move between the
products (`passes.py`); the bytes of the optimizer, of our ops and of the collectives. Assumed: the rates in `Gpu` and
the constants below it. Kernels run one after another; caches, clocks and the loading of images are not modelled.

A lever is a change of the implementation that the model can price. Only `fp8` changes results.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil
from typing import Any

from passes import COUNTED, LEAST, Passes

from jepa.config.schema import Config, Size
from jepa.data.masks import MaskSpec, sample_masks
from jepa.train.budget import flops_per_image, mean_tokens, parameters


@dataclass(frozen=True)
class Gpu:
    """Data sheet: dense bf16 FLOP/s, bytes/s of memory, of NVLink each way and of one InfiniBand adapter, and SMs.

    Assumed: the share of the peak that a product reaches whose tiles fill all SMs, and FlashAttention-2's on padded
    work, forward and backward. `fp8`: the rate of products in FP8 over that in bf16; `hopper`: the shares of attention
    kernels written for Hopper; None: the GPU cannot run them.
    """

    name: str
    peak: float
    memory: float
    nvlink: float
    adapter: float
    sms: int
    products: float
    attention: tuple[float, float]
    fp8: float | None
    hopper: tuple[float, float] | None


GPUS = (
    # Products: assumed. Attention: below the 73 % and 63 % that FlashAttention-2's paper reports for long sequences.
    Gpu("A100 80GB SXM", 312e12, 2039e9, 300e9, 25e9, 108, 0.86, (0.60, 0.50), None, None),
    # Products: 790 of 989 TFLOP/s, measured on an H200; FP8, assumed, has twice the peak and reaches less of it.
    # Attention: FlashAttention-3's paper has version 2 at 35 % and its own at up to 75 %, for long sequences.
    Gpu("H200 SXM", 989e12, 4800e9, 450e9, 50e9, 132, 790 / 989, (0.35, 0.30), 1.7, (0.60, 0.50)),
)
MEMORY_SHARE = 0.83  # of the data sheet's bandwidth that a long kernel reaches; 4.0 of 4.8 TB/s
LINK_SHARE = 0.7  # of a link that a collective reaches, as scaling.py's --efficiency
PER_MACHINE = 8  # GPUs, one adapter each
TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.9}  # of a product's output, with relative rates
EDGE = 64  # terms of the sum that starting and ending a tile costs
SPLITS = (1, 2, 4, 8, 16, 32)  # of a product's sum; cuBLAS is assumed to take the fastest
HEADS = (32, 64, 96, 128, 160, 192, 256)  # head dims that FlashAttention-2 has kernels for
FORWARD_TILES = {32: (128, 128), 64: (128, 128)}  # FlashAttention-2's queries x keys; wider heads: 128 x 64
BACKWARD_TILES = {32: (128, 128), 64: (128, 128), 96: (64, 128), 128: (64, 128)}  # wider heads: 64 x 64
LAUNCH = 60e-3 / 2200  # host seconds per launch: 50 to 70 ms for H/14's 2,200, seen on a slow host without a GPU
OUTSIDE = 8  # launches per trained block outside its graphs: within 10 % of the 2,202 (H/14), 898 (B/16) and 2,548
# (g/16) counted at the null GPU (tests/nullgpu)
MASKS = 64  # sampled micro-batches, whose lengths attention is padded for
ALONE, BUCKET, SHARD = 6, 12, 10  # bytes per parameter, see gradient_bytes

LEVERS = {
    "fp8": "target encoder's products in FP8, their inputs converted by the kernels that write them",
    "gelu": "exact GELU and its gradient in the products' epilogues",
    "bias sums": "bias gradients summed in the products' epilogues",
    "packed dqkv": "attention's backward writes one matrix: no copy that joins dq, dk and dv",
    "perfect fusion": "between products everything is read and written once (passes.LEAST)",
    "no tails": "products without idle SMs in their last wave (stream-K)",
    "native heads": "attention without padding of the head dim",
    "hopper attention": "kernels written for Hopper, at FlashAttention-3's share of the peak",
    "flat gradients": "gradients written into the optimizer's flat buffer, their norm taken in the backward",
    "reduce_scatter": "gradients reduced to their owner only",
    "overlap": "gradients reduced during the backward (engine.overlap_comm), as far as it is long enough",
}


@dataclass(frozen=True)
class Row:
    """One category: the work and its time. `useful`: the FLOPs in it that the budget counts."""

    name: str
    unit: str
    work: float
    seconds: float
    useful: float = 0.0


@dataclass(frozen=True)
class Product:
    """[m, k] times [k, n], `times` times."""

    m: float
    n: float
    k: float
    times: int = 1

    @property
    def flops(self) -> float:
        return 2 * self.m * self.n * self.k * self.times

    def seconds(self, gpu: Gpu, on: frozenset[str] = frozenset(), splits: Iterable[int] = SPLITS) -> float:
        """The fastest tile and split, or the time to move the three matrices if that is longer."""
        rate, memory = gpu.peak * gpu.products / gpu.sms, gpu.memory * MEMORY_SHARE
        moved = 2 * (self.m * self.k + self.k * self.n + self.m * self.n) / memory
        fastest = float("inf")
        for (tall, wide), relative in TILES.items():
            for parts in splits:
                tiles = ceil(self.m / tall) * ceil(self.n / wide) * parts
                waves = tiles / gpu.sms if "no tails" in on else ceil(tiles / gpu.sms)
                partial = (8 * parts + 2) * self.m * self.n / memory if parts > 1 else 0  # fp32, written and read
                fastest = min(fastest, waves * 2 * tall * wide * (self.k / parts + EDGE) / rate / relative + partial)
        return self.times * max(fastest, moved)


def linear(rows: float, inputs: int, outputs: int, times: int = 1, passes: str = "fiw") -> list[Product]:
    """The products of a linear layer: f forward, i gradient of the input, w gradient of the weight."""
    every = {
        "f": Product(rows, outputs, inputs, times),
        "i": Product(rows, inputs, outputs, times),
        "w": Product(outputs, inputs, rows, times),
    }
    return [every[letter] for letter in passes]


@dataclass(frozen=True)
class Attention:
    """`sequences` with H heads of C channels; `lengths`: samples of their (queries, keys), `mean`: the budget's."""

    sequences: float
    H: int
    C: int
    lengths: tuple[tuple[float, float], ...]
    mean: tuple[float, float]
    backward: bool
    times: int = 1

    @property
    def flops(self) -> float:
        """Two products forward; the budget counts four backward."""
        Kq, K = self.mean
        return self.times * (3 if self.backward else 1) * 4 * self.sequences * self.H * self.C * Kq * K

    def padded(self, native: bool = False) -> tuple[float, float]:
        """FLOPs of the forward and of the backward, which computes the scores again: five products."""
        C = self.C if native else next(width for width in HEADS if width >= self.C)
        kernel = next(width for width in HEADS if width >= self.C)
        tiles = FORWARD_TILES.get(kernel, (128, 64)), BACKWARD_TILES.get(kernel, (64, 64))
        areas = [
            sum(ceil(Kq / rows) * rows * ceil(K / columns) * columns for Kq, K in self.lengths) / len(self.lengths)
            for rows, columns in tiles
        ]
        one = 2 * self.sequences * self.H * C * self.times
        return 2 * one * areas[0], 5 * one * areas[1] if self.backward else 0.0

    def moved(self) -> tuple[float, float]:
        """Bytes. Backward: q, k, v, o, dO twice, dq, dk, dv; and dq summed in fp32: cleared, read and written, read."""
        Kq, K = self.mean
        queries, keys = (2 * self.sequences * self.H * self.C * length * self.times for length in (Kq, K))
        return 2 * queries + 2 * keys, (5 + 8) * queries + 4 * keys if self.backward else 0.0

    def seconds(self, gpu: Gpu, on: frozenset[str] = frozenset()) -> float:
        shares = gpu.hopper if "hopper attention" in on and gpu.hopper else gpu.attention
        work = zip(self.padded("native heads" in on), self.moved(), shares, strict=True)
        return sum(max(flops / gpu.peak / share, moved / gpu.memory / MEMORY_SHARE) for flops, moved, share in work)


@dataclass(frozen=True)
class Part:
    """The blocks of one network. `passes`: (a key of COUNTED, rows, rows that are output, times)."""

    name: str
    width: int
    hidden: int
    products: list[Product]
    attention: list[Attention]
    passes: list[tuple[str, float, float, int]]

    def moved(self, on: frozenset[str]) -> float:
        """Bytes between the products, of 16-bit values."""
        return 2 * sum(
            times * fewer(kind, on).values(rows, wanted, self.width, self.hidden)
            for kind, rows, wanted, times in self.passes
        )

    @property
    def launches(self) -> int:
        return sum(
            times * (COUNTED[kind].launches + OUTSIDE * kind.startswith("backward"))
            for kind, _, _, times in self.passes
        )


def fewer(kind: str, on: frozenset[str]) -> Passes:
    """The passes that the levers leave. An epilogue still writes what the backward needs, and reads it there."""
    backward, some, least = kind.startswith("backward"), kind.endswith("some rows"), "perfect fusion" in on
    before = (LEAST if least else COUNTED)[kind]
    width = wanted = hidden = 0
    if "gelu" in on:
        hidden += 1 if kind.startswith("forward") else 2
    if "bias sums" in on and backward and not least:  # of the MLP's hidden values; of its output, proj and qkv
        hidden += 1
        width, wanted = (2, 3) if some else (5, 0)
    if "packed dqkv" in on and backward:
        width += 4 if some else 6
    if some:
        return Passes(before.width - width, 0, before.wanted_width - wanted, before.wanted_hidden - hidden)
    return Passes(before.width - width, before.hidden - hidden)


def blocks(
    name: str, size: Size, sequences: float, lengths: list[tuple[float, float]], mean: tuple[float, float],
    some: bool, trained: bool,
) -> Part:  # fmt: skip
    """`lengths`, `mean`: (rows needed, all rows) of a sequence; `some`: the last block outputs only those needed."""
    D, F, H = size.embed_dim, int(size.embed_dim * size.mlp_ratio), size.num_heads
    whole, wanted, n = size.depth - some, sequences * mean[0], sequences * mean[1]
    which = "fiw" if trained else "f"
    products = [
        *linear(n, D, 3 * D, whole, which),
        *linear(n, D, D, whole, which),
        *linear(n, D, F, whole, which),
        *linear(n, F, D, whole, which),
    ]
    full = tuple((K, K) for _, K in lengths)
    attention = [Attention(sequences, H, D // H, full, (mean[1], mean[1]), trained, whole)]
    kinds = ("forward", "backward") if trained else ("inference",)
    passes = [(kind, n, n, whole) for kind in kinds]
    if some:
        products += [
            *linear(n, D, 2 * D, 1, which),
            *linear(wanted, D, D, 2, which),
            *linear(wanted, D, F, 1, which),
            *linear(wanted, F, D, 1, which),
        ]
        attention.append(Attention(sequences, H, D // H, tuple(lengths), mean, trained))
        passes += [(f"{kind}, some rows", n, wanted, 1) for kind in kinds]
    return Part(name, D, F, products, attention, passes)


@lru_cache
def lengths(spec: MaskSpec, batch: int) -> tuple[tuple[float, float], ...]:
    """(context, target) patches of sampled micro-batches; of every image, if contexts are packed."""
    found: list[tuple[float, float]] = []
    for step in range(MASKS):
        masks = sample_masks(spec, seed=0, step=step, first=0, batch=batch)
        target = masks.target.shape[-1]
        contexts = [masks.context.shape[-1]] if masks.lengths is None else masks.lengths.flatten().tolist()
        found += [(context, target) for context in contexts]
    return tuple(found)


def predictive(config: Config) -> Any:
    """The config's method. Raises ValueError unless it predicts masked blocks: others take steps of another shape."""
    if not config.method.masked:
        raise ValueError(f"this model is of steps that predict masked blocks; {config.loss.objective} takes others")
    return config.method


def parts(config: Config) -> list[Part]:
    """Target encoder, context encoder and predictor for one micro-batch."""
    B, E, M, N = config.data.batch_size, config.mask.num_enc_masks, config.mask.num_pred_masks, config.grid**2
    context, target, rows = mean_tokens(config)
    skip, sampled = config.engine.skip_unread, lengths(config.mask_spec, B)
    fewer_targets = skip and not predictive(config).reads_all_targets(config)
    joined = [(Kt, Kc + Kt) for Kc, Kt in sampled]
    seen = [(Kc, Kc) for Kc, _ in sampled]
    return [
        blocks("target encoder", config.vit, B, [(rows, N)], (rows, N), fewer_targets, False),
        blocks("context encoder", config.vit, B * E, seen, (context, context), False, True),
        blocks("predictor", config.predictor, B * E * M, joined, (target, context + target), skip, True),
    ]


def outer_products(config: Config) -> list[Product]:
    """Patch embeddings, the predictor's first and last layer, the projector and its covariances."""
    B, E, M, N = config.data.batch_size, config.mask.num_enc_masks, config.mask.num_pred_masks, config.grid**2
    D, Dp, patch = config.vit.embed_dim, config.predictor.embed_dim, 3 * config.mask.patch_size**2
    context, target, _ = mean_tokens(config)
    products = [
        *linear(B * N, patch, D, 1, "f"),
        *linear(B * context, patch, D, E, "fw"),
        *linear(B * context, D, Dp, E),
        *linear(B * M * target, Dp, D, E),
    ]
    widths = predictive(config).projector_widths(config)
    for inputs, outputs in pairwise(widths):
        products += linear(B * M, inputs, outputs, E)
    if config.method.couples_images(config):  # forward and backward, per block
        products += [Product(widths[-1], widths[-1], B, E * M), Product(B, widths[-1], widths[-1], E * M)]
    return products


def ops_bytes(config: Config) -> float:
    """What runs between the networks, eager or in jepa_kernels: 16-bit values read and written, pixels, targets."""
    B, E, M, N = config.data.batch_size, config.mask.num_enc_masks, config.mask.num_pred_masks, config.grid**2
    D, Dp, patch = config.vit.embed_dim, config.predictor.embed_dim, 3 * config.mask.patch_size**2
    context, target, rows = mean_tokens(config)
    values = N * (patch * 1.5 + 2 * D)  # patchify reads bytes and writes values; positions are added
    values += rows * 6 * D  # gathered for the last block, normed, joined
    # Context encoder: patches, positions gathered and added, norm forward and backward, a bias gradient.
    values += E * context * (patch * 1.5 + (5 + 7 + 1) * D)
    # Predictor: tokens assembled, forward and backward; the last block's rows sliced out of x and into its gradient.
    values += E * (3 * context * Dp + M * (context + target) * (2 + 4) * Dp + M * target * (2 + 7) * Dp)
    # Bias gradient, prediction_loss (3, counted from its kernels), the mean that is logged; C-JEPA's mean and gradient.
    values += E * M * target * (5 + (4 if len(config.method.terms) > 1 else 0)) * D
    return 2 * B * values


def optimizer_bytes(config: Config) -> float:
    """AdamWEMA: reads a 16-bit gradient, reads and writes weight and moments, writes the 16-bit weight; the encoder's
    average is read and written, and its 16-bit copy written."""
    count = parameters(config)
    return 28 * count.total + 10 * count.averaged


def gradient_bytes(config: Config, ranks: int) -> float:
    """16-bit gradients on their way to the optimizer. One rank: the norm, and flattened. More: copied into a bucket,
    flattened and divided; the rank's shard copied out, its norm, flattened."""
    return parameters(config).total * (ALONE if ranks == 1 else BUCKET + SHARD / ranks)


@dataclass(frozen=True)
class Step:
    """A modelled step of one micro-batch on each of `ranks` GPUs."""

    config: Config
    gpu: Gpu
    ranks: int
    rows: list[Row]
    launches: int

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def host_seconds(self) -> float:
        return self.launches * LAUNCH

    @property
    def images_per_second(self) -> float:
        return self.config.data.batch_size / self.seconds

    @property
    def mfu(self) -> float:
        return self.images_per_second * sum(flops_per_image(self.config).values()) / self.gpu.peak

    @property
    def limit(self) -> float:
        """Images/s at the data sheet's peak."""
        return self.gpu.peak / sum(flops_per_image(self.config).values())


Wire = Callable[[Config, int], dict[str, float]]  # bytes that a rank sends, by kind


def step(config: Config, gpu: Gpu, wire: Wire | None = None, ranks: int = 1, on: Iterable[str] = ()) -> Step:
    """The rows of a step with the levers `on`. Raises ValueError for a lever that is not in LEVERS."""
    on = frozenset(on)
    if unknown := on - LEVERS.keys():
        raise ValueError(f"no lever {sorted(unknown)}; there are {', '.join(LEVERS)}")
    memory, networks, rows = gpu.memory * MEMORY_SHARE, parts(config), list[Row]()

    def computed(name: str, work: list[Product], rate: float = 1.0) -> None:
        flops = sum(p.flops for p in work)
        rows.append(Row(name, "FLOP", flops, sum(p.seconds(gpu, on) for p in work) / rate, flops))

    for part in networks:
        fast = gpu.fp8 if part.name == "target encoder" and "fp8" in on and gpu.fp8 else 1.0
        computed(f"products, {part.name}", part.products, fast)
    computed("products, embeddings and rest", outer_products(config))
    for part in networks:
        work = sum(sum(a.padded("native heads" in on)) for a in part.attention)
        useful = sum(a.flops for a in part.attention)
        rows.append(
            Row(f"attention, {part.name}", "FLOP", work, sum(a.seconds(gpu, on) for a in part.attention), useful)
        )
    moved = {f"passes, {part.name}": part.moved(on) for part in networks}
    moved["our ops, norms, positions"] = ops_bytes(config)
    moved["AdamW and average"] = optimizer_bytes(config) / (ranks if config.engine.zero_stage else 1)
    moved["gradients to the optimizer"] = gradient_bytes(config, ranks) * ("flat gradients" not in on or ranks > 1)
    rows += [Row(name, "byte", work, work / memory) for name, work in moved.items()]
    if wire and ranks > 1:
        sent = wire(config, ranks)
        gradients = sent["gradients"] / (2 if "reduce_scatter" in on else 1)
        link = LINK_SHARE * (gpu.nvlink if ranks <= PER_MACHINE else min(gpu.nvlink, PER_MACHINE * gpu.adapter))
        hidden = backward_seconds(rows) if "overlap" in on else 0.0
        seconds = max(0.0, gradients / link - hidden) + (sum(sent.values()) - sent["gradients"]) / link
        rows.append(Row("links", "byte", sum(sent.values()) - sent["gradients"] + gradients, seconds))
    return Step(config, gpu, ranks, rows, sum(part.launches for part in networks))


def backward_seconds(rows: list[Row]) -> float:
    """At least: two thirds of the products of the two trained networks."""
    trained = ("products, context encoder", "products, predictor")
    return sum(row.seconds for row in rows if row.name in trained) * 2 / 3


def unsplit_seconds(config: Config, gpu: Gpu) -> float:
    """How much longer the predictor's products take if cuBLAS does not split their sums."""
    products = parts(config)[2].products
    return sum(p.seconds(gpu, splits=(1,)) - p.seconds(gpu) for p in products)
