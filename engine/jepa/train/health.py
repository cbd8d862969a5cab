"""The health of the features: do they still tell images apart?"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .teacher import Teacher

MAX_ROWS = 4096


def effective_rank(x_RD: Tensor) -> float:
    """RankMe (arXiv 2210.02885, eq. 1) of centred rows: the exponential of the entropy of the singular values.

    Between 1 (all rows on a line) and min(R - 1, D). Centred because the mean of a network's features hides the rest.
    """
    x = x_RD.double() - x_RD.double().mean(0)
    products = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T  # their eigenvalues are the squares, at a tenth the cost
    values = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def feature_health(x_RD: Tensor) -> dict[str, float]:
    """For features [R, D], one row per image or block:

    std   standard deviation over the rows, averaged over the dimensions, relative to the features' root mean square
    rank  `effective_rank`
    cov   root mean square of the off-diagonal entries of the correlation matrix: 0 decorrelated, 1 all dimensions alike
    """
    x = x_RD.double()
    std = x.std(0)
    normed = (x - x.mean(0)) / std.clamp_min(1e-12)
    correlation = normed.T @ normed / (len(x) - 1)
    dims = x.shape[1]
    off = (correlation.square().sum() - correlation.diagonal().square().sum()) / max(1, dims * (dims - 1))
    scale = x.square().mean().sqrt().clamp_min(1e-12)
    return {
        "std": float(std.mean() / scale),
        "rank": effective_rank(x),
        "cov": float(off.clamp_min(0).sqrt()),
    }


def all_rows(x_RD: Tensor) -> Tensor:
    """The rows of all ranks, at most 4096 of them, fp32 on the device."""
    rows = x_RD.detach().float()[: max(2, MAX_ROWS // dist.get_world_size())].contiguous()
    gathered = torch.empty(dist.get_world_size() * len(rows), rows.shape[1], device=rows.device)
    dist.all_gather_into_tensor(gathered, rows)
    return gathered


def health(features: Mapping[str, Tensor]) -> dict[str, float]:
    """`feature_health` of a method's features (`Output.features`), over all ranks' images, as `{name}_{key}`.

    Every rank calls it; the first one computes it, the others get an empty dict.
    """
    found: dict[str, float] = {}
    for name, x in features.items():
        rows = all_rows(x if x.ndim == 2 else x.mean(1))
        if dist.get_rank() == 0:
            found |= {f"{name}_{key}": value for key, value in feature_health(rows).items()}
    return found


def collapse_warning(found: Mapping[str, float]) -> str | None:
    """A message if the features of different images have become the same, else None."""
    for key, value in found.items():
        name, _, kind = key.rpartition("_")
        if kind == "std" and value < 1e-3:
            return f"collapsing: the features {name!r} hardly differ between images (relative std {value:.1e})"
        if kind == "rank" and value < 1.5:
            return f"collapsing: the features {name!r} vary along a single direction (effective rank {value:.2f})"
    return None


def examine(
    step: int, features: Mapping[str, Tensor], teacher: Teacher | None, say: Callable[[str], None]
) -> dict[str, float]:
    """Health of the features, and the teacher's distance; warns of collapse. Every rank must call it."""
    found = health(features)
    if warning := collapse_warning(found):
        say(f"step {step}: {warning}")
    return found if teacher is None else found | {"teacher_distance": teacher.distance()}
