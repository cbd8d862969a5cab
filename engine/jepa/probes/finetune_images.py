"""Labelled images for training end to end: decoded by Pillow, augmented by timm, delivered by torch's DataLoader.

Which images a micro-batch holds and how they are augmented is a function of (seed, epoch, image), so that a run may go
on at any step. Legend: B images, S pixels a side.
"""

import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jepa.config.schema import Config
from jepa.data.sources import ImageSource

from .finetune_settings import Settings
from .picture_files import DAMAGED

CROP = 224 / 256  # validation shows the middle of an image, this part of its shorter side
UNKNOWN = -1  # the label of what is not to be counted
ORDER, IMAGE, BATCH = 0, 1, 2  # what is drawn at random: the first number after the seed in `seeded`

Transform = Callable[[Image.Image], Tensor]
Item = tuple[Tensor, int, list[int]]
Batch = tuple[Tensor, Tensor, list[int]]


def seeded(*numbers: int) -> None:
    """Seeds the three global generators that timm's and torch's parts draw from."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm draws from this one
    torch.manual_seed(seed)


def decode(source: ImageSource, i: int) -> Image.Image | None:
    """Image i in RGB, as it is stored (EXIF orientation is ignored); None if it is missing or broken.

    Raises ValueError if the storage is at fault.
    """
    try:
        encoded = source.read(i).tobytes()
    except OSError:
        return None
    try:
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except DAMAGED:
        return None


def transforms(config: Config, settings: Settings) -> tuple[Transform, Transform]:
    """For training and for validation: an image to fp32 [3, S, S], normalised by the config's mean and deviation."""
    data = config.data
    common = {"mean": data.mean, "std": data.std, "interpolation": "bicubic"}
    training = create_transform(
        data.crop_size,
        is_training=True,
        scale=(settings.crop_scale, 1.0),
        color_jitter=None,
        auto_augment=None if settings.randaugment == "none" else settings.randaugment,
        re_prob=settings.erasing,
        re_mode="pixel",
        **common,
    )
    for policy in training.transforms:
        if isinstance(policy, RandAugment):
            for op in policy.ops:
                if op.name.startswith("Posterize"):
                    op.level_fn = partial(_one_bit_at_least, op.level_fn)
    return training, create_transform(data.crop_size, crop_pct=CROP, **common)


def _one_bit_at_least(bits: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    """At the strongest level timm keeps no bit. Pillow 13 refuses that, and earlier ones gave a black image."""
    return (max(1, *bits(level, hparams)),)


class TrainImages(Dataset):
    """Item (epoch, place) is the image at that place of `indices`, augmented: fp32 [3, S, S], its label, broken images.

    A broken image is replaced by the next good one, with that one's label. Raises ValueError if none is good.
    """

    def __init__(
        self, source: ImageSource, labels: np.ndarray, indices: np.ndarray, transform: Transform, seed: int
    ) -> None:
        self.source, self.labels, self.indices, self.transform, self.seed = source, labels, indices, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, place = key
        broken: list[int] = []
        for offset in range(len(self.indices)):
            i = int(self.indices[(place + offset) % len(self.indices)])
            if (image := decode(self.source, i)) is not None:
                seeded(self.seed, IMAGE, epoch, i)
                return self.transform(image), int(self.labels[i]), broken
            broken.append(i)
        raise ValueError(f"{self.source.path}: none of the {len(broken)} training images can be decoded")


class ValImages(Dataset):
    """Item i is image i and its label; of a broken one, or beyond the last, zeros and UNKNOWN."""

    def __init__(self, source: ImageSource, labels: np.ndarray, transform: Transform, size: int) -> None:
        self.source, self.labels, self.transform, self.size = source, labels, transform, size

    def __getitem__(self, i: int) -> Item:
        image = decode(self.source, i) if i < len(self.source) else None
        if image is None:
            return torch.zeros(3, self.size, self.size), UNKNOWN, [i] if i < len(self.source) else []
        return self.transform(image), int(self.labels[i]), []


@dataclass(frozen=True)
class Split:
    """How a step's images are shared: `accumulation` micro-batches of `micro` images on each of `ranks`."""

    micro: int
    accumulation: int
    ranks: int

    @classmethod
    def of(cls, batch: int, ranks: int, largest: int, even: bool) -> "Split":
        """As large as possible, up to `largest` images. Raises ValueError if `batch` cannot be shared equally."""
        share, rest = divmod(batch, ranks)
        sizes = [n for n in range(1, min(share, largest) + 1) if share % n == 0 and not (even and n % 2)]
        if rest or not sizes:
            pairs = " x 2, as mixup and cutmix take pairs of images" if even else ""
            raise ValueError(
                f"--batch {batch} in micro-batches of at most {largest}: wanted a multiple of {ranks} ranks{pairs}"
            )
        return cls(sizes[-1], share // sizes[-1], ranks)

    @property
    def batch(self) -> int:
        return self.micro * self.accumulation * self.ranks

    def piece(self, number: int, rank: int) -> int:
        """Which of its step's micro-batches a rank's micro-batch `number` is; other ranks have the others."""
        return number * self.ranks + rank


@dataclass(frozen=True)
class Order:
    """The keys of a rank's micro-batches from step `first` to the end. Every epoch shuffles anew; its rest is left out.

    Step s of an epoch holds the same images whatever the split.
    """

    images: int
    epochs: int
    split: Split
    rank: int
    seed: int
    first: int = 0

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.images // self.split.batch

    def __len__(self) -> int:
        return (self.epochs * self.steps - self.first) * self.split.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.first // self.steps, self.epochs):
            places = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.images)
            for step in range(max(0, self.first - epoch * self.steps), self.steps):
                for number in range(self.split.accumulation):
                    start = step * self.split.batch + self.split.piece(number, self.rank) * self.split.micro
                    yield [(epoch, place) for place in places[start : start + self.split.micro].tolist()]


def train_loader(images: TrainImages, order: Order, workers: int, pin: bool) -> DataLoader:
    """Yields images fp32 [B, 3, S, S], labels int64 [B] and the broken images that were met."""
    return DataLoader(images, batch_sampler=order, num_workers=workers, collate_fn=_join, pin_memory=pin)


def val_loader(images: ValImages, batch: int, rank: int, ranks: int, workers: int, pin: bool) -> DataLoader:
    """A rank's share, each image once. All ranks get as many batches: ZeRO-3 gathers weights in each."""
    padded = -(-len(images.source) // ranks) * ranks
    share = range(rank, padded, ranks)
    return DataLoader(images, batch, sampler=share, num_workers=workers, collate_fn=_join, pin_memory=pin)


def _join(items: Sequence[Item]) -> Batch:
    images, labels, broken = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), [i for found in broken for i in found]
