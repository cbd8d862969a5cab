"""Masks of the objects in videos: the truth, and what others made of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from .style import GAP, PALETTE, SCALE, STYLE, UNIT, write

WIDE = 210  # units of a frame
LEFT, TITLE, APART = 150, 24, 12  # units for the rows' names, for a line of text, between two clips
COVER = 0.55  # opacity of a mask
VOID = 255


@dataclass(frozen=True)
class Clip:
    """Some frames of a video. `times`: their numbers; `frames`: uint8 [H, W, 3] each.

    `masks`, by whose they are: uint8 [H, W] each, 0 for the background, 255 for what nobody knows.
    """

    name: str
    times: Sequence[int]
    frames: Sequence[np.ndarray]
    masks: dict[str, list[np.ndarray]]


def masks_on_frames(clips: Sequence[Clip], out_path: str | Path) -> Figure:
    """For each clip a row per set of masks, a column per frame; an object has one colour throughout.

    The axes are in reading order.
    """
    tall = [round(WIDE * clip.frames[0].shape[0] / clip.frames[0].shape[1]) for clip in clips]
    heights = [2 * TITLE + len(clip.masks) * (size + GAP) for clip, size in zip(clips, tall, strict=True)]
    width = LEFT + max(len(clip.times) for clip in clips) * (WIDE + GAP)
    height = sum(heights) + (len(clips) - 1) * APART + GAP
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / UNIT, height / UNIT), dpi=UNIT * SCALE)
        top = GAP / 2
        for clip, size, whole in zip(clips, tall, heights, strict=True):
            _write_line(figure, GAP, top + TITLE / 2, clip.name, size=11, weight="bold")
            for column, time in enumerate(clip.times):
                note = f"frame {time}" + (", given" if time == 0 else "")
                _write_line(figure, LEFT + column * (WIDE + GAP), top + 1.5 * TITLE, note)
            for row, (name, masks) in enumerate(clip.masks.items()):
                y = top + 2 * TITLE + row * (size + GAP)
                _write_line(figure, GAP, y + size / 2, name)
                for column, (frame, mask) in enumerate(zip(clip.frames, masks, strict=True)):
                    x = LEFT + column * (WIDE + GAP)
                    axes = figure.add_axes((x / width, 1 - (y + size) / height, WIDE / width, size / height))
                    axes.imshow(overlaid(frame, mask), aspect="auto")
                    axes.set_axis_off()
            top += whole + APART
        return write(figure, out_path)


def overlaid(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The frame in grey, 0 .. 1 [H, W, 3], its objects covered in their colours, with a solid line inside each."""
    grey = np.repeat(frame.mean(-1, keepdims=True) / 255.0, 3, axis=2)
    colours = np.array([to_rgb(colour) for colour in PALETTE])[(mask.astype(int) - 1) % len(PALETTE)]
    padded = np.pad(mask, 1, mode="edge")
    steps = [padded[1 + dy : dy - 1 or None, 1 + dx : dx - 1 or None] for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    edge = np.any([step != mask for step in steps], axis=0)
    known = (mask > 0) & (mask != VOID)
    opacity = np.where(known, np.where(edge, 1.0, COVER), 0.0)[..., None]
    return (1 - opacity) * grey + opacity * colours


def _write_line(figure: Figure, x: float, y: float, text: str, **how: Any) -> None:
    """Text whose left edge and middle are at (x, y) units from the upper left corner."""
    width, height = figure.get_size_inches() * UNIT
    figure.text(x / width, 1 - y / height, text, ha="left", va="center", **how)
