"""Labels: classes of folders and columns of labels.csv, and every way in which they can be wrong."""

import argparse
import csv
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jepa.probes import labels
from jepa.probes.labels import open_labelled

Table = list[list[str]]


def pictures(root: Path, splits: dict[str, list[str]]) -> tuple[Path, Path]:
    """Empty pictures of these names; returns the two folders."""
    for split, names in splits.items():
        for name in names:
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(root / split / name)
    train, val = (root / split for split in splits)
    return train, val


def write_table(folder: Path, rows: Table, encoding: str = "utf-8") -> None:
    with (folder / "labels.csv").open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)


def columns(root: Path, train: list[str], val: list[str], name: str = "kind") -> tuple[Path, Path]:
    """One picture and a row for each value, in an order of their own."""
    folders = pictures(root, {split: [f"{i:03}.png" for i in range(len(v))] for split, v in (("t", train), ("v", val))})
    for folder, values in zip(folders, (train, val), strict=True):
        rows = [[f"{i:03}.png", value] for i, value in enumerate(values)]
        write_table(folder, [["file", name], *random.sample(rows, len(rows))])
    return folders


def refused(train: Path, val: Path, pattern: str, labels: list[str] | None = None) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        open_labelled(train, val, labels)
    assert "\n" not in str(caught.value)


def test_folders_are_classes_by_name_in_both_sets(tmp_path: Path) -> None:
    sets = open_labelled(*pictures(tmp_path, {"a": ["10/x.png", "9/x.png", "9/y.png"], "b": ["9/z.png", "10/z.png"]}))
    for source, y in ((sets.train, sets.train_y["class"]), (sets.val, sets.val_y["class"])):
        assert [int(Path(source.name(i)).parent.name) for i in range(len(source))] == [[9, 10][label] for label in y]


def test_suffixes_choose_the_images(tmp_path: Path) -> None:
    names = {split: [f"{folder}/{i}.png" for folder in "pq" for i in range(4)] for split in "ab"}
    folders = pictures(tmp_path, names)
    kept = [[name for i, name in enumerate(given) if i % 4 == 0 or random.random() < 0.5] for given in names.values()]
    for folder, some in zip(folders, kept, strict=True):
        for name in some:
            (folder / name).rename((folder / name).with_suffix(".PIC"))
    parser = argparse.ArgumentParser()
    labels.arguments(parser)
    for given in ("pic", ".Pic"):
        args = parser.parse_args(["--train", str(folders[0]), "--val", str(folders[1]), "--suffix", given])
        sets = open_labelled(args.train, args.val, args.label, args.suffixes)
        for source, folder, some in zip((sets.train, sets.val), folders, kept, strict=True):
            found = {
                Path(source.name(i)).relative_to(folder).with_suffix(".png").as_posix() for i in range(len(source))
            }
            assert found == set(some)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_columns_follow_the_images_whatever_the_order_of_the_rows_and_the_way_to_the_folder(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a spreadsheet saves it: with a byte-order mark, more columns, rows twice or of images that are gone."""
    monkeypatch.chdir(tmp_path)
    values = {split: [*random.choices(["red", "green", "blue"], k=9), "red", "green", "blue"] for split in ("t", "v")}
    folders = pictures(tmp_path, {split: [f"{i % 2}/{i}.png" for i in range(12)] for split in values})
    for folder, colours in zip(folders, values.values(), strict=True):
        rows = [[f"{i % 2}/{i}.png", colour, "x"] for i, colour in enumerate(colours)]
        rows += [["gone.png", "violet", "x"], rows[0], [], [*rows[1], "", " "]]
        write_table(folder, [["image", " colour ", "note"], *random.sample(rows, len(rows))], encoding)
    sets = open_labelled(os.path.relpath("t"), "v/../v", ["colour"])
    for source, y, split in ((sets.train, sets.train_y, "t"), (sets.val, sets.val_y, "v")):
        numbers = [int(Path(source.name(i)).stem) for i in range(12)]
        assert [["blue", "green", "red"][label] for label in y["colour"]] == [values[split][n] for n in numbers]


def test_numbers_are_classes_in_order_of_value_and_of_many_fractions_the_quartiles(tmp_path: Path) -> None:
    sets = open_labelled(*columns(tmp_path / "few", ["10", "9", "0.5", "9"], ["0.5", "10", "9"]), ["kind"])
    assert sets.train_y["kind"].tolist() == [2, 1, 0, 1] and sets.val_y["kind"].tolist() == [0, 2, 1]
    many = open_labelled(
        *columns(tmp_path / "many", [str(i) for i in range(20, 50)], [str(i) for i in range(49, 19, -1)]), ["kind"]
    )
    assert many.train_y["kind"].tolist() == many.val_y["kind"].tolist()[::-1] == list(range(30)), "whole numbers"

    rng = np.random.default_rng(random.getrandbits(32))
    train, val = rng.normal(size=101), rng.normal(size=50)
    texts = [[f"{value:.6f}" for value in values] for values in (train, val)]
    sets = open_labelled(*columns(tmp_path / "distance", *texts), ["kind"])
    ranked = np.sort(np.array(texts[0], float))[[25, 50, 75]]  # the quartiles of 101 numbers are three of them
    for values, y in ((texts[0], sets.train_y), (texts[1], sets.val_y)):
        assert y["kind"].tolist() == [sum(float(value) > cut for cut in ranked) for value in values]


@pytest.mark.parametrize("ways", [("1", "1.0"), ("1", " 1"), ("1", "01"), ("a", "a "), ("1e1", "10")])
@pytest.mark.parametrize("apart", [False, True], ids=["in one set", "between the sets"])
def test_one_class_written_in_two_ways_is_refused(tmp_path: Path, ways: tuple[str, str], apart: bool) -> None:
    one, other = ways
    folders = columns(tmp_path, [one, "2"], [other, "2"]) if apart else columns(tmp_path, [one, other], [one, other])
    first, second = sorted(ways)
    refused(*folders, re.escape(f"'kind': {first!r} and {second!r} look like one class written in two ways"), ["kind"])


def test_wrong_labels_are_one_line_that_says_which(tmp_path: Path) -> None:
    plain = pictures(tmp_path / "plain", {"t": ["a.png"], "v": ["a.png"]})
    refused(*plain, "t: the images have no labels; wanted one sub-folder per class, or --label")
    refused(*plain, r"--label kind: there is no .*t/labels\.csv; wanted its first column to name the images", ["kind"])
    folders = pictures(tmp_path / "folders", {"t": ["a/1.png", "b/1.png"], "v": ["a/1.png", "c/1.png"]})
    refused(*folders, "'class': 1 of 3 classes are in .*t and not in .*v, for example 'b'; wanted the same")
    refused(folders[0], tmp_path / "nowhere", "nowhere.*does not exist")
    none = tmp_path / "none"
    none.mkdir()
    refused(folders[0], none, "contains no image")
    one_more = pictures(tmp_path / "more", {"t": ["a/1.png"], "v": ["a/1.png", "b/1.png"]})
    refused(*one_more, "1 of 2 classes are in .*v and not in .*t, for example 'b'")

    given = columns(tmp_path / "given", ["x", "y", "y"], ["y", "x"])
    refused(*given, r"--label size: .*t/labels\.csv has only the columns file, kind", ["kind", "size"])
    write_table(given[1], [["file", "kind"], ["000.png", "y"], ["001.png", "  "]])
    refused(*given, r"--label kind: .*v/labels\.csv has no value for 1 of 2 images", ["kind"])
    write_table(given[1], [["file", "kind"], ["000.png", "y"], ["001.png"]])
    refused(*given, r"--label kind: .*v/labels\.csv has no value for 1 of 2 images", ["kind"])
    write_table(given[1], [["file", "kind"], ["000.png", "y"]])
    refused(*given, r"v/labels\.csv has no row for 1 images, for example .*v/001\.png", ["kind"])
    (given[1] / "labels.csv").write_text("")
    refused(*given, r"v/labels\.csv has only the columns \(none\)", ["kind"])
    for content, said in {
        "file;kind\n000.png;y\n": "has only the columns file;kind; wanted commas between them, not ';'",
        "file,kind,kind\n000.png,y,y\n": "has several columns of that name",
        "file,kind\n000.png,y\n001.png,x\n000.png,x\n": "gives 000.png both 'y' and 'x'",
        "file,kind\n000.png,y\n001.png,x, or y\n": "has more values than columns in line 3",
        "file,kind\n000.png,\0y\n001.png," + "x" * 200_000: "is no CSV in UTF-8",
        "file,kind\n000.png,s\xfcd\n": "is no CSV in UTF-8",
    }.items():
        (given[1] / "labels.csv").write_bytes(content.encode("latin-1"))
        refused(*given, rf"--label kind: \S*v/labels\.csv {re.escape(said)}", ["kind"])
