"""Where the last block of an encoder looks."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from .style import CELL, GAP, MARGIN, STYLE, UNIT, grid_side, pixels, sheet, write

HEADS = 4  # how many of the last block's are shown


def attention_maps(images: Tensor, attention: Tensor, out_path: str | Path) -> Figure:
    """How much attention each patch receives: one row per image, with the mean over heads and the first few heads.

    `attention` [B, heads, N, N]: each query's row sums to 1. Shows the mean over the queries times N, so that 1 is
    uniform attention, interpolated between patches and overlaid on the image.
    """
    received_BhN = attention.detach().float().mean(2).cpu() * attention.shape[-1]
    side = grid_side(images, received_BhN, "attention")
    maps_BCN = torch.cat([received_BhN.mean(1, keepdim=True), received_BhN[:, :HEADS]], dim=1)
    maps_BCSS = F.interpolate(maps_BCN.unflatten(2, (side, side)), size=images.shape[1:3], mode="bilinear").numpy()
    colors = ScalarMappable(Normalize(0, max(2.0, float(np.quantile(maps_BCSS, 0.998)))), "inferno")

    pictures = pixels(images)
    grey = pictures.mean(-1, keepdims=True)
    rows = [
        [image, *(0.3 * dim + 0.7 * colors.to_rgba(m)[..., :3] for m in maps)]
        for image, dim, maps in zip(pictures, grey, maps_BCSS, strict=True)
    ]
    titles = ["image", "mean of heads", *(f"head {h + 1}" for h in range(maps_BCN.shape[1] - 1))]
    with matplotlib.rc_context(STYLE):
        figure = sheet(rows, titles, right=76)
        width, height = figure.get_size_inches() * UNIT
        bottom = height - MARGIN - GAP - CELL
        bar_axes = figure.add_axes(((width - 70) / width, bottom / height, 10 / width, CELL / height))
        figure.colorbar(colors, cax=bar_axes).outline.set_visible(False)
        bar_axes.locator_params(axis="y", nbins=4)
        bar_axes.set_title("1 = uniform", loc="left", pad=4)
        return write(figure, out_path)
