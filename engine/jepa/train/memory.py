"""Bytes that a rank holds at the peak of a step, computed from the config alone. `train.py --dry-run` prints them.

The peak is in the backward or in the update. `benchmarks/memory.py --measure` holds all but the activations against
real CPU ranks, and tests/nullgpu the whole against torch's allocator.
"""

from dataclasses import dataclass

from jepa.config.schema import Config, Size

from .budget import Kept, hidden, mean_tokens, parameters
from .zero import BUCKET, LIVE

WORKSPACE = 2**26  # bytes: 32 MiB each for cuBLAS and cuBLASLt on Hopper; less elsewhere


@dataclass(frozen=True)
class Memory:
    """Bytes per rank."""

    weights: float
    master: float  # fp32 copies of the weights
    moments: float  # AdamW's two, fp32
    ema: float  # of the encoder, fp32
    teacher: float  # the target encoder's weights
    buckets: float  # DeepSpeed's communication buffer
    workspace: float  # of the matrix products
    gathered: float  # weights that ZeRO-3 has gathered for the active layers
    gradients: float
    activations: float  # at the beginning of the backward
    update: float  # gradients during the optimizer step, and the copy of them that it reads
    total: float


def memory_per_rank(config: Config, world_size: int, tokens: tuple[float, ...] = ()) -> Memory:
    """Memory in a step that keeps `tokens` (the fields of `Kept`; default: as in the mean step).

    ZeRO shards master weights, moments and EMA from stage 1, gradients from stage 2 and weights from stage 3.
    During the update a rank holds only its shard of the gradients at stage 1 too, and reads one param group at a time.
    At stage 2 a micro-batch's shard exists alongside the accumulated one. Stage 3 gathers the active layers' weights.
    Every rank holds the whole teacher, twice at stage 3, where its weights cannot be views of the all-gather buffer.
    fp8 targets take another byte per weight of its blocks' linear layers and 4 per output.
    """
    stage, ranks, count = config.engine.zero_stage, world_size, parameters(config)
    size = 2 if config.precision == "bf16" else 4
    D, F = config.vit.embed_dim, hidden(config.vit)
    in_fp8 = config.vit.depth * (4 * D * D + 2 * D * F + 4 * (5 * D + F))
    sharded = ranks if stage else 1
    accumulates = config.batch(ranks).accumulation > 1
    gradients = size * count.total / (ranks if stage >= 2 else 1)
    largest_group = max(count.encoder, count.total - count.encoder)
    read_as = size if stage in (1, 2) and config.engine.optimizer == "adamw_ema" else 4  # bytes per element
    read = read_as * (largest_group if stage else count.total) / sharded

    standing = {
        "weights": size * count.total / (ranks if stage == 3 else 1),
        "master": 0 if stage == 0 and size == 4 else 4 * count.total / sharded,
        "moments": 8 * count.total / sharded,
        "ema": 4 * count.encoder / sharded,
        "teacher": size * count.encoder * (2 if stage == 3 and ranks > 1 else 1)
        + (in_fp8 if config.engine.target_precision == "fp8" else 0),
        "buckets": size * min(BUCKET, count.total) if stage == 3 or (stage and ranks > 1) else 0,
        "workspace": WORKSPACE,
    }
    gathered = size * min(count.total, LIVE) if stage == 3 and ranks > 1 else 0
    gradients *= 2 if stage == 2 and accumulates else 1
    update = size * count.total / sharded + (0 if stage == 0 and size == 4 else read)

    held = _activations(config, Kept(*(tokens or mean_tokens(config))), size, ranks)
    before = gradients if accumulates else 0
    # From there, activations make room for gradients: first the predictor's, then the encoder's.
    encoders_turn = held.encoder + max(before, gradients * (1 - count.encoder / count.total))
    backward = gathered + max(held.peak + before, encoders_turn, held.features + gradients)
    return Memory(
        **standing,
        gathered=gathered,
        gradients=gradients,
        activations=held.peak,
        update=update,
        total=sum(standing.values()) + max(backward, update),
    )


@dataclass(frozen=True)
class _Held:
    """Bytes of activations: at their peak; when only the encoder's are left; and the target features alone."""

    peak: float
    encoder: float
    features: float


def saved(config: Config, tokens: Kept, size: int) -> tuple[float, float]:
    """Bytes that the forward of the encoder, and of what follows it, keeps for the backward, compiled or not; `size` of
    a value.

    A block keeps 8 D + 2 F values per token (its input, two norms' outputs, q, k, v, attention's output, the first sum,
    both sides of the GELU), and 4 + H statistics in fp32. A last block that outputs few rows keeps 4 D of its input's
    and 6 D + 2 F of theirs. With checkpointing a block keeps its input.
    """
    vit, narrow, again = config.vit, config.predictor, config.engine.activation_checkpointing
    D, Dp, M = vit.embed_dim, narrow.embed_dim, config.mask.num_pred_masks
    images = config.data.batch_size * config.mask.num_enc_masks
    contexts, targets = images * tokens.context, images * M * tokens.target
    sequences = M * contexts + targets

    def blocks(of: Size, rows: float, number: int) -> float:
        return rows * number * (size * of.embed_dim if again else _block(of, size))

    encoder = size * contexts * (3 * config.mask.patch_size**2 + 2 * D) + blocks(vit, contexts, vit.depth)
    if config.engine.skip_unread:
        last = sequences * Dp + targets * Dp if again else sequences * 4 * Dp + targets * (6 * Dp + 2 * hidden(narrow))
        predictor = blocks(narrow, sequences, narrow.depth - 1) + size * last
    else:
        predictor = blocks(narrow, sequences, narrow.depth)
    predictor += size * targets * (2 * Dp + D)  # the last norm, and the loss's gradient
    if config.has_projector:  # a layer's input; in fp32 a batch norm's centred and normed rows, and the last output
        *between, last_width = config.projector_widths
        predictor += images * M * (size * (D + 2 * sum(between)) + 4 * (2 * sum(between) + last_width))
    return encoder, predictor


def _block(of: Size, size: int) -> float:
    """Bytes that a block keeps per token."""
    return size * (8 * of.embed_dim + 2 * hidden(of)) + 4 * (4 + of.num_heads)


def _activations(config: Config, tokens: Kept, size: int, ranks: int) -> _Held:
    """Also: the target features, the images, and the gradients that the first blocks of a backward need beside them."""
    B, M, N = config.data.batch_size, config.mask.num_pred_masks, config.grid**2
    D, F, narrow = config.vit.embed_dim, hidden(config.vit), config.predictor
    encoder, predictor = saved(config, tokens, size)
    features = size * B * D * (tokens.rows if config.engine.skip_unread and not config.needs_all_targets else N)
    images = B * 3 * config.data.crop_size**2 * (1 + config.data.prefetch)
    seen = B * config.mask.num_enc_masks
    predictors_first = size * seen * M * tokens.target * (D + narrow.embed_dim + hidden(narrow))
    encoders_first = size * seen * tokens.context * (2 * D + F)
    if config.engine.activation_checkpointing:  # the block at hand is computed again
        predictors_first += seen * M * (tokens.context + tokens.target) * _block(narrow, size)
        encoders_first += seen * tokens.context * _block(config.vit, size)
    # One rank computes the targets before anything else, several while they hold all that the predictor saved.
    teacher = size * B * N * (2 * D + 2 * F) + (encoder + predictor if ranks > 1 else 0)
    return _Held(
        peak=max(encoder + predictor + features + predictors_first, teacher) + images,
        encoder=encoder + features + encoders_first + images,
        features=features + images,
    )
