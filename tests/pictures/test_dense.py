"""The pictures of segmentation and detection show what they are given, at its place."""

import numpy as np
import pytest

from jepa.pictures.detection import Objects, detection
from jepa.pictures.segmentation import IGNORED, class_colours, segmentation


def test_colours_of_classes_differ():
    colours = class_colours(151)
    apart = np.abs(colours[:, None] - colours[None]).max(-1) + np.eye(151)
    assert colours.min() >= 0 and colours.max() <= 1 and apart.min() > 0.01 and apart[:8, :8].min() > 0.1


def test_each_pixel_has_its_class_colour(tmp_path):
    rng = np.random.default_rng()
    image = np.full((9, 14, 3), rng.integers(50, 200), np.uint8)
    truth = rng.choice([0, 3, 7, IGNORED], (9, 14))
    guess = rng.choice([0, 3, 7], (9, 14))
    figure = segmentation([image], [truth], {"mine": [guess]}, tmp_path / "out.png")
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert [axes.get_title(loc="center") for axes in figure.axes] == ["image", "truth", "mine"]
    np.testing.assert_array_equal(shown[0], image)
    for picture, classes in zip(shown[1:], (truth, guess), strict=True):
        seen = {number: np.unique(picture[classes == number], axis=0) for number in np.unique(classes)}
        assert all(len(colour) == 1 for colour in seen.values())  # one class, one colour
        assert len({tuple(colour[0]) for colour in seen.values()}) == len(seen)
        assert IGNORED not in seen or np.ptp(seen[IGNORED]) == 0  # grey
    assert (tmp_path / "out.png").stat().st_size > 0


def test_boxes_and_masks_are_where_the_objects_are(tmp_path):
    image = np.zeros((30, 40, 3), np.uint8)
    masks = np.zeros((2, 30, 40), bool)
    masks[0, 5:12, 8:20], masks[1, 20:30, 30:40] = True, True
    boxes = np.array([[8, 5, 20, 12], [30, 20, 40, 30]], np.float32)
    found = Objects(boxes, masks, [2, 5], ["disc 0.90", "ring 0.60"])
    nothing = Objects(np.zeros((0, 4)), np.zeros((0, 30, 40), bool), [], [])
    figure = detection([image], {"truth": [found], "mine": [nothing]}, tmp_path / "out.png")
    _, truth, mine = figure.axes
    picture = np.asarray(truth.images[0].get_array())
    np.testing.assert_array_equal(picture.any(-1), masks.any(0))
    drawn = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in truth.patches]
    assert drawn == [(7.5, 4.5, 12, 7), (29.5, 19.5, 10, 10)]  # a pixel is drawn around its whole number
    assert [text.get_text() for text in truth.texts] == ["disc 0.90", "ring 0.60"]
    assert not mine.patches and not mine.texts and not np.asarray(mine.images[0].get_array()).any()


@pytest.mark.parametrize("draw", [segmentation, detection])
def test_a_picture_that_cannot_be_written_leaves_nothing(draw, tmp_path):
    image, rest = np.zeros((4, 4, 3), np.uint8), ({},) if draw is detection else ([np.zeros((4, 4), int)], {})
    with pytest.raises(ValueError):
        draw([image], *rest, tmp_path / "out.nonsense")
    assert not list(tmp_path.iterdir())
