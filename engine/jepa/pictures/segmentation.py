"""What the pixels of images show, and what a model says they do."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .style import STYLE, sheet, write

IGNORED = 255
OPACITY = 0.65  # of a class' colour over the grey image
GOLDEN = 0.618034  # turns of hue from one class to the next: no two of many classes look alike


def segmentation(
    images: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    predictions: Mapping[str, Sequence[np.ndarray]],
    out_path: str | Path,
) -> Figure:
    """One row per image: the image, the classes of its pixels, and those that each model predicts.

    Images are uint8 [H, W, 3], classes integers [H, W]. Where a pixel is unlabelled (255), the image is left grey.
    """
    columns = {"truth": truth} | dict(predictions)
    rows = [[image, *(_coloured(image, classes[i]) for classes in columns.values())] for i, image in enumerate(images)]
    with matplotlib.rc_context(STYLE):
        return write(sheet(rows, ["image", *columns]), out_path)


def class_colours(count: int) -> np.ndarray:
    """Colours 0 .. 1, [count, 3]."""
    return np.array(
        [
            colorsys.hsv_to_rgb(i * GOLDEN % 1, (0.85, 0.55)[i % 2], (0.9, 0.7, 1.0, 0.6, 0.8)[i % 5])
            for i in range(count)
        ]
    )


def _coloured(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    grey = np.repeat(image.mean(2, keepdims=True) / 255, 3, 2)
    colours = class_colours(IGNORED + 1)[classes]
    return np.where((classes == IGNORED)[..., None], 0.5 * grey, (1 - OPACITY) * grey + OPACITY * colours)
