"""k-NN and linear probes of a checkpoint's frozen features, compared with an untrained encoder and raw pixels.

    python engine/evaluate.py runs/demo/jepa-latest --train data/demo/train --val data/demo/val

Labels are the names of the sub-folders or, with --label COLUMN, a column of `labels.csv` in both folders, whose first
column names the files.
"""

import argparse
import csv
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa.config.schema import Config
from jepa.data.loader import eval_batches
from jepa.data.sources import ImageSource, open_images
from jepa.model.vit import VisionTransformer, build_encoder
from jepa.probes.features import Encoder, extract, open_labelled
from jepa.probes.knn import knn
from jepa.probes.linear import linear_probe
from jepa.ranks.device import choose
from jepa.state.interop import load_encoder
from jepa.state.restore import CheckpointError


def pixels(images: Tensor) -> Tensor:
    """The images themselves as features, averaged down to 16 x 16 pixels: [B, 1, 768]."""
    return F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2) / 255.0, 16).flatten(1)[:, None]


def last(encoder: VisionTransformer, layers: int) -> Encoder:
    """The outputs of the last blocks, concatenated: [B, N, layers * D]. I-JEPA reports the better of one and four."""
    if not 1 <= layers <= len(encoder.blocks):
        raise ValueError(f"--layers {layers}: must be from 1 to the encoder's {len(encoder.blocks)} blocks")
    return lambda images: torch.cat(encoder.features(images, range(-layers, 0)), dim=2)


def features(encoder: Encoder, source: ImageSource, config: Config, device: torch.device) -> tuple[Tensor, list[int]]:
    """Mean-pooled features [S, D] of the images that can be decoded, and the indices of those images."""
    batches = eval_batches(
        source,
        crop_size=config.data.crop_size,
        batch_size=config.data.batch_size,
        device=device,
        num_workers=config.data.num_workers,
    )
    return extract(encoder, batches)


def column(source: ImageSource, name: str) -> list[str]:
    """One column of a source's labels.csv, in the order of its images. Raises ValueError if a value is missing."""
    table = Path(source.path) / "labels.csv"
    with table.open(newline="") as file:
        first, *_ = columns = next(csv.reader(file), [""])
        file.seek(0)
        if name not in columns:
            raise ValueError(f"--label {name}: {table} has only the columns {', '.join(columns)}")
        values = {os.path.abspath(Path(source.path, row[first])): row[name] for row in csv.DictReader(file)}
    images = [os.path.abspath(source.name(i)) for i in range(len(source))]
    if missing := [image for image in images if image not in values]:
        raise ValueError(f"--label {name}: {table} has no row for {len(missing)} images, for example {missing[0]}")
    return [values[image] for image in images]


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def labels_of(sources: list[ImageSource], name: str | None) -> list[Tensor]:
    """int64 labels of both sources; fractional numbers are binned at the training set's quartiles."""
    if name is None:
        return [torch.from_numpy(source.labels) for source in sources]
    train, val = (column(source, name) for source in sources)
    if any("." in value for value in train) and all(is_number(value) for value in train + val):
        cuts = torch.tensor([float(v) for v in train]).quantile(torch.tensor([0.25, 0.5, 0.75]))
        return [torch.bucketize(torch.tensor([float(v) for v in values]), cuts) for values in (train, val)]
    classes = sorted(set(train) | set(val))
    return [torch.tensor([classes.index(v) for v in values]) for values in (train, val)]


def evaluate(
    checkpoint: str, train_path: str, val_path: str, names: list[str | None], layers: int = 1, on: str = "auto"
) -> list[dict[str, object]]:
    """One row per encoder: accuracies in percent under "<label> k-NN" and "<label> linear".

    `on`: the device, as in jepa.ranks.device.choose.
    """
    encoder, config = load_encoder(checkpoint)
    sources = open_labelled(train_path, val_path) if None in names else [open_images(train_path), open_images(val_path)]
    device = choose(on)
    torch.manual_seed(config.engine.seed)
    untrained = build_encoder(config).eval()
    labels = {name or "class": labels_of(sources, name) for name in names}
    encoders: dict[str, Encoder] = {
        "target encoder" if "encoder" in config.method.averaged else "encoder": last(encoder.to(device), layers),
        "untrained encoder": last(untrained.to(device), layers),
        "pixels": pixels,
    }
    rows = []
    for what, module in encoders.items():
        (train_x, train), (val_x, val) = (features(module, source, config, device) for source in sources)
        row: dict[str, object] = {"features": what}
        for name, (train_y, val_y) in labels.items():
            sets = train_x, train_y[train].to(device), val_x, val_y[val].to(device)
            row[f"{name} k-NN"] = 100 * knn(*sets, k=config.eval.knn_k)
            row[f"{name} linear"] = 100 * linear_probe(*sets)
        rows.append(row)
        print(f"{what}: done", file=sys.stderr)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    columns = list(rows[0])
    text = [columns] + [
        [f"{row[c]:.1f} %" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows
    ]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in text
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or exported .safetensors")
    parser.add_argument("--train", required=True, metavar="FOLDER", help="labelled images to fit the probes on")
    parser.add_argument("--val", required=True, metavar="FOLDER", help="labelled images to measure accuracy on")
    parser.add_argument("--label", action="append", metavar="COLUMN", help="column of labels.csv; may be repeated")
    parser.add_argument("--layers", type=int, default=1, help="number of last blocks to concatenate (default: 1)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the accuracies to this file")
    args = parser.parse_args()
    try:
        rows = evaluate(args.checkpoint, args.train, args.val, args.label or [None], args.layers, args.device)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"engine/evaluate.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{args.checkpoint}, probed on {args.val}")
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
