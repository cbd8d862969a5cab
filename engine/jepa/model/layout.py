"""The row indices that the model reads, from a micro-batch's masks: made on the CPU, moved asynchronously.

Legend: B images, N patches, M target blocks of Kt patches, U rows per image for its targets.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from jepa.config.schema import Config
from jepa.data.masks import Masks, sample_masks, thin
from jepa.ranks.device import to_device
from jepa.ranks.distributed import Ranks

from .packed import ROUNDING, Ragged, pack


class Tokens(NamedTuple):
    """The rows of a micro-batch, on the device."""

    context: Tensor | list[Ragged]
    """int64 [E, B, Kc], or the packed rows of each context mask."""
    target_MBK: Tensor
    """The patches of the targets, int64 [M, B, Kt]."""
    teacher: tuple[Tensor, ...]
    """The patches that the target encoder's last block computes, in groups; (): all."""
    places_MBK: Tensor
    """The positions of the targets in those rows."""
    mean_context: int
    """Patches in a context, on average."""


def masks_of(config: Config, ranks: Ranks, step: int, micro: int) -> Masks:
    """The masks of this rank's `micro`-th micro-batch of a step."""
    batch, _, whole = config.batch(ranks.world_size)
    first = (micro * ranks.world_size + ranks.rank) * batch
    cut, seed = (0, whole) if config.cut == "global" else None, config.engine.seed
    masks = sample_masks(config.mask_spec, seed=seed, step=step, first=first, batch=batch, cut=cut)
    if config.token_budget is None:
        return masks
    return thin(masks, config.token_budget - 1, seed=seed, step=step, first=first)  # one row is reserved for padding


def tokens(masks: Masks, config: Config, device: torch.device, *, whole: bool = False) -> Tokens:
    """`whole`: compute the features of all patches, not only of the targets, as the health metrics need them.

    The targets' rows are then still a group of their own, so that training stays bitwise the same.
    """
    target, N = masks.target, config.grid**2
    context: Tensor | list[Ragged]
    if masks.lengths is None:
        context = to_device(masks.context, device)
    else:
        parts, budget = masks.context.split(masks.lengths.sum(1).tolist()), config.token_budget
        unit = budget or (-(-target.shape[1] * N // ROUNDING) if device.type == "cuda" else 0)
        ragged = [pack(part, n, target, N, unit) for part, n in zip(parts, masks.lengths, strict=True)]
        context = [one.to(device) for one in ragged]
    mean = masks.context.numel() // (config.mask.num_enc_masks * target.shape[1])
    on_device = to_device(target, device)
    if not config.engine.skip_unread or config.needs_all_targets:
        return Tokens(context, on_device, (), on_device, mean)
    order, places, used = target_rows(target, N)
    groups = (order[:, :used], order[:, used:]) if whole else (order[:, :used],)
    return Tokens(
        context,
        on_device,
        tuple(to_device(rows, device) for rows in groups if rows.numel()),
        to_device(places, device),
        mean,
    )


def target_rows(target_MBK: Tensor, N: int) -> tuple[Tensor, Tensor, int]:
    """The rows that the targets need: a permutation [B, N] of each image's patches that starts with those in its
    targets; the targets' positions in it, [M, B, Kt]; and U, the most rows that any image needs. Images that need fewer
    are filled up with other patches of their own, so that no row is computed twice."""
    M, B, Kt = target_MBK.shape
    flat = target_MBK.transpose(0, 1).reshape(B, M * Kt)
    needed = torch.zeros(B, N, dtype=torch.int64).scatter_(1, flat, 1)
    count = needed.sum(1, keepdim=True)
    place = torch.where(needed.bool(), needed.cumsum(1) - 1, count + (1 - needed).cumsum(1) - 1)
    order = torch.empty_like(place).scatter_(1, place, torch.arange(N).expand(B, N))
    return order, place.gather(1, flat).view(B, M, Kt).transpose(0, 1).contiguous(), int(count.max())
