"""What the drawn sets with labelled pixels show: striped shapes on grainy ground, and exactly where each is."""

from dataclasses import dataclass

import numpy as np

from jepa.data.synthetic import SHAPES, noise, outside_of


@dataclass(frozen=True)
class Shape:
    """A shape in an image. `mask`: bool [H, W], the pixels whose centres are inside; `x`, `y`, `radius` in pixels."""

    name: str
    mask: np.ndarray
    x: float
    y: float
    radius: float


def ground(stream: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth dark noise, float64 [H, W, 3], 0 to 1."""
    side = max(height, width)
    return 0.1 + 0.3 * noise(1, side, int(stream.integers(2**62)))[0, :height, :width] / 255.0


def put_shapes(stream: np.random.Generator, canvas: np.ndarray) -> list[Shape]:
    """Draws one to four shapes on `canvas` [H, W, 3], each in its own quadrant. A shape's name decides its hue."""
    height, width = canvas.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    shapes = []
    for quadrant in stream.permutation(4)[: stream.integers(1, 5)]:
        number = int(stream.integers(len(SHAPES)))
        radius = min(height, width) * stream.uniform(0.15, 0.22)
        half = np.array([height, width]) / 2
        centre = half * (0.5 + np.array(divmod(quadrant, 2))) + (half / 2 - radius) * stream.uniform(-1, 1, 2)
        top, left = centre.tolist()
        mask = outside_of(SHAPES[number], x - left, y - top, radius) < 0
        hue = number / len(SHAPES) + stream.uniform(-0.03, 0.03) + np.arange(3) / 3
        angle = stream.uniform(0, np.pi)
        stripes = 0.8 + 0.2 * np.sin((np.cos(angle) * x + np.sin(angle) * y) * 4 * np.pi / radius)
        canvas[mask] = (stripes[..., None] * (0.6 + 0.4 * np.cos(2 * np.pi * hue)))[mask]
        shapes.append(Shape(SHAPES[number], mask, left, top, radius))
    return shapes


def pixels(canvas: np.ndarray) -> np.ndarray:
    """0 to 1 -> uint8."""
    return (canvas * 255 + 0.5).clip(0, 255).astype(np.uint8)
