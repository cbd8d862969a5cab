"""The objects in images: their boxes, their outlines, and what they are called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .segmentation import class_colours
from .style import STYLE, sheet, write

OPACITY = 0.5  # of a mask


@dataclass(frozen=True)
class Objects:
    """N objects of an image: boxes [N, 4] (left, top, right, bottom), masks bool [N, H, W], classes and captions."""

    boxes: np.ndarray
    masks: np.ndarray
    classes: Sequence[int]
    captions: Sequence[str]


def detection(images: Sequence[np.ndarray], columns: Mapping[str, Sequence[Objects]], out_path: str | Path) -> Figure:
    """One row per image, uint8 [H, W, 3]: the image, and each column's objects in it, coloured by class."""
    rows = [[image, *(_masked(image, objects[i]) for objects in columns.values())] for i, image in enumerate(images)]
    shown = [each for i in range(len(images)) for each in (None, *(objects[i] for objects in columns.values()))]
    with matplotlib.rc_context(STYLE):
        figure = sheet(rows, ["image", *columns])
        for axes, objects in zip(figure.axes, shown, strict=True):
            if objects is None:
                continue
            colours = class_colours(max(objects.classes, default=0) + 1)
            for (left, top, right, bottom), number, caption in zip(
                objects.boxes, objects.classes, objects.captions, strict=True
            ):
                corner, extent = (
                    (left - 0.5, top - 0.5),
                    (right - left, bottom - top),
                )  # imshow centres pixels on integers
                axes.add_patch(Rectangle(corner, *extent, fill=False, color=colours[number], linewidth=1.2))
                box = {"facecolor": colours[number], "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
                axes.text(*corner, caption, fontsize=5, color="white", va="top", ha="left", bbox=box, clip_on=True)
        return write(figure, out_path)


def _masked(image: np.ndarray, objects: Objects) -> np.ndarray:
    picture = image / 255.0
    for mask, number in zip(objects.masks, objects.classes, strict=True):
        picture[mask] = (1 - OPACITY) * picture[mask] + OPACITY * class_colours(number + 1)[number]
    return picture
