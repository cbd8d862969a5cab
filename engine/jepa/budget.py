"""Parameters, FLOPs and memory of a run, computed from its config alone. `train.py --dry-run` prints them.

FLOPs are those of the matrix products, 2 per multiply-add. A block of width D and hidden width F on n tokens:
    n (8 D^2 + 4 D F)    queries, keys, values 6 D^2, output 2 D^2, the two layers of the MLP 4 D F
    + 4 n^2 D            scores and their product with the values
A backward costs twice its forward: the gradients of input and weight. Pixels need no gradient.
With engine.skip_unread a last block on n tokens, u of them needed, costs 4 n D^2 + u (4 D^2 + 4 D F) + 4 u n D.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from json import dumps
from typing import NamedTuple

from .config import Config, Size
from .config_file import to_yaml
from .masks import MaskSpec, sample_masks
from .tokens import target_rows
from .zero import BUCKET, LIVE, deepspeed_config


class Kept(NamedTuple):
    """Mean patches per image: in a context, in a target block, and output by the target encoder."""

    context: float
    target: float
    rows: float


@dataclass(frozen=True)
class Parameters:
    """Trained parameters, without the fixed position embeddings and the target encoder."""

    encoder: int
    predictor: int
    projector: int

    @property
    def total(self) -> int:
        return self.encoder + self.predictor + self.projector


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per image."""

    target: float  # the target encoder's forward, on all patches
    context: float  # the encoder's forward and backward
    predictor: float  # forward and backward
    regularizer: float  # projector and covariances, forward and backward

    @property
    def total(self) -> float:
        return self.target + self.context + self.predictor + self.regularizer


@dataclass(frozen=True)
class Memory:
    """Bytes per rank. All but the activations are within 5 % of what `benchmarks/memory.py --measure` finds."""

    weights: float
    master: float  # fp32 copies of the weights
    moments: float  # AdamW's two, fp32
    ema: float  # of the encoder, fp32
    teacher: float  # the target encoder's weights
    buckets: float  # DeepSpeed's communication buffer
    gathered: float  # weights that ZeRO-3 has gathered for the active layers
    gradients: float
    activations: float  # an estimate
    update: float  # gradients during the optimizer step, and the copy of them that it reads

    @property
    def total(self) -> float:
        """The peak: in the backward, or in the update, when the activations have been freed."""
        kept = self.weights + self.master + self.moments + self.ema + self.teacher + self.buckets
        return kept + max(self.gathered + self.gradients + self.activations, self.update)


def parameters(config: Config) -> Parameters:
    D, Dp = config.vit.embed_dim, config.predictor.embed_dim
    patch = 3 * config.mask.patch_size**2
    encoder = patch * D + D + config.vit.depth * _block_parameters(config.vit) + 2 * D
    predictor = (
        (D * Dp + Dp) + Dp + config.predictor.depth * _block_parameters(config.predictor) + 2 * Dp + (Dp * D + D)
    )
    widths = (config.vit.embed_dim, *config.projector_widths)
    linear = sum(n * m + m for n, m in pairwise(widths))
    return Parameters(encoder, predictor, linear + sum(2 * m for m in widths[1:-1]))


def mean_tokens(config: Config) -> Kept:
    """Means over micro-batches of masks sampled as in the run."""
    return _mean_tokens(config.mask_spec, config.data.batch_size)


def flops_per_image(config: Config, tokens: tuple[float, ...] = ()) -> Flops:
    """`tokens`: the fields of `Kept`, or the first of them; the rest default to `mean_tokens`."""
    if len(tokens) < len(Kept._fields):
        tokens = (*tokens, *mean_tokens(config)[len(tokens) :])
    context, target, rows = tokens
    E, M, N = config.mask.num_enc_masks, config.mask.num_pred_masks, config.grid**2
    D, Dp = config.vit.embed_dim, config.predictor.embed_dim
    embed = 2 * 3 * config.mask.patch_size**2 * D  # of one patch
    widths = (D, *config.projector_widths)
    project = sum(2 * n * m for n, m in pairwise(widths))
    covariance = 2 * widths[-1] ** 2 if config.has_projector else 0
    skip = config.engine.skip_unread
    blocks = M * _block_flops(config.predictor, context + target, target if skip else None)
    return Flops(
        target=N * embed + _block_flops(config.vit, N, rows if skip and not config.needs_all_targets else None),
        context=E * (2 * context * embed + 3 * _block_flops(config.vit, context)),
        predictor=3 * E * (2 * context * D * Dp + blocks + M * 2 * target * Dp * D),
        regularizer=E * M * (3 * project + 2 * covariance),
    )


def memory_per_rank(config: Config, world_size: int, tokens: tuple[float, ...] = ()) -> Memory:
    """ZeRO shards master weights, moments and EMA from stage 1, gradients from stage 2 and weights from stage 3.

    During the update a rank holds only its shard of the gradients at stage 1 too, and reads one param group at a time.
    At stage 2 a micro-batch's shard exists alongside the accumulated one. Stage 3 gathers the active layers' weights.
    Every rank holds the whole teacher, twice at stage 3, where its weights cannot be views of the all-gather buffer.
    fp8 targets take another byte per weight of its blocks' linear layers and 4 per output.
    Activations: what the blocks save for the backward (8 D + 2 F values per token with fused attention, eager GELU and
    layer norms; with checkpointing, a block's input, and everything of one block), and the target encoder's widest
    tensors.
    """
    stage, ranks, count = config.engine.zero_stage, world_size, parameters(config)
    size = 2 if config.precision == "bf16" else 4
    context, target = (tokens or mean_tokens(config))[:2]

    def kept(vit: Size, rows: float) -> float:
        whole = 8 * vit.embed_dim + 2 * _hidden(vit)
        one = vit.depth * vit.embed_dim + whole if config.engine.activation_checkpointing else vit.depth * whole
        return rows * one * size

    D, F = config.vit.embed_dim, _hidden(config.vit)
    in_fp8 = config.vit.depth * (4 * D * D + 2 * D * F + 4 * (5 * D + F))
    B, E, M, N = config.data.batch_size, config.mask.num_enc_masks, config.mask.num_pred_masks, config.grid**2
    trained = kept(config.vit, B * E * context) + kept(config.predictor, B * E * M * (context + target))
    sharded = ranks if stage else 1
    gradients = size * count.total / (ranks if stage >= 2 else 1)
    largest_group = max(count.encoder, count.total - count.encoder)
    read_as = size if stage in (1, 2) and config.engine.optimizer == "adamw_ema" else 4  # bytes per element
    read = read_as * (largest_group if stage else count.total) / sharded
    return Memory(
        weights=size * count.total / (ranks if stage == 3 else 1),
        master=0 if stage == 0 and size == 4 else 4 * count.total / sharded,
        moments=8 * count.total / sharded,
        ema=4 * count.encoder / sharded,
        teacher=size * count.encoder * (2 if stage == 3 and ranks > 1 else 1)
        + (in_fp8 if config.engine.target_precision == "fp8" else 0),
        buckets=size * min(BUCKET, count.total) if stage == 3 or (stage and ranks > 1) else 0,
        gathered=size * min(count.total, LIVE) if stage == 3 and ranks > 1 else 0,
        gradients=gradients * (2 if stage == 2 and config.batch(ranks).accumulation > 1 else 1),
        activations=trained + B * N * (2 * D + 2 * F) * size,
        update=size * count.total / sharded + (0 if stage == 0 and size == 4 else read),
    )


def report(config: Config, world_size: int) -> str:
    """The whole YAML, what its nulls resolve to, DeepSpeed's JSON, and this file's tables. Raises ConfigError."""
    batch = config.batch(world_size)
    tokens = mean_tokens(config)
    counts, flops, memory = (
        parameters(config),
        flops_per_image(config, tokens),
        memory_per_rank(config, world_size, tokens),
    )
    ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
    return "\n\n".join(
        [
            to_yaml(config).rstrip(),
            "DeepSpeed: " + dumps(deepspeed_config(config, world_size, counts.total), indent=2),
            f"encoder {_size(config.vit)}; predictor {_size(config.predictor)}; {config.precision}; mask.cut "
            f"{config.cut}; blocks compiled on a GPU: {'yes' if config.compiles('cuda') else 'no'}",
            f"{batch.micro_batch} images x {batch.accumulation} accumulated x {ranks} = {batch.global_batch} per step\n"
            f"{config.grid**2} patches per image; on average {tokens.context:.1f} in a context, "
            f"{tokens.target:.1f} in a target, {tokens.rows:.1f} target encoder outputs needed",
            _table("parameters (million)", asdict(counts), counts.total, 1e6),
            _table("GFLOP per image", asdict(flops), flops.total, 1e9),
            _table(
                f"memory per rank (GiB), {ranks}, ZeRO {config.engine.zero_stage}, {config.precision}; "
                "activations are an estimate",
                asdict(memory),
                memory.total,
                2**30,
            ),
        ]
    )


def _size(vit: Size) -> str:
    return f"width {vit.embed_dim}, depth {vit.depth}, {vit.num_heads} heads, MLP width {_hidden(vit)}"


def _table(title: str, rows: dict[str, float], total: float, unit: float) -> str:
    return "\n".join([title, *(f"  {name:<12}{n / unit:>12.3f}" for name, n in {**rows, "total": total}.items())])


@lru_cache
def _mean_tokens(spec: MaskSpec, batch: int) -> Kept:
    contexts = targets = rows = 0.0
    steps = max(16, 2**17 // batch)
    for step in range(steps):
        masks = sample_masks(spec, seed=0, step=step, first=0, batch=batch)
        contexts += masks.context.numel() / (spec.num_enc_masks * batch)
        targets += masks.target.shape[-1]
        if step % 8 == 0:  # counting these takes longer than sampling
            rows += target_rows(masks.target, spec.height * spec.width)[2]
    return Kept(contexts / steps, targets / steps, rows / len(range(0, steps, 8)))


def _hidden(vit: Size) -> int:
    return int(vit.embed_dim * vit.mlp_ratio)


def _block_parameters(vit: Size) -> int:
    D, F = vit.embed_dim, _hidden(vit)
    return (3 * D * D + 3 * D) + (D * D + D) + (2 * D * F + F + D) + 4 * D  # qkv, proj, MLP, two norms


def _block_flops(vit: Size, tokens: float, wanted: float | None = None) -> float:
    """Forward of all blocks on one sequence. `wanted`: how many tokens the last block outputs; None: all."""
    D, F = vit.embed_dim, _hidden(vit)
    block = tokens * (8 * D * D + 4 * D * F) + 4 * tokens**2 * D
    if wanted is None:
        return vit.depth * block
    return (vit.depth - 1) * block + 4 * tokens * D * D + wanted * (4 * D * D + 4 * D * F + 4 * tokens * D)
