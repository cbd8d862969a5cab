"""What a method's masks show the model of an image and ask it to predict."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from jepa.data.masks import Masks

from .style import PALETTE, STYLE, pixels, sheet, write

GHOST = 0.12  # opacity of a hidden patch


def masks_on_images(images: Tensor, masks: Masks, patch_size: int, out_path: str | Path) -> Figure:
    """One row per image: what the context encoder sees of it, and each block to predict.

    Hidden patches are greyed out. The context is shown with the outlines of the blocks.
    Raises ValueError if the masks do not fit the images.
    """
    B, side = len(images), images.shape[1] // patch_size
    targets = masks.target.cpu()
    contexts = _context_lists(masks, B)
    last = int(max(masks.context.max(), masks.target.max()))
    if targets.shape[1] != B or last >= side * side:
        raise ValueError(
            f"masks: given {targets.shape[1]} images with patches up to {last}, wanted {B} images of "
            f"{side} x {side} patches ({images.shape[1]} pixels, patch_size {patch_size})"
        )

    rows, outlines = [], []
    for b, image in enumerate(pixels(images)):
        ghost = GHOST * image.mean(-1, keepdims=True) + (1 - GHOST) * 0.9
        blocks = [*(kept[b] for kept in contexts), *targets[:, b]]
        seen = [_patch_map(block, side) for block in blocks]
        shown = [np.where(s.repeat(patch_size, 0).repeat(patch_size, 1)[..., None], image, ghost) for s in seen]
        rows.append([image, *shown])
        lines = [(_outline(s, patch_size), PALETTE[m % len(PALETTE)]) for m, s in enumerate(seen[len(contexts) :])]
        outlines += [[], *[lines] * len(contexts), *([line] for line in lines)]
    names = [f"context {e + 1}" for e in range(len(contexts))] if len(contexts) > 1 else ["context"]
    with matplotlib.rc_context(STYLE):
        figure = sheet(rows, ["image", *names, *(f"target {m + 1}" for m in range(len(targets)))])
        for axes, lines in zip(figure.axes, outlines, strict=True):
            for segments, color in lines:
                axes.add_collection(LineCollection(segments, colors=color, linewidths=1.6, capstyle="projecting"))
        return write(figure, out_path)


def _context_lists(masks: Masks, B: int) -> list[list[Tensor]]:
    """The patches of each context of each image, whether cut or packed."""
    if masks.lengths is None:
        return [list(kept) for kept in masks.context.cpu()]
    lists = masks.context.cpu().split(masks.lengths.flatten().tolist())
    return [list(lists[start : start + B]) for start in range(0, len(lists), B)]


def _patch_map(index: Tensor, side: int) -> np.ndarray:
    seen = np.zeros(side * side, bool)
    seen[index.numpy()] = True
    return seen.reshape(side, side)


def _outline(seen: np.ndarray, patch_size: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The edges, in pixels, between patches inside and outside the block."""
    padded = np.pad(seen, 1)
    flat = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]) * patch_size - 0.5
    tall = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]) * patch_size - 0.5
    return [((x, y), (x + patch_size, y)) for y, x in flat] + [((x, y), (x, y + patch_size)) for y, x in tall]
