"""The picture of masks in videos, read back from its pixels."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from jepa.pictures.style import PALETTE
from jepa.pictures.video import Clip, masks_on_frames, overlaid


def test_objects_are_coloured_and_nothing_else_is() -> None:
    frame = torch.randint(0, 256, (9, 12, 3)).numpy().astype(np.uint8)
    mask = np.zeros((9, 12), np.uint8)
    mask[2:7, 1:6], mask[0, 9], mask[4:, 8:] = 2, 255, 7  # the seventh object has the first one's colour
    shown = overlaid(frame, mask)
    grey = np.repeat(frame.mean(-1, keepdims=True) / 255, 3, axis=2)
    np.testing.assert_allclose(shown[(mask == 0) | (mask == 255)], grey[(mask == 0) | (mask == 255)])
    blue, orange = np.array(to_rgb(PALETTE[0])), np.array(to_rgb(PALETTE[1]))
    np.testing.assert_allclose(shown[2:7, 1], np.tile(orange, (5, 1)))  # the line along an object's edge
    np.testing.assert_allclose(shown[6:, 8], np.tile(blue, (3, 1)))
    for inside, colour in (((4, 3), orange), ((8, 11), blue)):  # what lies at the frame's border has no edge there
        np.testing.assert_allclose(shown[inside], 0.45 * grey[inside] + 0.55 * colour)


def test_every_mask_is_in_its_row_and_column(tmp_path: Path) -> None:
    shapes, clips = [(40, 70), (40, 60)], []
    for shape in shapes:
        frames = [np.zeros((*shape, 3), np.uint8)] * 3
        masks = {name: [np.full(shape, 1 + 3 * row + t, np.uint8) for t in range(3)] for row, name in enumerate("ab")}
        clips.append(Clip("clip", [0, 4, 9], frames, masks))
    figure = masks_on_frames(clips, tmp_path / "masks.png")
    sheet = np.asarray(Image.open(tmp_path / "masks.png").convert("RGB")) / 255
    assert len(figure.axes) == 2 * 2 * 3
    for i, axes in enumerate(figure.axes):
        box = axes.get_window_extent()
        x, y = round((box.x0 + box.x1) / 2), round(len(sheet) - (box.y0 + box.y1) / 2)
        np.testing.assert_allclose(sheet[y, x], 0.55 * np.array(to_rgb(PALETTE[i % 6])), atol=0.01)
        height, width = shapes[i // 6]
        assert abs(box.height / box.width - height / width) < 0.01
