"""How well a mask agrees with the truth: the measures J and F of DAVIS.

    J   pixels in both regions / pixels in either
    F   harmonic mean of precision (the share of the mask's boundary near the truth's) and recall (the reverse)

A pixel is on the boundary if its right, lower or lower right neighbour is on the other side of it; it is near a pixel
at most ceil(0.008 * image diagonal) away. So defined by Perazzi et al. (CVPR 2016), as in Pont-Tuset et al. (DAVIS
2017, arXiv 1704.00675) and its official evaluation. Two empty regions agree.

Masks are bool [K, H, W], one of each of K objects; void pixels, bool [H, W], belong to neither region.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 0.008  # of the image's diagonal


def region_similarity(mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
    """J of each object, fp64 [K]."""
    mask, truth = _known(mask, truth, void)
    return _share((mask & truth).sum((1, 2)), (mask | truth).sum((1, 2)))


def contour_accuracy(mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
    """F of each object, fp64 [K]."""
    edge, true_edge = (boundary(region) for region in _known(mask, truth, void))
    radius = math.ceil(TOLERANCE * math.hypot(*mask.shape[1:]))
    precision = _share((edge & within(true_edge, radius)).sum((1, 2)), edge.sum((1, 2)))
    recall = _share((true_edge & within(edge, radius)).sum((1, 2)), true_edge.sum((1, 2)))
    return (2 * precision * recall / (precision + recall)).nan_to_num()  # neither: 0


def boundary(mask: Tensor) -> Tensor:
    """The pixels that differ from a neighbour to the right, below or both, bool [K, H, W]; none lies outside."""
    edge = torch.zeros_like(mask)
    edge[:, :, :-1] |= mask[:, :, :-1] ^ mask[:, :, 1:]
    edge[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    edge[:, :-1, :-1] |= mask[:, :-1, :-1] ^ mask[:, 1:, 1:]
    return edge


def within(mask: Tensor, radius: int) -> Tensor:
    """The pixels at most `radius` from one of the mask, bool [K, H, W]: its dilation by a disk.

    A row of the disk is an interval, in which running sums tell whether there is a pixel.
    """
    _, H, W = mask.shape
    sums = F.pad(mask.int(), (radius + 1, radius, radius, radius)).cumsum(2, dtype=torch.int32)
    found = torch.zeros_like(mask)
    for dy in range(-radius, radius + 1):
        half = math.isqrt(radius**2 - dy**2)
        rows = sums[:, radius + dy : radius + dy + H]
        first, last = radius - half, radius + 1 + half
        found |= rows[:, :, last : last + W] > rows[:, :, first : first + W]
    return found


def _known(mask: Tensor, truth: Tensor, void: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask.shape != truth.shape or mask.ndim != 3 or {mask.dtype, truth.dtype} != {torch.bool}:
        raise ValueError(
            f"regions: given {mask.dtype} {list(mask.shape)} and {truth.dtype} {list(truth.shape)}, "
            "wanted bool [K, H, W] twice"
        )
    return (mask, truth) if void is None else (mask & ~void, truth & ~void)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, fp64; 1 if there is nothing."""
    return torch.where(whole > 0, part.double() / whole, 1.0)
