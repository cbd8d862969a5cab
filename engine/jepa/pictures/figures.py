"""Figures of a run: its curves, its encoder's attention, the principal components of its features, and its masks.

Every function writes one file, whose suffix selects the format (.png, .svg, .pdf), under a temporary name that is then
renamed, and returns the figure. Images are uint8 [B, S, S, 3]; patches are numbered in raster order.

Legend: B images, S pixels a side, N patches, D width, E contexts, M targets.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from jepa.data.masks import Masks

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
HEADS = 4  # how many of the last block's are shown
GHOST = 0.12  # opacity of a hidden patch


class Panel(NamedTuple):
    """Log keys drawn together, with the label of each line; a single line needs none.

    `noisy`: drawn pale behind a running mean. `optional`: left out if all values are zero, as VICReg's are in I-JEPA.
    """

    title: str
    lines: dict[str, str]
    noisy: bool = False
    optional: bool = False


TIMES = Panel("Step time (ms)", {"step_ms": "all", "data_wait_ms": "waiting for images"}, noisy=True)
PANELS = (
    Panel("Loss", {"loss": "total", "jepa": "prediction"}, noisy=True),
    Panel("VICReg: invariance", {"sim": ""}, noisy=True, optional=True),
    Panel("VICReg: variance", {"std": ""}, noisy=True, optional=True),
    Panel("VICReg: covariance", {"cov": ""}, noisy=True, optional=True),
    Panel("Relative std of features", {"target_std": "target", "pred_std": "predicted"}),
    Panel("Effective rank of features", {"target_rank": "target", "pred_rank": "predicted"}),
    Panel("Correlation of features", {"target_cov": "target", "pred_cov": "predicted"}),
    Panel("Teacher distance", {"teacher_distance": ""}),
    Panel("k-NN accuracy (%)", {"knn": ""}),
    Panel("Gradient norm", {"grad_norm": ""}, noisy=True),
    Panel("Learning rate", {"lr": ""}),
    Panel("Weight decay", {"weight_decay": ""}),
    Panel("Teacher momentum", {"momentum": ""}),
    Panel("Images per second", {"images_per_second": ""}, noisy=True),
    TIMES,
    Panel("Context tokens", {"context_tokens": ""}, noisy=True),
)
PERCENT = ("knn",)  # logged as a fraction


def training_curves(log_path: str | Path, out_path: str | Path) -> Figure:
    """Plots a run's JSONL log over the steps, one panel for each quantity that it holds.

    Raises ValueError for a log without numbers and, naming the line, for one that is not JSONL; a truncated last line
    is still being written and is left out. Raises OSError if the file cannot be read.
    """
    rows = _read_log(Path(log_path))
    drawn = []
    for panel in PANELS:
        series = {key: values for key in panel.lines if (values := _series(rows, key)) is not None}
        if panel.optional and not any(values.any() for _, values in series.values()):
            continue
        if (
            "jepa" in series
            and "loss" in series
            and np.array_equal(series["jepa"][1], series["loss"][1], equal_nan=True)
        ):
            del series["jepa"]  # I-JEPA has no other term
        if series:
            drawn.append((panel, series))
    if not drawn:
        raise ValueError(f"log: {log_path} holds no logged step; wanted a run's .jsonl after at least one step")

    columns = min(4, len(drawn) if len(drawn) < 4 else math.ceil(len(drawn) / math.ceil(len(drawn) / 4)))
    lines = math.ceil(len(drawn) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * columns, 1.9 * lines + 0.2), dpi=UNIT * SCALE)
        figure.set_layout_engine("constrained", hspace=0.06, wspace=0.04)
        first, last = rows[0]["step"], rows[-1]["step"]
        side = 0.02 * (last - first) or 1  # so that the first and last markers are not cut in half
        for place, (panel, series) in enumerate(drawn):
            axes = figure.add_subplot(lines, columns, place + 1)
            _draw_panel(axes, panel, series)
            axes.set_xlim(first - side, last + side)
            if place + columns >= len(drawn):
                axes.set_xlabel("step")
        return _write(figure, out_path)


def _read_log(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with a step")
            rows.append(row)
        except ValueError as error:
            if number < len(lines) or not rows:
                raise ValueError(f"log: line {number} of {path} is not a logged step ({error})") from error
    return rows


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps, values) of the rows that have `key`, NaN if not finite; None if there is nothing to plot."""
    pairs = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    values = np.array([value for _, value in pairs], float) * (100 if key in PERCENT else 1)
    values[~np.isfinite(values)] = np.nan
    return None if np.isnan(values).all() else (np.array([step for step, _ in pairs]), values)


def _draw_panel(axes: Any, panel: Panel, series: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for color, (key, name) in zip((BLUE, ORANGE), panel.lines.items(), strict=False):
        if key not in series:
            continue
        steps, values = series[key]
        reach = min(len(values) // 80, 50) if panel.noisy else 0
        if reach:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            steps, values = _running_mean(steps, values, reach)
        marker = "o" if len(values) < 30 else None
        axes.plot(steps, values, color=color, label=name, marker=marker, markersize=3)
    axes.set_title(panel.title)
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.locator_params(axis="y", nbins=5)
    if panel is TIMES:  # a first step that compiles would dwarf all others
        highest = max(min(3 * np.nanmedian(values), 1.08 * np.nanmax(values)) for _, values in series.values())
        axes.set_ylim(0, highest or 1)
    if len(series) > 1:
        axes.legend(loc="best", handlelength=1.2, borderaxespad=0.2)


def _running_mean(steps: np.ndarray, values: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """The interquartile mean of each finite value and its `reach` neighbours on either side; and the steps.

    So a single stall or spike does not spread. The series is mirrored at its ends.
    """
    good = np.isfinite(values)
    padded = np.pad(values[good], reach, mode="symmetric")
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)
    outer = (reach + 1) // 2
    return steps[good], windows[:, outer:-outer].mean(axis=1)


def attention_maps(images: Tensor, attention: Tensor, out_path: str | Path) -> Figure:
    """How much attention each patch receives: one row per image, with the mean over heads and the first few heads.

    `attention` [B, heads, N, N]: each query's row sums to 1. Shows the mean over the queries times N, so that 1 is
    uniform attention, interpolated between patches and overlaid on the image.
    """
    received_BhN = attention.detach().float().mean(2).cpu() * attention.shape[-1]
    side = _grid_side(images, received_BhN, "attention")
    maps_BCN = torch.cat([received_BhN.mean(1, keepdim=True), received_BhN[:, :HEADS]], dim=1)
    maps_BCSS = F.interpolate(maps_BCN.unflatten(2, (side, side)), size=images.shape[1:3], mode="bilinear").numpy()
    colors = ScalarMappable(Normalize(0, max(2.0, float(np.quantile(maps_BCSS, 0.998)))), "inferno")

    pictures = _pixels(images)
    grey = pictures.mean(-1, keepdims=True)
    rows = [
        [image, *(0.3 * dim + 0.7 * colors.to_rgba(m)[..., :3] for m in maps)]
        for image, dim, maps in zip(pictures, grey, maps_BCSS, strict=True)
    ]
    titles = ["image", "mean of heads", *(f"head {h + 1}" for h in range(maps_BCN.shape[1] - 1))]
    with matplotlib.rc_context(STYLE):
        figure = _sheet(rows, titles, right=76)
        width, height = figure.get_size_inches() * UNIT
        bottom = height - MARGIN - GAP - CELL
        bar_axes = figure.add_axes(((width - 70) / width, bottom / height, 10 / width, CELL / height))
        figure.colorbar(colors, cax=bar_axes).outline.set_visible(False)
        bar_axes.locator_params(axis="y", nbins=4)
        bar_axes.set_title("1 = uniform", loc="left", pad=4)
        return _write(figure, out_path)


def feature_pca(images: Tensor, features: Tensor, out_path: str | Path) -> Figure:
    """The first three principal components of patch features [B, N, D] as red, green and blue, below each image.

    The components are those of all B * N patches together, so a colour means the same in every image. Each is scaled
    from its 1st to its 99th percentile.
    """
    side = _grid_side(images, features, "features")
    components = principal_components(features).numpy()
    low, high = np.quantile(components, (0.01, 0.99), axis=(0, 1))
    colors = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1).reshape(-1, side, side, 3)
    with matplotlib.rc_context(STYLE):
        return _write(_sheet([list(_pixels(images)), list(colors)], row_titles=("image", "features")), out_path)


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
    for b, image in enumerate(_pixels(images)):
        ghost = GHOST * image.mean(-1, keepdims=True) + (1 - GHOST) * 0.9
        blocks = [*(kept[b] for kept in contexts), *targets[:, b]]
        seen = [_patch_map(block, side) for block in blocks]
        shown = [np.where(s.repeat(patch_size, 0).repeat(patch_size, 1)[..., None], image, ghost) for s in seen]
        rows.append([image, *shown])
        lines = [(_outline(s, patch_size), PALETTE[m % len(PALETTE)]) for m, s in enumerate(seen[len(contexts) :])]
        outlines += [[], *[lines] * len(contexts), *([line] for line in lines)]
    names = [f"context {e + 1}" for e in range(len(contexts))] if len(contexts) > 1 else ["context"]
    with matplotlib.rc_context(STYLE):
        figure = _sheet(rows, ["image", *names, *(f"target {m + 1}" for m in range(len(targets)))])
        for axes, lines in zip(figure.axes, outlines, strict=True):
            for segments, color in lines:
                axes.add_collection(LineCollection(segments, colors=color, linewidths=1.6, capstyle="projecting"))
        return _write(figure, out_path)


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


def _grid_side(images: Tensor, patches: Tensor, name: str) -> int:
    """The number of patches along one side of the images; `patches` has N in its third (attention) or second axis."""
    N = patches.shape[2] if name == "attention" else patches.shape[1]
    side = math.isqrt(N)
    if side * side != N or len(patches) != len(images):
        raise ValueError(
            f"{name}: given {len(patches)} images of {N} patches, wanted {len(images)} images (as `images` has) "
            "and a square number of patches"
        )
    return side


def _pixels(images: Tensor) -> np.ndarray:
    """Values 0 .. 1, [B, S, S, 3]."""
    return images.cpu().numpy() / 255.0


def _sheet(
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


def _write(figure: Figure, out_path: str | Path) -> Figure:
    out = Path(out_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        figure.savefig(partial, format=out.suffix[1:] or "png")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return figure
