"""Bytes that a rank holds at the peak of a step, computed from the config alone. `train.py --dry-run` prints them.

The peak is in the backward or in the update. `benchmarks/memory.py --measure` holds all but the activations against
real CPU ranks, and tests/nullgpu the whole against torch's allocator.
"""

from dataclasses import dataclass

from jepa.config.schema import Config
from jepa.model.cost import Kept, hidden

from .budget import mean_tokens, parameters
from .zero import BUCKET, LIVE

WORKSPACE = 2**26  # bytes: 32 MiB each for cuBLAS and cuBLASLt on Hopper; less elsewhere


@dataclass(frozen=True)
class Memory:
    """Bytes per rank."""

    weights: float
    master: float  # fp32 copies of the weights
    moments: float  # AdamW's two, fp32
    ema: float  # the averages, fp32
    teacher: float  # the averages in the training precision
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
    largest_group = max(count.averaged, count.total - count.averaged)
    read_as = size if stage in (1, 2) and config.engine.optimizer == "adamw_ema" else 4  # bytes per element
    read = read_as * (largest_group if stage else count.total) / sharded

    standing = {
        "weights": size * count.total / (ranks if stage == 3 else 1),
        "master": 0 if stage == 0 and size == 4 else 4 * count.total / sharded,
        "moments": 8 * count.total / sharded,
        "ema": 4 * count.averaged / sharded,
        "teacher": size * count.averaged * (2 if stage == 3 and ranks > 1 else 1)
        + (in_fp8 if config.engine.target_precision == "fp8" else 0),
        "buckets": size * min(BUCKET, count.total) if stage == 3 or (stage and ranks > 1) else 0,
        "workspace": WORKSPACE,
    }
    gathered = size * min(count.total, LIVE) if stage == 3 and ranks > 1 else 0
    gradients *= 2 if stage == 2 and accumulates else 1
    update = size * count.total / sharded + (0 if stage == 0 and size == 4 else read)

    held = config.method.activations(config, Kept(*(tokens or mean_tokens(config))), size, ranks)
    before = gradients if accumulates else 0
    # From there, activations make room for gradients: first the predictor's, then the encoder's.
    encoders_turn = held.encoder + max(before, gradients * (1 - count.parts["encoder"] / count.total))
    backward = gathered + max(held.peak + before, encoders_turn, held.features + gradients)
    return Memory(
        **standing,
        gathered=gathered,
        gradients=gradients,
        activations=held.peak,
        update=update,
        total=sum(standing.values()) + max(backward, update),
    )
