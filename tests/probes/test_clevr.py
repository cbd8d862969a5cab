"""CLEVR's tasks: labels against what was drawn, the ranges' edges, and layouts that are not CLEVR's."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jepa.data.synthetic import DEPTH, draw, write
from jepa.probes import clevr, linear
from jepa.probes.clevr import open_split
from probing import Encoder, job_of, options


def test_labels_are_those_of_the_scenes_that_were_drawn(tmp_path: Path) -> None:
    seed = random.getrandbits(31)
    write(tmp_path / "set", {"train": 40, "val": 20}, seed)
    for number, (split, total) in enumerate({"train": 40, "val": 20}.items()):
        source, labels = open_split(tmp_path / "set", split)
        scenes = draw(0, total, split=number, seed=seed)
        assert len(source) == total
        for i in range(total):
            scene = int(Path(source.name(i)).stem)
            depth = min(DEPTH * distance for _, _, distance in scenes.objects[scene])
            assert labels["count"][i] == scenes.count[scene] - 1 == len(scenes.objects[scene]) - 1
            assert labels["distance"][i] == sum(depth > cut for cut in (8, 8.5, 9, 9.5, 10))
        assert len(np.unique(labels["distance"])) > 3


def write_set(root: Path, depths: dict[str, list[list[float]]]) -> Path:
    """A scene in CLEVR's own layout for each list of its objects' depths, in an order of the table's own."""
    for split, scenes in depths.items():
        (root / "images" / split).mkdir(parents=True)
        (root / "scenes").mkdir(exist_ok=True)
        table = []
        for i, objects in enumerate(scenes):
            name = f"CLEVR_{split}_{i:06}.png"
            Image.new("RGB", (32, 32), (i % 256, 0, 0)).save(root / "images" / split / name)
            several = [{"pixel_coords": [1.0, 2.0, z], "shape": "cube"} for z in objects]
            table.append({"image_filename": name, "split": split, "objects": several})
        random.shuffle(table)
        (root / f"scenes/CLEVR_{split}_scenes.json").write_text(json.dumps({"info": {}, "scenes": table}))
    return root


def test_the_nearest_object_counts_and_a_bin_ends_with_its_edge(tmp_path: Path) -> None:
    depths = [
        [7.999, 12],
        [8.0],
        [12.0, 8.001],
        [8.5],
        [9.0, 9.0, 9.0],
        [9.5],
        [9.999],
        [10.0],
        [10.001],
        [13.5, 14, 12],
    ]
    _, labels = open_split(write_set(tmp_path, {"val": depths}), "val")
    assert labels["distance"].tolist() == [0, 0, 1, 1, 2, 3, 4, 4, 5, 5]
    assert labels["count"].tolist() == [1, 0, 1, 0, 2, 0, 0, 0, 0, 2]


def test_the_thousand_are_vtabs(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 800 of the first nine tenths and the first 200 of the last tenth."""
    root = write_set(tmp_path / "set", {"train": [[8.2]] * 2005, "val": [[8.2], [9.2, 7]]})
    given: list[Any] = []

    def rows_of(job: Any, sets: Any, args: Any, chosen: np.ndarray | None, crops: tuple[float, float] | None) -> list:
        assert crops is None
        given.append(chosen)
        return [{"features": "encoder", "count": 1.0}]

    monkeypatch.setattr(linear, "rows_of", rows_of)
    job = job_of(Encoder(), tmp_path / "out")
    assert clevr.run(job, options(clevr, "--data", root, "--thousand")).task is None
    assert clevr.run(job, options(clevr, "--data", root)).task is None
    first, last = range(800), range(2005 - 200, 2005 - 200 + 200)
    assert given[0].tolist() == [*first, *last] and given[1] is None
    small = write_set(tmp_path / "small", {"train": [[8.2]] * 30, "val": [[8.2]]})
    with pytest.raises(ValueError, match=r"--thousand: .*small has 30 training images; wanted 2000 at least"):
        clevr.run(job, options(clevr, "--data", small, "--thousand"))


def test_another_layout_is_one_line_that_says_what_was_looked_for(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", {"train": [[8.0], [9.0]], "val": [[8.0]]})
    table = root / "scenes/CLEVR_train_scenes.json"
    good = json.loads(table.read_text())

    def refused(pattern: str) -> None:
        with pytest.raises(ValueError, match=pattern) as caught:
            open_split(root, "train")
        assert "\n" not in str(caught.value)

    for content in (
        "{", "[]", '{"scenes": 3}', '{"scenes": [{}]}', '{"scenes": ["a"]}',
        '{"scenes": [{"image_filename": "a", "objects": []}]}',
        '{"scenes": [{"image_filename": "a", "objects": [{"pixel_coords": [1, 2]}]}]}',
        '{"scenes": [{"image_filename": "a", "objects": [{"pixel_coords": [1, 2, null]}]}]}',
    ):  # fmt: skip
        table.write_text(content)
        refused(r'CLEVR_train_scenes\.json: \w+Error .*; wanted \{"scenes": \[\{"image_filename"')
    table.write_text(json.dumps({"scenes": [s for s in good["scenes"] if s["image_filename"][-5] != "1"]}))
    refused(r"has no scene for 1 of 2 images in .*images/train/, for example CLEVR_train_000001\.png")
    table.write_bytes(b"\xff")
    refused("wanted")
    table.unlink()
    looked = r"set is not in CLEVR's layout: looked for .*set/scenes/CLEVR_train_scenes\.json and .*set/images/train/"
    refused(looked)
    table.write_text(json.dumps(good))
    assert open_split(root, "train")[1]["count"].tolist() == [0, 0]
    shutil.rmtree(root / "images/train")
    refused(looked)
    (root / "images/train").mkdir()
    refused("contains no image")
