"""Counting objects and judging distance in CLEVR's scenes (arXiv 1612.06890), by a linear classifier.

    python engine/evaluate.py clevr runs/demo/jepa-latest --data data/demo
    python engine/evaluate.py clevr WEIGHTS --data CLEVR_v1.0 --thousand      VTAB's form with 1000 images

The tasks are VTAB's (arXiv 1910.04867): `count`, how many objects there are; `distance`, how near the nearest is, its
depth cut at 8, 8.5, 9, 9.5 and 10. CLEVR_v1.0's own layout, of which the demo's scenes have the part that is read:

    DATA/images/{train,val}/*                          images, at any depth
    DATA/scenes/CLEVR_{train,val}_scenes.json          for each its file's name and the objects' pixel_coords
"""

import argparse
import json
from pathlib import Path

import numpy as np

from jepa.data.sources import ImageSource, open_images

from . import heads, linear
from .features import shared_arguments
from .job import Job, Result
from .labels import Labelled

CUTS = (8.0, 8.5, 9.0, 9.5, 10.0)  # of the nearest object's depth; VTAB's others bound all there are
TASK_IMAGES = 15_000  # of CLEVR's own validation set
FIRST, LAST = 800, 200  # as many as VTAB's 1000 training images, which it draws from a shuffled list: by name, from the
# first nine tenths, and from the last tenth


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="CLEVR_v1.0, or the demo's scenes")
    parser.add_argument("--thousand", action="store_true", help="fit on VTAB's 1000 training images instead of all")
    parser.add_argument("--form", choices=("quick", "paper"), default="quick", help="as of `linear`")
    shared_arguments(parser)
    heads.arguments(parser)


def run(job: Job, args: argparse.Namespace) -> Result:
    """Figures: accuracies of `count` and `distance`."""
    (train, train_y), (val, val_y) = (open_split(args.data, split) for split in ("train", "val"))
    chosen = None
    if args.thousand:
        tenth = len(train) - len(train) // 10
        if tenth < FIRST or len(train) - tenth < LAST:
            raise ValueError(f"--thousand: {args.data} has {len(train)} training images; wanted {10 * LAST} at least")
        chosen = np.r_[:FIRST, tenth : tenth + LAST]
    # The distances of a set need not reach all the ranges, so a class may be missing from either.
    sets = Labelled(train, val, train_y, val_y)
    task = "CLEVR" if len(val) == TASK_IMAGES and chosen is None and args.form == "paper" else None
    # Centre crops, flipped: a random crop would cut off what is to be counted.
    return Result(linear.rows_of(job, sets, args, chosen, crops=None), task)


def open_split(data: Path, split: str) -> tuple[ImageSource, dict[str, np.ndarray]]:
    """The images of a split and their labels, in order of their scenes' names: int64 `count` - 1 and `distance`.

    Raises ValueError that names what is missing or unlike CLEVR.
    """
    table, images = data / "scenes" / f"CLEVR_{split}_scenes.json", data / "images" / split
    if not table.is_file() or not images.is_dir():
        raise ValueError(f"{data} is not in CLEVR's layout: looked for {table} and {images}/")
    try:
        scenes = {
            str(scene["image_filename"]): (
                len(scene["objects"]),
                min(float(each["pixel_coords"][2]) for each in scene["objects"]),
            )
            for scene in json.loads(table.read_text())["scenes"]
        }
    except (ValueError, LookupError, TypeError) as error:
        wanted = 'wanted {"scenes": [{"image_filename": ..., "objects": [{"pixel_coords": [x, y, depth]}, ...]}, ...]}'
        raise ValueError(f"{table}: {type(error).__name__} {error}; {wanted}") from error
    source = open_images(images)
    names = [Path(source.name(i)).relative_to(images).as_posix() for i in range(len(source))]
    if lost := [name for name in names if name not in scenes]:
        raise ValueError(
            f"{table} has no scene for {len(lost)} of {len(names)} images in {images}/, for example {lost[0]}"
        )
    counts, depths = (np.array([scenes[name][i] for name in names]) for i in (0, 1))
    return source, {"count": counts - 1, "distance": np.searchsorted(CUTS, depths, side="left")}
