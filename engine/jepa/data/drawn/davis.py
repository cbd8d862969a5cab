"""Short videos of moving shapes in the layout of DAVIS 2017 at 480p.

    ROOT/JPEGImages/480p/SEQ/00000.jpg
    ROOT/Annotations/480p/SEQ/00000.png     indices of objects as a palette image; 0 is the background
    ROOT/ImageSets/2017/val.txt             the names of the sequences

One to three striped shapes of different colours drift over a smooth background, turn at the edges and pass in front of
one another. Their masks are exact: a pixel belongs to the shape that its centre lies in.
"""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from jepa.data.synthetic import SHAPES, noise, outside_of, place


def write(root: Path, seed: int = 0, *, sequences: int = 4, frames: int = 8, size: tuple[int, int] = (64, 96)) -> bool:
    """Draws the set into `root`, as jepa.data.synthetic.place does. `size`: (height, width) in pixels.

    Sequence i is a function of (seed, i, frames, size).
    """
    stamp = f"DAVIS, seed {seed}, {sequences} sequences of {frames} frames, {size[0]} x {size[1]}\n"
    return place(root, stamp, partial(_write, seed=seed, sequences=sequences, frames=frames, size=size))


def _write(root: Path, seed: int, sequences: int, frames: int, size: tuple[int, int]) -> None:
    names = []
    for i in range(sequences):
        name, images, masks = draw(seed, i, frames, size)
        names.append(name)
        for kind, suffix, pictures in (("JPEGImages", "jpg", images), ("Annotations", "png", masks)):
            folder = root / kind / "480p" / name
            folder.mkdir(parents=True)
            for t, pixels in enumerate(pictures):
                picture = Image.fromarray(pixels)
                if kind == "Annotations":
                    picture.putpalette(palette())
                picture.save(folder / f"{t:05d}.{suffix}", quality=95, subsampling=0)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("".join(f"{name}\n" for name in names))


def draw(seed: int, number: int, frames: int, size: tuple[int, int]) -> tuple[str, np.ndarray, np.ndarray]:
    """A sequence's name, its images uint8 [frames, H, W, 3] and masks uint8 [frames, H, W] of the objects 1, 2, ..."""
    H, W = size
    stream = np.random.Generator(np.random.Philox(key=[seed, number]))
    count = 1 + number % 3
    kinds = stream.permutation(SHAPES)[:count]
    turn, radii = stream.random(), H * stream.uniform(0.15, 0.21, count)
    ground = noise(1, max(H, W), int(stream.integers(2**62)))[0, :H, :W] / 255.0
    images = np.repeat((0.15 + 0.35 * ground)[None], frames, axis=0)
    masks = np.zeros((frames, H, W), np.uint8)
    time, (y, x) = np.arange(frames)[:, None, None], np.mgrid[:H, :W] + 0.5
    for k, (kind, radius) in enumerate(zip(kinds, radii, strict=True)):
        hue = turn + k / count + np.array([0, 1, 2]) / 3
        bright, angle, heading = 0.6 + 0.35 * np.cos(2 * np.pi * hue), *stream.uniform(0, 2 * np.pi, 2)
        speed = H * stream.uniform(0.03, 0.05)
        room = max(0.0, W / count / 2 - radius)  # in the first frame no shape hides another
        top = _bounce(stream.uniform(radius, H - radius) + speed * np.sin(heading) * time, radius, H - radius)
        left = (k + 0.5) * W / count + stream.uniform(-room, room)
        left = _bounce(left + speed * np.cos(heading) * time, radius, W - radius)
        dy, dx = y - top, x - left
        outside = outside_of(kind, dx, dy, radius)
        stripe = 0.75 + 0.25 * np.sin((np.cos(angle) * dx + np.sin(angle) * dy) * 4 * np.pi / radius)
        cover = np.clip(0.5 - outside, 0, 1)[..., None]
        images += cover * (bright * stripe[..., None] - images)
        masks[outside <= 0] = k + 1
    return f"{number:02d}-{'-'.join(kinds)}", (images * 255 + 0.5).clip(0, 255).astype(np.uint8), masks


def _bounce(place: np.ndarray, low: float, high: float) -> np.ndarray:
    """A straight path, reflected wherever it leaves low .. high."""
    way = (place - low) % (2 * (high - low))
    return low + np.minimum(way, 2 * (high - low) - way)


def palette() -> list[int]:
    """DAVIS's and PASCAL VOC's colours, R, G, B of 256 indices: bit 7 - i of channel c is bit 3 i + c of the index."""
    return [
        sum((index >> (3 * i + channel) & 1) << (7 - i) for i in range(3))
        for index in range(256)
        for channel in range(3)
    ]
