"""Frozen features of a set of images, stored in files that the probes read piece by piece.

    python engine/evaluate.py features runs/demo/jepa-latest --images data/demo

One pass of the encoder over the images, shared by all ranks. Features are float32 (an untrained encoder's differ by
less than float16 resolves) and lie in --store, in a folder named after the weights, the images (names, sizes, times of
change) and the crop: for each block of the encoder its rows, and which images are done. A pass that was interrupted
goes on, also on another number of ranks, and whoever needs the same features reads them. Memory does not grow with the
number of images.

Legend: S usable images, D width, N patches.
"""

import argparse
import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.data.loader import eval_batches
from jepa.data.sources import ImageSource, open_images
from jepa.model.vit import VisionTransformer

from .job import Job, Progress, Result, Row, Subject
from .labels import suffixes_argument

BROKEN = "the features contain NaN or infinity: a broken encoder cannot be probed"
PENDING, DONE, BAD = 0, 1, 2  # of an image


class Pixels(nn.Module):
    """The images themselves as features, averaged down to 16 x 16 pixels, with an encoder's interface."""

    embed_dim = 768
    blocks = (None,)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> [B, 1, 768]."""
        return F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2) / 255.0, 16).flatten(1)[:, None]

    def features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The same for each layer asked for."""
        return [self(images)] * len(layers)


def pixels() -> Subject:
    return Subject("pixels", cast(VisionTransformer, Pixels()), "pixels")


@dataclass(frozen=True)
class Features:
    """Rows of stored features: `features[i:j]` or `features[indices]` is float32 [n, D], blocks side by side.

    `numbers`: int64 [S], which image each row belongs to; those that could not be decoded have none.
    """

    blocks: list[tuple[mmap.mmap, np.ndarray]]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.numbers), sum(rows.shape[1] for _, rows in self.blocks)

    def only(self, images: np.ndarray) -> "Features":
        """The rows of these images alone."""
        return Features(self.blocks, self.numbers[np.isin(self.numbers, images)])

    def __getitem__(self, rows: slice | np.ndarray | Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            rows = rows.cpu().numpy()
        chosen = self.numbers[rows]
        found = np.concatenate([block[chosen] for _, block in self.blocks], axis=1)
        for file, _ in self.blocks:
            file.madvise(mmap.MADV_DONTNEED)  # else the process would grow to the size of the files
        return torch.from_numpy(found)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", action="append", required=True, metavar="IMAGES", help="may be repeated")
    suffixes_argument(parser)
    parser.add_argument("--patches", action="store_true", help="every patch's features instead of their mean")
    shared_arguments(parser)


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every protocol that reads stored features."""
    parser.add_argument("--layers", type=int, default=1, help="number of last blocks side by side (default: 1)")
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="where features lie (default: --out/features)")
    parser.add_argument("--encoder-batch", type=int, help="images at once (default: data.batch_size of the run)")


def run(job: Job, args: argparse.Namespace) -> Result:
    """Stores the features; the figures are the usable images in percent."""
    sources = [open_images(path, args.suffixes) for path in args.images]
    rows: list[Row] = []
    for subject in job.subjects:
        found = [features(job, subject, source, args, pooled=not args.patches) for source in sources]
        usable = {s.path: 100 * len(f) / len(s) for s, f in zip(sources, found, strict=True)}
        rows.append({"features": subject.name, **usable})
    return Result(rows)


def features(
    job: Job,
    subject: Subject,
    source: ImageSource,
    args: argparse.Namespace,
    *,
    pooled: bool = True,
    chosen: np.ndarray | None = None,
) -> Features:
    """Reads a subject's features of all images, or of those chosen by index, after storing those that are missing.

    `pooled`: the mean over an image's patches, as in I-JEPA; else all N patches in a row of N * D numbers.
    `args`: those of `shared_arguments`. Every rank calls it. Raises ValueError for more layers than there are blocks,
    for features that are not finite, for images of which none can be decoded, and for a folder that cannot be written.
    """
    depth = len(subject.encoder.blocks)
    if args.encoder_batch is not None and args.encoder_batch < 1:
        raise ValueError(f"--encoder-batch {args.encoder_batch}: wanted at least 1")
    if isinstance(subject.encoder, Pixels):
        layers = [0]
    elif 1 <= args.layers <= depth:
        layers = list(range(depth - args.layers, depth))
    else:
        raise ValueError(f"--layers {args.layers}: must be from 1 to the encoder's {depth} blocks")
    config, dtype = job.config, next((str(p.dtype) for p in subject.encoder.parameters()), "none")
    about = {"weights": subject.key, "precision": dtype, "crop": config.data.crop_size, "pooled": pooled}
    about |= source.fingerprint | {"contents": job.of_first(lambda: source.contents)}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = (args.store or job.out / "features") / f"{subject.key}-{name}"
    width = subject.encoder.embed_dim * (1 if pooled else _patches(subject, config.data.crop_size))
    store = Store(folder, layers, len(source), width)
    job.first_only(lambda: store.create({"path": source.path, **about}))
    pending = job.of_first(store.pending)  # a rank that looks later may miss what the others are doing
    if chosen is not None:
        pending = np.intersect1d(pending, chosen)
    if len(pending):
        _fill(job, subject, source, args, store, np.array_split(pending, job.ranks.world_size)[job.ranks.rank], pooled)
    dist.barrier(group=job.ranks.cpu_group)
    found = store.read() if chosen is None else store.read().only(chosen)
    if not len(found):
        number = len(source) if chosen is None else len(chosen)
        raise ValueError(f"none of the {number} images of {source.path} can be decoded")
    return found


def _fill(
    job: Job,
    subject: Subject,
    source: ImageSource,
    args: argparse.Namespace,
    store: "Store",
    mine: np.ndarray,
    pooled: bool,
) -> None:
    config, left = job.config, set(mine.tolist())
    progress = Progress(job.say, subject.name, len(mine), "images")
    progress.at(0)
    batches = eval_batches(
        source,
        crop_size=config.data.crop_size,
        batch_size=args.encoder_batch or config.data.batch_size,
        indices=mine.tolist(),
        device=job.ranks.device,
        decoder=config.decoder,
        num_workers=config.data.num_workers,
    )
    for images, numbers in batches:
        with torch.no_grad():
            outputs = subject.encoder.features(images, store.layers)
        store.write(numbers, [(x.float().mean(1) if pooled else x.flatten(1)).cpu() for x in outputs])
        left -= set(numbers)
        progress.at(len(mine) - len(left))
    store.mark(sorted(left), BAD)


class Store:
    """The files of one folder: `block-I.f32`, rows of float32, and `block-I.state`, a byte per image."""

    def __init__(self, folder: Path, layers: list[int], images: int, width: int) -> None:
        self.folder, self.layers, self.images, self.width = folder, layers, images, width

    def create(self, about: dict[str, object]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")
            for layer in self.layers:
                sizes = {self._state(layer): self.images, self._rows(layer): 4 * self.images * self.width}
                if any(not path.exists() or path.stat().st_size != size for path, size in sizes.items()):
                    for path, size in sizes.items():  # the state first: it never speaks of rows that are not there
                        with open(path, "wb") as file:
                            file.truncate(size)
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> ValueError:
        return ValueError(f"{self.folder} cannot be written ({error.strerror}); choose another --store")

    def state(self) -> np.ndarray:
        """uint8 [layers, images]."""
        return np.stack([np.fromfile(self._state(layer), np.uint8) for layer in self.layers])

    def pending(self) -> np.ndarray:
        """The images of which a block's row is not there yet."""
        return np.flatnonzero((self.state() == PENDING).any(0))

    def write(self, numbers: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Rows [b, D] of each layer. They are marked done after they are written: a crash between costs their work."""
        for layer, x in zip(self.layers, rows, strict=True):
            if not x.isfinite().all():
                raise ValueError(BROKEN)
            try:
                with open(self._rows(layer), "r+b", buffering=0) as file:
                    for number, row in zip(numbers, x.numpy(), strict=True):
                        os.pwrite(file.fileno(), row.tobytes(), 4 * number * self.width)
            except OSError as error:
                raise self._refusal(error) from error
        self.mark(numbers, DONE)

    def mark(self, numbers: Sequence[int], state: int) -> None:
        for layer in self.layers:
            with open(self._state(layer), "r+b", buffering=0) as file:
                for number in numbers:
                    os.pwrite(file.fileno(), bytes([state]), number)

    def read(self) -> Features:
        usable = np.flatnonzero((self.state() == DONE).all(0))
        blocks = []
        for layer in self.layers:
            with open(self._rows(layer), "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            blocks.append((mapped, np.frombuffer(mapped, np.float32).reshape(self.images, self.width)))
        return Features(blocks, usable)

    def _rows(self, layer: int) -> Path:
        return self.folder / f"block-{layer}.f32"

    def _state(self, layer: int) -> Path:
        return self.folder / f"block-{layer}.state"


def _patches(subject: Subject, crop: int) -> int:
    return 1 if isinstance(subject.encoder, Pixels) else (crop // subject.encoder.patch_embed.patch_size) ** 2


def check(train_x: Tensor | Features, train_y: Tensor, test_x: Tensor | Features, test_y: Tensor) -> None:
    """Raises ValueError for shapes that do not match or too few samples."""
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if len(x.shape) != 2 or x.shape[1] != train_x.shape[1] or len(y) != len(x) or y.ndim != 1:
            raise ValueError(
                f"{name}: features {list(x.shape)} and labels {list(y.shape)}, wanted [S, {train_x.shape[-1]}] and [S]"
            )
        if len(x) < (5 if name == "train" else 1):
            raise ValueError(f"{name}: {len(x)} samples; a probe needs at least 5 to train and 1 to test")
        if isinstance(x, Tensor) and not x.isfinite().all():
            raise ValueError(f"{name}: the features contain NaN or infinity: a broken encoder cannot be probed")
