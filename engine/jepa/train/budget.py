"""Parameters, kept tokens and FLOPs of a run, computed from its config alone.

FLOPs are those of the matrix products, 2 per multiply-add. A block of width D and hidden width F on n tokens:
    n (8 D^2 + 4 D F)    queries, keys, values 6 D^2, output 2 D^2, the two layers of the MLP 4 D F
    + 4 n^2 D            scores and their product with the values
A backward costs twice its forward: the gradients of input and weight. Pixels need no gradient.
With engine.skip_unread a last block on n tokens, u of them needed, costs 4 n D^2 + u (4 D^2 + 4 D F) + 4 u n D.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from jepa.config.schema import Config, Size
from jepa.data.masks import MaskSpec, sample_masks
from jepa.model.layout import target_rows


class Kept(NamedTuple):
    """Patches per image, of a step or of the mean step: in a context, in a target block, and output by the target
    encoder."""

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
    lengths, rows = _sampled(config.mask_spec, config.data.batch_size)
    contexts, targets = zip(*lengths, strict=True)
    return Kept(fmean(contexts), fmean(targets), rows)


def longest_tokens(config: Config) -> Kept:
    """The lengths of the micro-batch with the most context patches, of those that `mean_tokens` samples, and the mean
    rows."""
    lengths, rows = _sampled(config.mask_spec, config.data.batch_size)
    return Kept(*max(lengths), rows)


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


@lru_cache
def _sampled(spec: MaskSpec, batch: int) -> tuple[list[tuple[float, float]], float]:
    """Patches in a context and in a target, micro-batch by micro-batch, and the mean of the rows they need."""
    lengths, rows = [], []
    for step in range(max(16, 2**17 // batch)):
        masks = sample_masks(spec, seed=0, step=step, first=0, batch=batch)
        lengths.append((masks.context.numel() / (spec.num_enc_masks * batch), float(masks.target.shape[-1])))
        if step % 8 == 0:  # counting these takes longer than sampling
            rows.append(target_rows(masks.target, spec.height * spec.width)[2])
    return lengths, fmean(rows)


def hidden(vit: Size) -> int:
    """Width of the MLPs' hidden layer."""
    return int(vit.embed_dim * vit.mlp_ratio)


def _block_parameters(vit: Size) -> int:
    D, F = vit.embed_dim, hidden(vit)
    return (3 * D * D + 3 * D) + (D * D + D) + (2 * D * F + F + D) + 4 * D  # qkv, proj, MLP, two norms


def _block_flops(vit: Size, tokens: float, wanted: float | None = None) -> float:
    """Forward of all blocks on one sequence. `wanted`: how many tokens the last block outputs; None: all."""
    D, F = vit.embed_dim, hidden(vit)
    block = tokens * (8 * D * D + 4 * D * F) + 4 * tokens**2 * D
    if wanted is None:
        return vit.depth * block
    return (vit.depth - 1) * block + 4 * tokens * D * D + wanted * (4 * D * D + 4 * D * F + 4 * tokens * D)
