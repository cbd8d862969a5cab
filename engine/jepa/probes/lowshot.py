"""Classification with few labels: a share or a number of images per class.

    python engine/evaluate.py lowshot WEIGHTS --train imagenet/train --val imagenet/val --labels 1%
    python engine/evaluate.py lowshot WEIGHTS --train imagenet/train --val imagenet/val --list 1percent.txt

--form linear: the quick linear classifier on stored features; finetune: all weights. The I-JEPA paper's low-shot table
has the better of the two. --list names the labelled images, one a line, by their paths or their files' names (SimCLR's
lists of ImageNet); else --seed chooses them.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np

from jepa.data.sources import ImageSource
from jepa.ranks.stop import StopRequest, minutes_argument

from . import labels, linear
from .features import shared_arguments
from .finetune_settings import settings_arguments, settings_of
from .job import Job, Result, Row
from .papers import classified


def arguments(parser: argparse.ArgumentParser) -> None:
    labels.arguments(parser)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--labels", metavar="1%|10%|K", help="a share of each class, or images per class")
    chosen.add_argument("--list", type=Path, metavar="FILE", help="the labelled images, one a line")
    parser.add_argument("--form", choices=("linear", "finetune"), default="linear")
    shared_arguments(parser)
    settings_arguments(parser, preset="lowshot")
    minutes_argument(parser)


def run(job: Job, args: argparse.Namespace) -> Result:
    """Figures: accuracy by label, named after the labels' number where the classes are the label ("1%")."""
    sets = labels.open_labelled(args.train, args.val, args.label, args.suffixes)
    ((name, train_y), *others) = sets.train_y.items()
    if others:
        raise ValueError("--label: given several; the images are chosen by the classes of one")
    chosen = listed(sets.train, args.list) if args.list else drawn(train_y, args.labels, args.seed or 0)
    fewest = min(Counter(train_y[chosen].tolist()).values())
    job.say(f"{len(chosen)} of {len(sets.train)} images are labelled, at least {fewest} of each class that has any")
    if args.form == "finetune":
        from . import finetune  # needs timm

        settings = settings_of(args, job.config)
        rows: list[Row] = []
        with StopRequest(job.ranks, args.max_minutes) as stop:
            for subject in job.subjects:
                accuracy = finetune.fine_tune(job, subject, sets, name, chosen, settings, stop)
                rows.append({"features": subject.name, name: accuracy})
    else:
        rows = linear.rows_of(job, sets, argparse.Namespace(**vars(args) | {"form": "quick"}), chosen)
    figure = args.labels or share_of(len(chosen), len(sets.train)) or args.list.name
    if name != labels.CLASS:
        figure = f"{name} {figure}"
    return Result([{"features": row["features"], figure: row[name]} for row in rows], classified(sets))


def share_of(some: int, whole: int) -> str | None:
    """1% or 10%, the shares that papers report, if it is one of them within half a thousandth."""
    return next((f"{share}%" for share in (1, 10) if abs(some / whole - share / 100) <= 0.0005), None)


def drawn(y: np.ndarray, wanted: str, seed: int) -> np.ndarray:
    """Indices of `wanted` of the labels int64 [S], as many of each class: "1%" of it, at least one, or K images."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%|([1-9]\d*)", wanted)
    if match is None or (match[1] and not 0 < float(match[1]) <= 100):
        raise ValueError(f"--labels {wanted}: wanted a share such as 1% or 10%, or a number of images per class")
    generator, parts = np.random.default_rng(seed), []
    for label in np.unique(y):
        of_it = generator.permutation(np.flatnonzero(y == label))
        number = max(1, round(len(of_it) * float(match[1]) / 100)) if match[1] else int(match[2])
        if number > len(of_it):
            raise ValueError(f"--labels {wanted}: a class has only {len(of_it)} images")
        parts.append(of_it[:number])
    return np.sort(np.concatenate(parts))


def listed(source: ImageSource, path: Path) -> np.ndarray:
    """Indices of the images that a list names. Raises ValueError for one that is not there, or stands for several."""
    whole: dict[str, int] = {}
    short: dict[str, list[int]] = {}
    for i in range(len(source)):
        whole[source.name(i)] = i
        short.setdefault(Path(source.name(i)).name, []).append(i)
    chosen, lines = [], [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--list {path}: is empty; wanted the labelled images, one a line")
    for line in lines:
        inside = str(Path(source.path) / line)
        found = (
            [whole[inside]] if inside in whole else [whole[line]] if line in whole else short.get(Path(line).name, [])
        )
        if len(found) != 1:
            raise ValueError(f"--list {path}: {line!r} names {len(found)} images of {source.path}; wanted one")
        chosen += found
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"--list {path}: {len(chosen) - len(set(chosen))} lines name an image again")
    return np.sort(np.array(chosen))
