"""What a transformer and an MLP cost: FLOPs, and bytes that their forward keeps for the backward.

FLOPs are those of the matrix products, 2 per multiply-add. A block of width D and hidden width F on n tokens:
    n (8 D^2 + 4 D F)    queries, keys, values 6 D^2, output 2 D^2, the two layers of the MLP 4 D F
    + 4 n^2 D            scores and their product with the values
A backward costs twice its forward: the gradients of input and weight. Pixels need no gradient.

A block keeps 8 D + 2 F values per token (its input, two norms' outputs, q, k, v, attention's output, the first sum,
both sides of the GELU), and 4 + H statistics in fp32; with activation checkpointing only its input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from jepa.config.schema import Config, Size


class Kept(NamedTuple):
    """Patches per image, of a step or of the mean step: in a context, in a target block, and output by the target
    encoder. Without masks all are the image's."""

    context: float
    target: float
    rows: float


@dataclass(frozen=True)
class Held:
    """Bytes of activations: at their peak; when only the encoder's are left; and what stays until the end."""

    peak: float
    encoder: float
    features: float


def hidden(size: Size) -> int:
    """Width of the MLPs' hidden layer."""
    return int(size.embed_dim * size.mlp_ratio)


def blocks_flops(size: Size, tokens: float, wanted: float | None = None) -> float:
    """Forward of all blocks on one sequence. `wanted`: how many tokens the last block outputs; None: all. It then costs
    4 n D^2 + u (4 D^2 + 4 D F) + 4 u n D for u of n tokens."""
    D, F = size.embed_dim, hidden(size)
    block = tokens * (8 * D * D + 4 * D * F) + 4 * tokens**2 * D
    if wanted is None:
        return size.depth * block
    return (size.depth - 1) * block + 4 * tokens * D * D + wanted * (4 * D * D + 4 * D * F + 4 * tokens * D)


def embedding_flops(config: Config) -> float:
    """Forward of the patch embedding on one patch."""
    return 2 * 3 * config.mask.patch_size**2 * config.vit.embed_dim


def encoder_flops(config: Config, tokens: float) -> float:
    """Forward and backward of the encoder on one image, or part of it, of which it sees `tokens` patches."""
    return 2 * tokens * embedding_flops(config) + 3 * blocks_flops(config.vit, tokens)


def mlp_flops(widths: Sequence[int]) -> float:
    """Forward of linear layers on one row: the width of the input, then those of their outputs."""
    return sum(2 * n * m for n, m in pairwise(widths))


def block_bytes(of: Size, size: int) -> float:
    """Bytes that a block keeps per token; `size` of a value."""
    return size * (8 * of.embed_dim + 2 * hidden(of)) + 4 * (4 + of.num_heads)


def blocks_bytes(config: Config, of: Size, tokens: float, number: int, size: int) -> float:
    """Bytes that `number` blocks keep."""
    return tokens * number * (size * of.embed_dim if config.engine.activation_checkpointing else block_bytes(of, size))


def encoder_bytes(config: Config, tokens: float, size: int) -> float:
    """Bytes that the encoder keeps for `tokens` patches."""
    vit = config.vit
    ends = size * tokens * (3 * config.mask.patch_size**2 + 2 * vit.embed_dim)
    return ends + blocks_bytes(config, vit, tokens, vit.depth, size)


def mlp_bytes(widths: Sequence[int], rows: float, size: int) -> float:
    """Bytes that linear layers with batch norm and ReLU between them keep: a layer's input; in fp32 a batch norm's
    centred and normed rows, and the last output."""
    first, *between, last = widths
    return rows * (size * (first + 2 * sum(between)) + 4 * (2 * sum(between) + last))


def views_held(
    config: Config, sizes: Sequence[int], mlps: Sequence[Sequence[int]], size: int, of_loss: float = 0.0
) -> Held:
    """Bytes that a micro-batch keeps of views with `sizes` pixels a side, whose mean features go through `mlps` (their
    layers' output widths) one after another, to a loss that keeps `of_loss` itself; also the images, and the gradients
    of the encoder's last block."""
    B, D = config.data.batch_size, config.vit.embed_dim
    tokens = B * sum((pixels // config.mask.patch_size) ** 2 for pixels in sizes)
    encoder, behind = encoder_bytes(config, tokens, size), of_loss
    width = D
    for widths in mlps:
        behind += mlp_bytes((width, *widths), B * len(sizes), size)
        width = widths[-1]
    first = float(size * tokens * (2 * D + hidden(config.vit)))
    if config.engine.activation_checkpointing:  # the block at hand is computed again
        first += tokens * block_bytes(config.vit, size)
    images = B * 3 * sum(pixels**2 for pixels in sizes) * (1 + config.data.prefetch)
    return Held(peak=encoder + max(behind, first) + images, encoder=encoder + first + images, features=images)
