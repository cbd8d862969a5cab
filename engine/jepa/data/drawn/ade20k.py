"""Scenes with labelled pixels in the layout of ADE20K (ADEChallengeData2016).

    ROOT/images/{training,validation}/ADE_{train,val}_00000001.jpg
    ROOT/annotations/{training,validation}/ADE_{train,val}_00000001.png     uint8: 0 unlabelled, then the classes

Classes 1 to 6 are the shapes of jepa.data.synthetic, 7 the wall behind them and 8 the brighter floor; a rim of two
pixels is unlabelled. Landscapes and portraits take turns.
"""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from jepa.data.drawn.shapes import ground, pixels, put_shapes
from jepa.data.synthetic import SHAPES, place

WALL, FLOOR = len(SHAPES) + 1, len(SHAPES) + 2
CLASSES = FLOOR
RIM = 2  # pixels


def write(root: Path, seed: int = 0, *, train: int = 64, val: int = 16, size: int = 64) -> bool:
    """Draws the set into `root`, as jepa.data.synthetic.place does. `size`: pixels of the shorter side.

    Image i of a split is a function of (seed, split, i, size).
    """
    stamp = f"ADE20K, seed {seed}, {train} + {val} images of {size} pixels\n"
    return place(root, stamp, partial(_write, seed=seed, numbers=(train, val), size=size))


def _write(root: Path, seed: int, numbers: tuple[int, int], size: int) -> None:
    for split, (name, short) in enumerate((("training", "train"), ("validation", "val"))):
        for kind in ("images", "annotations"):
            (root / kind / name).mkdir(parents=True)
        for i in range(numbers[split]):
            image, labels = draw(np.random.Generator(np.random.Philox(key=[seed, 2 * i + split])), i, size)
            stem = f"ADE_{short}_{i + 1:08d}"
            Image.fromarray(image).save(root / "images" / name / f"{stem}.jpg", quality=95, subsampling=0)
            Image.fromarray(labels).save(root / "annotations" / name / f"{stem}.png")


def draw(stream: np.random.Generator, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [H, W, 3], and its labels, uint8 [H, W]."""
    height, width = (size, size * 5 // 4) if number % 2 else (size * 5 // 4, size)
    canvas, horizon = ground(stream, height, width), int(height * stream.uniform(0.4, 0.7))
    canvas[horizon:] += 0.4
    labels = np.full((height, width), WALL, np.uint8)
    labels[horizon:] = FLOOR
    for shape in put_shapes(stream, canvas):
        labels[shape.mask] = SHAPES.index(shape.name) + 1
    inside = np.zeros_like(labels)
    inside[RIM:-RIM, RIM:-RIM] = 1
    return pixels(canvas), labels * inside
