"""Labelled images: two sets and, for each label asked for, one number per image."""

import argparse
import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa.data.lists import encoding_of
from jepa.data.sources import ImageSource, open_images

CLASS = "class"  # the label that folder names give


@dataclass(frozen=True)
class Labelled:
    """Images to fit on and images to judge by; `train_y` and `val_y`: int64 labels of all images, by label's name."""

    train: ImageSource
    val: ImageSource
    train_y: dict[str, np.ndarray]
    val_y: dict[str, np.ndarray]


def arguments(parser: argparse.ArgumentParser) -> None:
    images = "a folder, a .txt list or .tar shards, labelled by sub-folder, list or .cls"
    parser.add_argument("--train", required=True, metavar="IMAGES", help=f"to fit on: {images}")
    parser.add_argument("--val", required=True, metavar="IMAGES", help="to measure on")
    parser.add_argument(
        "--label", action="append", metavar="COLUMN", help="a column of labels.csv in both folders; may be repeated"
    )
    suffixes_argument(parser)


def suffixes_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suffix",
        action="append",
        dest="suffixes",
        metavar="SUFFIX",
        type=suffix,
        help="how the images' names end, like .jpg, if not in a usual way; may be repeated (data.suffixes in a config)",
    )


def suffix(text: str) -> str:
    """`jpg` or `.JPG`, as in data.suffixes."""
    return "." + text.lower().removeprefix(".")


def open_labelled(
    train: str | Path, val: str | Path, columns: Sequence[str] | None = None, suffixes: Sequence[str] | None = None
) -> Labelled:
    """The images and their labels: the classes of the sources or, if `columns` are given, those of labels.csv.
    `suffixes`: as of jepa.data.sources.open_images.

    Raises ValueError, in one line, for labels that are missing or empty, for classes of one set that the other lacks,
    and for numbers written in several ways (1, 1.0, " 1"), which would be several classes.
    """
    sources = open_images(train, suffixes), open_images(val, suffixes)
    paths, train_y, val_y = (str(train), str(val)), {}, {}
    for name in columns or [CLASS]:
        texts = [_column(source, name) if columns else _classes(source) for source in sources]
        train_y[name], val_y[name] = _numbered(name, (texts[0], texts[1]), paths)
    return Labelled(*sources, train_y, val_y)


def _classes(source: ImageSource) -> list[str]:
    if source.labels is None:
        raise ValueError(f"{source.path}: the images have no labels; wanted one sub-folder per class, or --label")
    return [source.classes[i] for i in source.labels]


def _numbered(name: str, texts: tuple[list[str], list[str]], paths: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Indices into the sorted classes; fractional numbers are binned at the training set's quartiles."""
    train, val = texts
    for path, values in zip(paths, texts, strict=True):
        if empty := sum(not value.strip() for value in values):
            raise ValueError(f"{path}: label {name!r} is empty for {empty} of {len(values)} images")
    both = set(train) | set(val)
    numeric = all(_is_number(value) for value in both)
    if numeric and any("." in value for value in train) and len(set(train)) > 20:
        cuts = np.quantile(np.array(train, np.float64), [0.25, 0.5, 0.75])
        return np.searchsorted(cuts, np.array(train, np.float64)), np.searchsorted(cuts, np.array(val, np.float64))
    meant: dict[object, str] = {}
    for value in sorted(both):
        same: object = float(value) if _is_number(value) else value.strip()
        if meant.setdefault(same, value) != value:
            raise ValueError(f"label {name!r}: {meant[same]!r} and {value!r} look like one class written in two ways")
    for this, other in ((0, 1), (1, 0)):
        if only := sorted(set(texts[this]) - set(texts[other])):
            raise ValueError(
                f"label {name!r}: {len(only)} of {len(both)} classes are in {paths[this]} and not in {paths[other]}, "
                f"for example {only[0]!r}; wanted the same classes in both"
            )
    number = {value: i for i, value in enumerate(sorted(both, key=float if numeric else None))}
    return np.array([number[v] for v in train]), np.array([number[v] for v in val])


def _column(source: ImageSource, name: str) -> list[str]:
    """One column of a source's labels.csv, in the order of its images."""
    table = Path(source.path) / "labels.csv"
    if not table.is_file():
        raise ValueError(f"--label {name}: there is no {table}; wanted its first column to name the images")
    try:
        with table.open(newline="", encoding=encoding_of(table)) as file:
            values = _values(csv.reader(file), name, source.path)
    except (csv.Error, UnicodeError) as error:
        raise ValueError(f"--label {name}: {table} is no CSV in UTF-8 ({error})") from error
    except ValueError as error:
        raise ValueError(f"--label {name}: {table} {error}") from error
    images = [os.path.abspath(source.name(i)) for i in range(len(source))]
    if missing := [image for image in images if image not in values]:
        raise ValueError(f"--label {name}: {table} has no row for {len(missing)} images, for example {missing[0]}")
    found = [values[image] for image in images]
    if empty := [image for image, value in zip(images, found, strict=True) if not value.strip()]:
        raise ValueError(
            f"--label {name}: {table} has no value for {len(empty)} of {len(images)} images, for example {empty[0]}"
        )
    return found


def _values(rows: Any, name: str, folder: str) -> dict[str, str]:
    """What a column of a table says of each image, by its path. Raises ValueError that says what the table does."""
    columns = [column.strip() for column in next(rows, [])]
    if columns.count(name) != 1:
        if name in columns:
            raise ValueError("has several columns of that name")
        apart = next((f"; wanted commas between them, not {c!r}" for c in ";\t|" if c in "".join(columns)), "")
        raise ValueError(f"has only the columns {', '.join(columns) or '(none)'}{apart}")
    at, values = columns.index(name), dict[str, str]()
    for row in rows:
        if not row:
            continue
        if any(cell.strip() for cell in row[len(columns) :]):
            raise ValueError(f"has more values than columns in line {rows.line_num}; quote a value with a comma in it")
        image, value = os.path.abspath(Path(folder, row[0])), row[at] if at < len(row) else ""
        if values.setdefault(image, value) != value:
            raise ValueError(f"gives {row[0]} both {values[image]!r} and {value!r}")
    return values


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
