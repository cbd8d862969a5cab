"""Images with outlined objects in the layout of COCO 2017.

    ROOT/{train2017,val2017}/000000000007.jpg
    ROOT/annotations/instances_{train,val}2017.json

As in COCO, the numbers of images, annotations and categories have gaps, outlines are polygons or, where they cannot be,
run lengths, some images have no object, and some annotations are crowds, which are neither learned nor scored.
Landscapes and portraits take turns.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jepa.data.drawn.shapes import Shape, ground, pixels, put_shapes
from jepa.data.synthetic import SHAPES, place

CATEGORIES = {name: 2 + 3 * i for i, name in enumerate(SHAPES)}  # 2, 5, 8, ...
EMPTY, CROWDED = 8, 5  # every eighth image has no object, every fifth of the others has a crowd


def write(root: Path, seed: int = 0, *, train: int = 64, val: int = 16, size: int = 64) -> bool:
    """Draws the set into `root`, as jepa.data.synthetic.place does. `size`: pixels of the shorter side.

    Image i of a split is a function of (seed, split, i, size).
    """
    stamp = f"COCO, seed {seed}, {train} + {val} images of {size} pixels\n"
    return place(root, stamp, partial(_write, seed=seed, numbers=(train, val), size=size))


def _write(root: Path, seed: int, numbers: tuple[int, int], size: int) -> None:
    (root / "annotations").mkdir()
    for split, name in enumerate(("train2017", "val2017")):
        (root / name).mkdir()
        images, annotations = [], []
        for i in range(numbers[split]):
            picture, objects = draw(np.random.Generator(np.random.Philox(key=[seed, 2 * i + split])), i, size)
            number = 7 * (i + 1)
            file = f"{number:012d}.jpg"
            Image.fromarray(picture).save(root / name / file, quality=95, subsampling=0)
            images.append({"id": number, "file_name": file, "height": picture.shape[0], "width": picture.shape[1]})
            annotations += [{"id": 100 * number + k, "image_id": number} | each for k, each in enumerate(objects)]
        categories = [{"id": number, "name": kind, "supercategory": "shape"} for kind, number in CATEGORIES.items()]
        about = {"description": "drawn shapes", "year": 2017}
        content = {"info": about, "images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))


def draw(stream: np.random.Generator, number: int, size: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """An image, uint8 [H, W, 3], and its annotations, but for their and the image's numbers."""
    height, width = (size, size * 5 // 4) if number % 2 else (size * 5 // 4, size)
    canvas = ground(stream, height, width)
    if number % EMPTY == EMPTY - 1:
        return pixels(canvas), []
    shapes = put_shapes(stream, canvas)
    crowded = number % CROWDED == CROWDED - 1
    last = len(shapes) - 1
    return pixels(canvas), [_annotation(shape, crowd=crowded and k == last) for k, shape in enumerate(shapes)]


def _annotation(shape: Shape, crowd: bool) -> dict[str, Any]:
    """One entry of a COCO file's `annotations`, its box as left, top, width and height."""
    rows, columns = (np.flatnonzero(shape.mask.any(axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    outline = _polygon(shape)
    return {
        "category_id": CATEGORIES[shape.name],
        "segmentation": _run_lengths(shape.mask) if crowd or outline is None else [outline],
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(shape.mask.sum()),
        "iscrowd": int(crowd),
    }


def _polygon(shape: Shape) -> list[float] | None:
    """The corners x, y, x, y, ...; None for a ring, which has a hole."""
    turn = 2 * np.pi * np.arange(32) / 32
    third = 1 / 3
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "disc": list(zip(np.cos(turn), np.sin(turn), strict=True)),
        "plus": [
            (-third, -1), (third, -1), (third, -third), (1, -third), (1, third), (third, third),
            (third, 1), (-third, 1), (-third, third), (-1, third), (-1, -third), (-third, -third),
        ],
    }.get(shape.name)  # fmt: skip
    if corners is None:
        return None
    points = np.array([shape.x, shape.y]) + shape.radius * np.array(corners)
    return [round(float(value), 2) for value in points.ravel()]


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed form: lengths of the runs of 0, 1, 0, ... down the columns."""
    flat = np.concatenate([[0], mask.ravel(order="F").astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"counts": counts.tolist(), "size": list(mask.shape)}
