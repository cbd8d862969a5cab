"""Masks carried through a video by frozen features: the label propagation of DINO (arXiv 2104.14294).

A patch of a new frame gets the labels of the patches that look most like it, by cosine, among those nearby in the first
frame and a few before it. Labels stay soft from frame to frame; only the masks are made of the likeliest.

Legend: T context frames, h x w patches of a frame, D width, C labels (0 is the background), H x W pixels.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Propagation:
    """`frames`: how many before the new one are context, besides the first. `top`: patches whose labels are averaged.

    `radius`: how far off, in patches, they may be in either direction. `temperature`: of the softmax of their cosines.
    """

    frames: int = 7
    top: int = 5
    radius: int = 12
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("frames", 0), ("top", 1), ("radius", 0)):
            if (given := getattr(self, name)) < least:
                raise ValueError(f"--{name}: given {given}, wanted at least {least}")
        if not self.temperature > 0:
            raise ValueError(f"--temperature: given {self.temperature}, wanted more than 0")


@torch.no_grad()
def track(
    features: Callable[[Tensor], Tensor], frames: Iterable[Tensor], first: Tensor, how: Propagation
) -> Iterator[Tensor]:
    """The masks of all frames but the first, int64 [H, W], one at a time.

    `features` maps a frame to [h, w, D]; `first`: the first frame's objects, int64 [H, W]. Of earlier frames, the
    features and labels of the context alone are kept. As in DINO, labels are sampled at the nearest pixel to begin with
    and each label is stretched over 0..1 before the likeliest is taken.
    """
    frames = iter(frames)
    start = F.normalize(features(next(frames)).float(), dim=2)
    h, w, _ = start.shape
    known = F.interpolate(first[None, None].float(), (h, w), mode="nearest-exact")[0, 0].long()
    labels = F.one_hot(known, int(first.max()) + 1).to(start.dtype)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=how.frames)
    for frame in frames:
        query = F.normalize(features(frame).float(), dim=2)
        keys, values = zip((start, labels), *recent, strict=True)
        found = propagate(query, torch.stack(keys), torch.stack(values), how)
        recent.append((query, found))
        yield likeliest(found, (first.shape[0], first.shape[1]))


def propagate(query: Tensor, keys: Tensor, labels: Tensor, how: Propagation) -> Tensor:
    """Labels [h, w, C] of unit features `query` [h, w, D], from context `keys` [T, h, w, D] and `labels` [T, h, w, C].

    The mean of the labels at the `top` largest cosines no further off than `radius`, weighted by
    exp(cosine / temperature). Row by row: the memory is that of a row's cosines with the rows nearby.
    """
    h, w, _ = query.shape
    column = torch.arange(w, device=query.device)
    far = (column[:, None] - column).abs() > how.radius
    rows = []
    for y in range(h):
        near = slice(max(0, y - how.radius), y + how.radius + 1)
        cosine = query[y] @ keys[:, near].flatten(1, 2).mT  # [T, w, nearby rows * w]
        cosine = cosine.unflatten(2, (-1, w)).masked_fill(far[:, None], -torch.inf)
        cosine = cosine.transpose(0, 1).flatten(1)
        best, chosen = cosine.topk(min(how.top, cosine.shape[1]), dim=1)
        weight = (best / how.temperature).softmax(1)
        rows.append((weight[..., None] * labels[:, near].flatten(0, 2)[chosen]).sum(1))
    return torch.stack(rows)


def likeliest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """The likeliest label of each pixel, int64 [H, W], of labels [h, w, C] interpolated to `size`.

    Each label's values are first stretched to 0..1 over the frame, unless it is nowhere.
    """
    maps = F.interpolate(labels.permute(2, 0, 1)[None], size, mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = (maps - low) / (high - low)
    return torch.where(high > low, stretched, maps).argmax(0)
