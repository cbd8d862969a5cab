"""Synthetic images: the demo's labelled scenes, and noise to time and test a run with.

    python engine/jepa/data/synthetic.py OUT                       the demo's images
    python engine/jepa/data/synthetic.py OUT --layout davis        a tiny set in another set's layout (jepa.data.drawn)

draws textured scenes of a few shapes, in seconds and the same on every machine.

A scene has one to four objects, each in its own quadrant, on a grainy background. All have the scene's shape; each has
its own colour and distance, and near ones look larger. So a part of the image says something about the rest, which is
what joint-embedding prediction learns from, and an image has three labels: which shape, how many, how near.

    OUT/{train,val}/<shape>/NNNNN.jpg
    OUT/{train,val}/labels.csv                    file, shape, count, distance (of the nearest object)
    OUT/scenes/CLEVR_{train,val}_scenes.json      the objects and their distances, as in CLEVR, with links to both
    OUT/images/{train,val}                        splits where CLEVR has them

Scene i of a split is a function of (seed, split, i). `SyntheticImages` is the noise: it is made in memory, and replaces
image files where data.synthetic says so.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ("diamond", "disc", "plus", "ring", "square", "triangle")
SIZE = 64  # pixels
NEAR, FAR = 1.0, 1.8
DEPTH = 7.0  # of an object at distance 1 in CLEVR's units, whose depths are about 7 to 14
RADIUS = 12.5  # pixels, of an object at distance 1
JITTER = 2.0  # pixels, of an object's position in its quadrant
GROUND, GRAIN = 0.2, 0.04  # grey level of the background and its standard deviation, 0 to 1
CHUNK = 500  # scenes drawn at once
DISTINCT = 256  # images of noise; more are repetitions


@dataclass(frozen=True)
class Scenes:
    """B drawn images and their labels."""

    images: np.ndarray  # uint8 [B, 64, 64, 3]
    shape: np.ndarray  # int64 [B], index into SHAPES
    count: np.ndarray  # int64 [B], 1..4
    distance: np.ndarray  # float64 [B], of the nearest object
    objects: list[list[list[float]]]  # of each scene's objects: x and y of the centre in pixels, and distance


def draw(first: int, count: int, *, split: int = 0, seed: int = 0) -> Scenes:
    """Draws scenes first .. first + count - 1 of a split. Shapes are balanced: scene i shows shape i % 6."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, 2 * i + split])) for i in range(first, first + count)]
    cells = np.stack([stream.random((4, 8)) for stream in streams])
    grain = np.stack([stream.standard_normal((SIZE // 2, SIZE // 2)) for stream in streams])
    shape = np.arange(first, first + count) % len(SHAPES)
    objects = 1 + (cells[:, 0, 7] * 4).astype(np.int64)
    present = cells[:, :, 0].argsort(1).argsort(1) < objects[:, None]
    distance = NEAR + (FAR - NEAR) * cells[:, :, 1]
    radius = RADIUS / distance
    quadrant = SIZE / 4 * np.array([[1, 1], [1, 3], [3, 1], [3, 3]])
    centre = quadrant + JITTER * (2 * cells[:, :, 2:4] - 1)
    colour = 0.5 + 0.5 * cells[:, :, 4:7]

    canvas = np.repeat(np.clip(GROUND + GRAIN * grain, 0, 1).repeat(2, 1).repeat(2, 2)[..., None], 3, axis=3)
    pixel = np.arange(SIZE) + 0.5
    for cell in range(4):
        y = pixel[:, None] - centre[:, cell, 0, None, None]
        x = pixel[None, :] - centre[:, cell, 1, None, None]
        outside = np.empty((count, SIZE, SIZE))
        for s, name in enumerate(SHAPES):
            of = shape == s
            outside[of] = outside_of(name, x[of], y[of], radius[of, cell, None, None])
        cover = np.clip(0.5 - outside, 0, 1) * present[:, cell, None, None]
        canvas += cover[..., None] * (colour[:, cell, None, None] - canvas)
    nearest = np.where(present, distance, np.inf).min(1)
    places = np.concatenate([centre[..., ::-1], distance[..., None]], axis=2)
    each = [place[there].tolist() for place, there in zip(places, present, strict=True)]
    return Scenes((canvas * 255 + 0.5).astype(np.uint8), shape, objects, nearest, each)


def outside_of(name: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """How many pixels (x, y) is outside a shape of the given half height; negative inside."""
    ax, ay = np.abs(x), np.abs(y)
    if name == "disc":
        return np.hypot(x, y) - radius
    if name == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
    if name == "square":
        return np.maximum(ax, ay) - 0.9 * radius
    if name == "diamond":
        return (ax + ay - radius) / np.sqrt(2)
    if name == "plus":
        return np.maximum(np.maximum(ax, ay) - radius, np.minimum(ax, ay) - radius / 3)
    return np.maximum(y - radius, (2 * ax - y - radius) / np.sqrt(5))  # triangle, point up


def write(root: Path, splits: dict[str, int], seed: int = 0) -> bool:
    """Draws the data set into `root`, as `place` does."""
    return place(root, f"scenes, seed {seed}, {splits}\n", lambda folder: _write(folder, splits, seed))


def place(root: Path, stamp: str, draw_into: Callable[[Path], None]) -> bool:
    """A data set drawn into `root`, renamed into place once complete; returns False if it already exists.

    `stamp`, in a file README, says which set it is. Raises ValueError if `root` exists and holds something else.
    """
    if root.exists():
        if (root / "README").is_file() and (root / "README").read_text() == stamp:
            return False
        raise ValueError(f"{root} exists and is not this data set; remove it or choose another folder")
    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    draw_into(partial)
    (partial / "README").write_text(stamp)
    partial.rename(root)
    return True


def _write(root: Path, splits: dict[str, int], seed: int) -> None:
    for number, (split, total) in enumerate(splits.items()):
        table, rows, images = [], ["file,shape,count,distance"], root / split
        for name in SHAPES:
            (images / name).mkdir(parents=True)
        for first in range(0, total, CHUNK):
            scenes = draw(first, min(CHUNK, total - first), split=number, seed=seed)
            for i, (image, shape, objects) in enumerate(zip(scenes.images, scenes.shape, scenes.objects, strict=True)):
                path, name = f"{SHAPES[shape]}/{first + i:05d}.jpg", SHAPES[shape]
                Image.fromarray(image).save(images / path, quality=95, subsampling=0)
                rows.append(f"{path},{name},{len(objects)},{min(distance for *_, distance in objects):.4f}")
                at = [[x, y, DEPTH * distance] for x, y, distance in objects]
                table.append({"image_filename": path, "objects": [{"shape": name, "pixel_coords": xyz} for xyz in at]})
        (images / "labels.csv").write_text("\n".join(rows) + "\n")
        for folder in ("scenes", "images"):
            (root / folder).mkdir(exist_ok=True)
        (root / "images" / split).symlink_to(Path("..") / split)
        text = json.dumps({"info": {"split": split}, "scenes": table})
        (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(text)


def noise(number: int, size: int, seed: int = 0) -> np.ndarray:
    """Smooth random images, uint8 [number, size, size, 3]. Image i is a function of (seed, i)."""
    grid, images = max(2, size // 16), np.empty((number, size, size, 3), np.uint8)
    at = np.linspace(0, grid - 1, size, dtype=np.float32)[:, None]
    linear = np.maximum(0, 1 - np.abs(at - np.arange(grid, dtype=np.float32)))  # interpolation, [size, grid]
    for i, image in enumerate(images):
        stream = np.random.Generator(np.random.Philox(key=[seed, i]))
        levels = 255 * stream.random((3, grid, grid), np.float32)
        image[:] = (linear @ levels @ linear.T).transpose(1, 2, 0)
    return images


class SyntheticImages:
    """`number` smooth random images of size x size pixels, in place of jepa.data.sources.ImageSource's files.

    Image i is a function of (seed, i % 256): each of 256 images stands for many, so that making them costs nothing.
    """

    path = "data.synthetic"
    found = "noise"

    def __init__(self, number: int, size: int, seed: int) -> None:
        self.number, self.pixels = number, noise(min(number, DISTINCT), size, seed)

    def __len__(self) -> int:
        return self.number

    def name(self, i: int) -> str:
        return f"{self.path}/{i}"

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """What a checkpoint records of the images; their seed and size are in its config."""
        return {"images": self.number, "list of images": "synthetic"}

    def read(self, i: int) -> np.ndarray:
        """The pixels of image i, uint8 [size, size, 3]."""
        return self.pixels[i % DISTINCT]


def main() -> int:
    from jepa.data.drawn import ade20k, coco, davis

    layouts = {"ade20k": ade20k, "coco": coco, "davis": davis}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to create")
    parser.add_argument("--layout", choices=("scenes", *layouts), default="scenes", help="default: %(default)s")
    parser.add_argument("--train", type=int, default=6000, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=1500, help="held-out scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        if args.layout in layouts:
            what, drawn = f"a set in the layout of {args.layout}", layouts[args.layout].write(args.out, args.seed)
        else:
            what = f"{args.train} + {args.val} scenes"
            drawn = write(args.out, {"train": args.train, "val": args.val}, args.seed)
    except (ValueError, OSError) as error:
        print(f"synthetic.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {what} {'drawn' if drawn else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # engine/ instead of this script's folder in the library
    sys.exit(main())
