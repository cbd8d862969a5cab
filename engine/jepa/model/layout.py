"""The row indices that the model reads, from a micro-batch's masks: made on the CPU, moved asynchronously.

Legend: B images, N patches, M target blocks of Kt patches, U rows per image for its targets.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from jepa.config.schema import Config
from jepa.data.masks import Masks, sample_masks, thin
from jepa.ranks.device import to_device

from .packed import ROUNDING, Ragged, pack


class Place(NamedTuple):
    """A micro-batch of a run: its step, its number in the step, and the rank that takes it."""

    step: int
    micro: int
    rank: int
    world_size: int


class Layout(NamedTuple):
    """The rows that a micro-batch reads, on the device."""

    contexts: Tensor | list[Ragged]
    """int64 [E, B, Kc], or the packed rows of each context mask."""
    target_MBK: Tensor
    """The patches of the targets, int64 [M, B, Kt]."""
    computed: tuple[Tensor, ...]
    """The patches [B, U] whose target features are computed, in groups; (): all, in order."""
    places_MBK: Tensor
    """The positions of the targets in those."""
    kept: tuple[int, int]
    """Patches in a context, on average, and in a target."""


def masks_of(config: Config, place: Place) -> Masks:
    """The masks of a micro-batch."""
    batch, _, whole = config.batch(place.world_size)
    first = (place.micro * place.world_size + place.rank) * batch
    cut, seed, step = (0, whole) if config.cut == "global" else None, config.engine.seed, place.step
    masks = sample_masks(config.mask_spec, seed=seed, step=step, first=first, batch=batch, cut=cut)
    if config.token_budget is None:
        return masks
    return thin(masks, config.token_budget - 1, seed=seed, step=step, first=first)  # one row is reserved for padding


def lay_out(
    masks: Masks, config: Config, device: torch.device, *, whole: bool = False, all_read: bool = False
) -> Layout:
    """The layout of a micro-batch's masks, on `device`.

    `all_read`: the loss reads the target features of all patches. `whole`: they are wanted for another reason; those of
    the targets are then still a group of their own, so that training stays bitwise the same.
    """
    target, N = masks.target, config.grid**2
    contexts: Tensor | list[Ragged]
    if masks.lengths is None:
        contexts = to_device(masks.context, device)
    else:
        parts, budget = masks.context.split(masks.lengths.sum(1).tolist()), config.token_budget
        unit = budget or (-(-target.shape[1] * N // ROUNDING) if device.type == "cuda" else 0)
        ragged = [pack(part, n, target, N, unit) for part, n in zip(parts, masks.lengths, strict=True)]
        contexts = [one.to(device) for one in ragged]
    on_device = to_device(target, device)
    kept = masks.context.numel() // (config.mask.num_enc_masks * target.shape[1]), target.shape[-1]
    if all_read or not config.engine.skip_unread:
        return Layout(contexts, on_device, (), on_device, kept)
    order, places, used = target_rows(target, N)
    groups = (order[:, :used], order[:, used:]) if whole else (order[:, :used],)
    return Layout(
        contexts,
        on_device,
        tuple(to_device(rows, device) for rows in groups if rows.numel()),
        to_device(places, device),
        kept,
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
