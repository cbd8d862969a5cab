"""What all pictures share: colours, type, the sheet of images, and writing a file.

Every picture is one function that writes one file, whose suffix selects the format (.png, .svg, .pdf), under a
temporary name that is then renamed, and returns the figure. Images are uint8 [B, S, S, 3]; patches are numbered in
raster order.

Legend: B images, S pixels a side, N patches, D width, E contexts, M targets.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

# Okabe and Ito's colours, which the colour-blind can tell apart
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY)

INK, FAINT = "#333333", "#DDDDDD"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.limits": (-6, 7),
    "axes.formatter.useoffset": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
}

UNIT, SCALE = 100, 2  # sheets of images are laid out in units of 1/100 inch, each 2 x 2 pixels of a PNG
CELL, GAP, MARGIN = 160, 6, 22  # an image, the space between two, and the space for a line of titles


def grid_side(images: Tensor, patches: Tensor, name: str) -> int:
    """The number of patches along one side of the images; `patches` has N in its third (attention) or second axis."""
    N = patches.shape[2] if name == "attention" else patches.shape[1]
    side = math.isqrt(N)
    if side * side != N or len(patches) != len(images):
        raise ValueError(
            f"{name}: given {len(patches)} images of {N} patches, wanted {len(images)} images (as `images` has) "
            "and a square number of patches"
        )
    return side


def pixels(images: Tensor) -> np.ndarray:
    """Values 0 .. 1, [B, S, S, 3]."""
    return images.cpu().numpy() / 255.0


def sheet(
    rows: Sequence[Sequence[np.ndarray]],
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    right: int = 0,
) -> Figure:
    """A grid of images, each CELL units wide.

    `right`: units left free on that side. The axes are in reading order.
    """
    top, left = (MARGIN if column_titles else 0), (MARGIN if row_titles else 0)
    width = left + GAP + len(rows[0]) * (CELL + GAP) + right
    height = top + GAP + len(rows) * (CELL + GAP)
    figure = Figure(figsize=(width / UNIT, height / UNIT), dpi=UNIT * SCALE)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            x, y = left + GAP + c * (CELL + GAP), height - top - GAP - CELL - r * (CELL + GAP)
            axes = figure.add_axes((x / width, y / height, CELL / width, CELL / height))
            axes.imshow(picture)
            axes.set_axis_off()
            if r == 0 and column_titles:
                axes.set_title(column_titles[c], loc="center", pad=4)
            if c == 0 and row_titles:
                axes.text(-0.06, 0.5, row_titles[r], transform=axes.transAxes, rotation=90, ha="right", va="center")
    return figure


def write(figure: Figure, out_path: str | Path) -> Figure:
    out = Path(out_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        figure.savefig(partial, format=out.suffix[1:] or "png")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return figure
