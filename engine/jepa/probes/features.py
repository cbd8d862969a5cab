"""Frozen features, for the probes: the mean over an image's patches of the encoder's output, as in I-JEPA.

Legend: S samples, D feature dimensions, C classes; an encoder maps uint8 images [B, H, W, 3] to features [B, N, D].
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jepa.data.sources import ImageSource, open_images

Encoder = Callable[[Tensor], Tensor]


@torch.no_grad()
def extract(encoder: Encoder, batches: Iterable[tuple[Tensor, list[int]]]) -> tuple[Tensor, list[int]]:
    """Mean-pooled features, fp32 [S, D], and the indices of the S images that `eval_batches` yields.

    If no image is usable, the features are [0], which concatenates with those of other ranks.
    """
    features, numbers = [], []
    for images, indices in batches:
        features.append(encoder(images).float().mean(1))
        numbers += indices
    return torch.cat(features) if features else torch.empty(0), numbers


def check(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Raises ValueError for shapes that do not match, too few samples, or features that are not finite."""
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or x.shape[1] != train_x.shape[1] or y.shape != x.shape[:1]:
            raise ValueError(
                f"{name}: features {list(x.shape)} and labels {list(y.shape)}, wanted [S, {train_x.shape[-1]}] and [S]"
            )
        if len(x) < (5 if name == "train" else 1):
            raise ValueError(f"{name}: {len(x)} samples; a probe needs at least 5 to train and 1 to test")
        if not x.isfinite().all():
            raise ValueError(f"{name}: the features contain NaN or infinity: a broken encoder cannot be probed")


def open_labelled(train: str | Path, val: str | Path) -> list[ImageSource]:
    """The two sources of a probe. Raises ValueError if one has no labels or their classes differ."""
    sources = [open_images(train), open_images(val)]
    for source in sources:
        if source.labels is None or source.classes != sources[0].classes:
            raise ValueError(
                f"{source.path} has the classes {source.classes[:5]}, {train} has {sources[0].classes[:5]}; "
                "a probe needs the same classes in both: one sub-folder per class"
            )
    return sources


def evenly(total: int, wanted: int | None) -> np.ndarray:
    """`wanted` indices spread evenly over `total`; all of them if there are fewer."""
    return (
        np.arange(total) if wanted is None or wanted >= total else np.linspace(0, total - 1, wanted).round().astype(int)
    )
