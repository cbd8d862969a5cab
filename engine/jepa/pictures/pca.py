"""The principal components of patch features, as colours."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .style import STYLE, grid_side, pixels, sheet, write


def feature_pca(images: Tensor, features: Tensor, out_path: str | Path) -> Figure:
    """The first three principal components of patch features [B, N, D] as red, green and blue, below each image.

    The components are those of all B * N patches together, so a colour means the same in every image. Each is scaled
    from its 1st to its 99th percentile.
    """
    side = grid_side(images, features, "features")
    components = principal_components(features).numpy()
    low, high = np.quantile(components, (0.01, 0.99), axis=(0, 1))
    colors = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1).reshape(-1, side, side, 3)
    with matplotlib.rc_context(STYLE):
        return write(sheet([list(pixels(images)), list(colors)], row_titles=("image", "features")), out_path)


def principal_components(features: Tensor, count: int = 3) -> Tensor:
    """The first `count` principal components, fp64 [B, N, count] on the CPU, of B * N rows of width D.

    Signs are such that each axis' largest coordinate is positive. Raises ValueError if D is less than `count`.
    """
    if features.shape[-1] < count:
        raise ValueError(f"features: given a width of {features.shape[-1]}, wanted at least {count}")
    x = features.detach().double().cpu().flatten(0, 1)
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -count:].flip(1)  # eigenvalues ascend
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return (x @ axes).unflatten(0, features.shape[:2])
