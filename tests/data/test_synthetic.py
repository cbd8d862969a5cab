"""The drawn scenes hold what their labels say; noise depends on its seed and number alone."""

import csv
import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jepa.data.augment import View, random_boxes
from jepa.data.loader import Loader
from jepa.data.synthetic import FAR, NEAR, RADIUS, SHAPES, SyntheticImages, draw, noise, write

VIEW = View(12, (0.3, 1.0))


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected parts of a mask, as arrays of (row, column)."""
    left, parts = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        part, edge = [], [left.pop()]
        while edge:
            row, column = edge.pop()
            part.append((row, column))
            for step in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                neighbour = (row + step[0], column + step[1])
                if neighbour in left:
                    left.remove(neighbour)
                    edge.append(neighbour)
        parts.append(np.array(part))
    return parts


def test_pixels_hold_the_number_and_the_distance_of_the_objects() -> None:
    first = int(np.random.default_rng(random.getrandbits(64)).integers(100_000))
    scenes = draw(first, 120)
    right_count = right_size = 0
    for image, count, distance in zip(scenes.images, scenes.count, scenes.distance, strict=True):
        # The ground is 0.2 with a grain of 0.04; an object has 0.5 or more in every channel.
        parts = components(image.min(-1) > 0.42 * 255)
        parts = [part for part in parts if len(part) > 4]  # a single grain has four pixels
        tallest = max(np.ptp(part[:, 0]) + 1 for part in parts)
        right_count += len(parts) == count
        right_size += 0.8 < tallest / (2 * RADIUS / distance) < 1.1
    assert right_count == 120 and right_size > 110  # a triangle's thin tip may fall under the threshold


def test_labels_are_balanced_and_in_range() -> None:
    scenes = draw(0, 600, split=1)
    assert np.bincount(scenes.shape).tolist() == [100] * len(SHAPES)
    assert all(100 < n < 200 for n in np.bincount(scenes.count)[1:5])
    assert scenes.distance.min() >= NEAR and scenes.distance.max() <= FAR


def test_a_scene_depends_on_its_number_alone() -> None:
    whole, part = draw(0, 30), draw(10, 5)
    np.testing.assert_array_equal(whole.images[10:15], part.images)
    assert not np.array_equal(whole.images, draw(0, 30, split=1).images)
    assert not np.array_equal(whole.images, draw(0, 30, seed=1).images)


def test_files_and_tables_agree_and_a_second_run_writes_nothing(tmp_path: Path) -> None:
    root, seed = tmp_path / "set", random.getrandbits(31)
    assert write(root, {"train": 30, "val": 12}, seed)
    for number, (split, total) in enumerate({"train": 30, "val": 12}.items()):
        table = json.loads((root / f"scenes/CLEVR_{split}_scenes.json").read_text())
        scenes = draw(0, total, split=number, seed=seed)
        assert table["info"]["split"] == split and len(table["scenes"]) == total
        for i, row in enumerate(table["scenes"]):
            path = root / "images" / split / row["image_filename"]
            drawn, stored = scenes.images[i].astype(float), np.asarray(Image.open(path), float)
            assert np.abs(drawn - stored).mean() < 4, "JPEG of quality 95"
            assert path.parent.name == SHAPES[scenes.shape[i]] and len(row["objects"]) == scenes.count[i]
            assert {each["shape"] for each in row["objects"]} == {path.parent.name}
            depths = [each["pixel_coords"][2] for each in row["objects"]]
            assert min(depths) == pytest.approx(7 * scenes.distance[i]) and max(depths) <= 7 * FAR
            for each in row["objects"]:  # an object's part nearest to its place is not the ground
                x, y, depth = each["pixel_coords"]
                radius = RADIUS * 7 / depth
                near = scenes.images[i][int(y - radius) : int(y + radius) + 1, int(x - radius) : int(x + radius) + 1]
                assert (near.min(-1) > 0.42 * 255).mean() > 0.2
        assert len(list((root / split).rglob("*.jpg"))) == total
        with (root / split / "labels.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["file"] for row in rows] == [scene["image_filename"] for scene in table["scenes"]]
        for i, row in enumerate(rows):
            assert (row["shape"], int(row["count"])) == (SHAPES[scenes.shape[i]], scenes.count[i])
            assert float(row["distance"]) == pytest.approx(scenes.distance[i], abs=6e-5)
    assert [path.name for path in sorted(root.iterdir())] == ["README", "images", "scenes", "train", "val"]
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert not write(root, {"train": 30, "val": 12}, seed)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    with pytest.raises(ValueError, match="is not this data set"):
        write(root, {"train": 31, "val": 12}, seed)


@pytest.mark.parametrize("size", [7, 32, 70])
def test_noise_is_smooth_and_an_image_of_it_depends_on_seed_and_number_alone(size: int) -> None:
    seed = random.getrandbits(63)
    images = noise(9, size, seed)
    assert np.array_equal(noise(4, size, seed), images[:4])
    assert len({image.tobytes() for image in (*images, *noise(9, size, seed + 1))}) == 18
    steps = np.abs(np.diff(images.astype(float), axis=1))
    assert steps.max() <= 255 * (max(2, size // 16) - 1) / (size - 1) + 1  # a node's distance apart: at most 255
    assert np.ptp(images) > 150


def test_synthetic_images_are_repeated_and_batched_like_files_on_any_number_of_ranks() -> None:
    source = SyntheticImages(600, 12, seed=random.getrandbits(63))
    assert len(source) == source.fingerprint["images"] == 600 == len({source.name(i) for i in range(600)})
    assert np.array_equal(source.read(5), source.read(5 + 256)) and not np.array_equal(source.read(5), source.read(6))
    seed, step = random.getrandbits(63), random.randrange(100)
    whole = Loader(source, [VIEW], batch_size=8, seed=seed).batch(step)
    assert np.array_equal(whole.images, [source.read(int(name.rpartition("/")[2])) for name in whole.files])
    ranks = [Loader(source, [VIEW], batch_size=4, seed=seed, rank=r, world_size=2).batch(step) for r in (0, 1)]
    assert torch.equal(torch.cat([part.images for part in ranks]), whole.images) and whole.images.dtype == torch.uint8
    assert [name for part in ranks for name in part.files] == whole.files


def test_further_views_of_synthetic_images_are_parts_of_them() -> None:
    """The first is the whole image; crops are resized to the nearest pixel."""
    source, seed = SyntheticImages(300, 40, seed=random.getrandbits(63)), random.getrandbits(63)
    local = View(16, (0.1, 0.4), flip=0.5, grey=1.0)
    views = [View(40, (0.3, 1.0)), local, View(40, (0.3, 1.0)), local]
    batch = Loader(source, views, batch_size=6, seed=seed).batch(7)
    assert [images.shape for images in batch.views] == [(6, view.size, view.size, 3) for view in views]
    numbers = [int(name.rpartition("/")[2]) for name in batch.files]
    assert np.array_equal(batch.images, [source.read(i) for i in numbers])
    for v, view in enumerate(views[1:], start=1):
        words = np.random.Philox(key=[seed, 7], counter=[0, 0, v, 2]).random_raw(6 * 24).reshape(6, 24)
        boxes = random_boxes(np.full((6, 2), 40), (words >> 11) / 2**53, view.scale)
        for i, (top, left, height, width), image in zip(numbers, boxes.tolist(), batch.views[v], strict=True):
            pixel = [Fraction(2 * k + 1, 2 * view.size) for k in range(view.size)]  # the centres of the view's pixels
            rows, columns = (
                [start + int(length * at) for at in pixel] for start, length in ((top, height), (left, width))
            )
            assert np.array_equal(image, source.read(i)[rows][:, columns])
    parts = [Loader(source, views, batch_size=3, seed=seed, rank=r, world_size=2).batch(7).views for r in (0, 1)]
    assert all(torch.equal(torch.cat(two), one) for *two, one in zip(*parts, batch.views, strict=True))
