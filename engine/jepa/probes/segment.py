"""Semantic segmentation in ADE20K's layout, as mean intersection over union (mIoU).

    ROOT/images/{training,validation}/*.jpg
    ROOT/annotations/{training,validation}/*.png    uint8, named as the images: 0 unlabelled, 1 to 150 the classes

--head upernet (the papers'): UPerNet on blocks at 1/4, 1/2, 3/4 and all of the depth; all weights are trained.
--head linear: batch norm and a 1 x 1 convolution on the last block, or the last --layers, of the frozen encoder.

Images are trained on at half to twice --size (shorter side), cropped to --size and flipped at random. They are
validated with a shorter side of --size, in square windows that overlap by a third or more, whose scores are averaged
and resized to the annotation. The mIoU is that of all validation pixels together (not the mean over images), by
torchmetrics: unlabelled pixels do not count, a class that is neither present nor predicted anywhere does not either,
and one that is predicted but not present counts as 0. --precision bf16 also holds for training, by autocast.

Sources: UPerNet, arXiv 1807.10221; settings and windows of BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377), without
their auxiliary head. Positions are those of the training crop's area, computed for the patches of --size.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision import tv_tensors
from torchvision.transforms import v2

from jepa.model.vit import VisionTransformer
from jepa.pictures.segmentation import segmentation
from jepa.ranks.stop import StopRequest

from . import fit
from .drawing import draw
from .drop_path import drop_path
from .fingerprint import fingerprint
from .job import Job, Result, Row, Subject
from .picture_files import open_picture
from .upernet import Linear, UPerNet

WARMUP = 1500
DEFAULTS = {"upernet": (160_000, 1e-4), "linear": (40_000, 1e-3)}  # steps and learning rate
IGNORED = 255
SHOWN = 4  # validation images in the picture


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="ROOT", help="a data set in ADE20K's layout")
    parser.add_argument("--head", choices=tuple(DEFAULTS), default="upernet")
    parser.add_argument("--layers", type=int, default=1, metavar="L", help="of --head linear: the last L blocks")
    parser.add_argument("--channels", type=int, default=512, help="of UPerNet (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--size", type=int, default=512, help="pixels, rounded up to whole patches (default: 512)")
    parser.add_argument("--steps", type=int, help="default: 160000, or 40000 with --head linear")
    parser.add_argument("--lr", type=float, help="default: 1e-4, or 1e-3 with --head linear")
    fit.arguments(parser, weight_decay=0.05, warmup=WARMUP)


def run(job: Job, args: argparse.Namespace) -> Result:
    fit.check(args)
    train, val = open_layout(args.data)
    patch = job.config.mask.patch_size
    steps, lr = DEFAULTS[args.head]
    args.steps = steps if args.steps is None else args.steps
    args.lr = lr if args.lr is None else args.lr
    args.warmup = fit.warmup(args.warmup, WARMUP, args.steps)
    args.size = -(-args.size // patch) * patch
    shares = 1 if job.ranks.device.type == "cuda" else job.ranks.world_size  # jepa.probes.fit, of batch norm
    if args.head == "upernet" and args.batch < 2 * shares:
        raise ValueError(f"--batch {args.batch}: wanted {2 * shares} or more: UPerNet's batch norm needs two images")
    files = fingerprint(job, [path for pair in train for path in (pair.image, pair.annotation)])
    sample = Annotated(train, args.classes, augmentation(args.size, job.config.data.mean))
    judged = Annotated(val, args.classes)
    rows: list[Row] = []
    models: dict[str, nn.Module] = {}
    with StopRequest(job.ranks, args.max_minutes) as stop:
        for subject in job.subjects:
            model, name = build(subject, args), f"segment, {subject.name}"
            path = job.out / "segment" / f"{subject.key}.pt"
            fit.fit(job, path, name, model, sample, loss_of, lambda done: 1 - done, args, files, stop)
            rows.append({"features": subject.name, "mIoU": 100 * evaluate(job, model, judged, args, stop)})
            models[subject.name] = model
    path = job.out / "segment.png"
    draw(job, path, lambda: picture(path, models, Annotated(val[:SHOWN], args.classes), args.size))
    papers = args.head == "upernet" and (len(train), len(val), args.classes) == (20_210, 2_000, 150)
    return Result(rows, "ADE20K" if papers else None)


@dataclass(frozen=True)
class Pair:
    image: Path
    annotation: Path


def open_layout(root: Path) -> list[list[Pair]]:
    """The training and validation images with their annotations, by name. Raises ValueError if there are none."""
    sets = []
    for split in ("training", "validation"):
        images, annotations = root / "images" / split, root / "annotations" / split
        for folder, kind in ((images, "*.jpg"), (annotations, "*.png")):
            if not any(folder.glob(kind)):
                raise ValueError(f"{root} is not in ADE20K's layout: there is no {folder}/{kind}")
        pairs = [Pair(image, annotations / f"{image.stem}.png") for image in sorted(images.glob("*.jpg"))]
        labelled = {path.stem for path in annotations.glob("*.png")}
        if missing := [pair for pair in pairs if pair.image.stem not in labelled]:
            raise ValueError(
                f"{len(missing)} of {len(pairs)} images have no annotation, for example {missing[0].image}"
            )
        sets.append(pairs)
    return sets


Sample = tuple[Tensor, Tensor]


class Annotated(Dataset):
    """Samples (image uint8 [3, H, W], labels uint8 [H, W] from 0, IGNORED where there is none).

    Raises ValueError if an annotation is of another size than its image, or names a class that there is not.
    """

    def __init__(self, pairs: list[Pair], classes: int, augment: Callable[..., Sample] | None = None) -> None:
        self.pairs, self.classes, self.augment = pairs, classes, augment

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Sample:
        pair = self.pairs[i]
        image = torch.from_numpy(np.array(open_picture(pair.image).convert("RGB"))).permute(2, 0, 1)
        labels = torch.from_numpy(np.array(open_picture(pair.annotation)))
        if labels.dtype != torch.uint8 or labels.shape != image.shape[1:]:
            raise ValueError(
                f"{pair.annotation}: {labels.dtype} {list(labels.shape)}, wanted one 8-bit number for each of the "
                f"{image.shape[1]} x {image.shape[2]} pixels of {pair.image.name}"
            )
        labels = labels.where(labels == IGNORED, labels - 1)  # uint8: 0 becomes 255
        if (most := int(labels.where(labels != IGNORED, 0).max())) >= self.classes:
            raise ValueError(f"{pair.annotation} has class {most + 1}, wanted 0 to {self.classes} (--classes)")
        return self.augment(tv_tensors.Image(image), tv_tensors.Mask(labels)) if self.augment else (image, labels)


def augmentation(size: int, mean: tuple[float, ...] | list[float]) -> v2.Compose:
    grey = [round(255 * value) for value in mean]
    return v2.Compose(
        [
            v2.RandomResize(size // 2, 2 * size, antialias=True),
            v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: grey, tv_tensors.Mask: IGNORED}),
            v2.RandomHorizontalFlip(),
            v2.ToPureTensor(),
        ]
    )


class Segmenter(nn.Module):
    """uint8 images [B, 3, S, S] -> scores fp32 [B, K, S, S], from the outputs of the blocks `layers`."""

    def __init__(self, encoder: VisionTransformer, layers: list[int], head: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.encoder, self.layers, self.head, self.bf16 = encoder, layers, head, bf16

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            side = images.shape[2] // self.encoder.patch_embed.patch_size
            outputs = self.encoder.features(images.permute(0, 2, 3, 1).contiguous(), self.layers)
            scores = self.head([x.transpose(1, 2).unflatten(2, (side, side)) for x in outputs])
        return F.interpolate(scores.float(), images.shape[2:], mode="bilinear", align_corners=False)


def build(subject: Subject, args: argparse.Namespace) -> Segmenter:
    """A fresh head, the same for all subjects, on a copy of the subject's encoder."""
    encoder = copy.deepcopy(subject.encoder)
    depth, dim = len(encoder.blocks), encoder.embed_dim
    if args.size != encoder.img_size:
        encoder.allow(args.size)
    torch.manual_seed(args.seed)
    if args.head == "linear":
        if not 1 <= args.layers <= depth:
            raise ValueError(f"--layers: given {args.layers}, wanted 1 to {depth}, the blocks of this encoder")
        layers = list(range(depth - args.layers, depth))
        head: nn.Module = Linear(dim, args.layers, args.classes)
    else:
        encoder.float().requires_grad_(True)
        encoder.checkpointing = args.checkpointing
        drop_path(encoder, args.drop_path)
        layers = [-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]
        head = UPerNet(dim, args.channels, args.classes)
    return Segmenter(encoder, layers, head, args.precision == "bf16")


def loss_of(model: nn.Module, samples: list[Sample]) -> Tensor:
    """Cross-entropy, the mean over the labelled pixels."""
    images, labels = (torch.stack(parts) for parts in zip(*samples, strict=True))
    device = next(model.parameters()).device
    labels = labels.to(device).long()
    total = F.cross_entropy(model(images.to(device)), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp_min(1)


@torch.no_grad()
def evaluate(
    job: Job, model: nn.Module, data: Annotated, args: argparse.Namespace, stop: StopRequest | None = None
) -> float:
    """The mIoU of all ranks' shares together, 0 to 1."""
    model.to(job.ranks.device).eval()
    metric = MulticlassJaccardIndex(args.classes, ignore_index=IGNORED, validate_args=False).to(job.ranks.device)
    for _, (image, labels) in fit.shared_out(job, "segment", data, range(len(data)), args.workers, stop):
        metric.update(predict(model, image, args.size)[None], labels[None].to(job.ranks.device))
    return float(metric.compute())


@torch.no_grad()
def predict(model: nn.Module, image: Tensor, size: int) -> Tensor:
    """The classes, int64 [H, W], of an image uint8 [3, H, W], from windows of `size` pixels."""
    H, W = image.shape[1:]
    device = next(model.parameters()).device
    resized = v2.functional.resize(image.to(device), [size], antialias=True)  # the shorter side
    windows = [
        (..., slice(top, top + size), slice(left, left + size))
        for top in starts(resized.shape[1], size)
        for left in starts(resized.shape[2], size)
    ]
    scores = model(torch.stack([resized[window] for window in windows]))
    total = scores.new_zeros(scores.shape[1], *resized.shape[1:])
    count = scores.new_zeros(resized.shape[1:])
    for window, part in zip(windows, scores, strict=True):
        total[window] += part
        count[window] += 1
    return F.interpolate((total / count)[None], (H, W), mode="bilinear", align_corners=False)[0].argmax(0)


def starts(length: int, size: int) -> list[int]:
    """Where windows begin that cover `length` pixels, evenly and two thirds of `size` apart at most."""
    steps = -(-(length - size) // max(1, 2 * size // 3))
    return [round((length - size) * i / max(1, steps)) for i in range(steps + 1)]


def picture(path: Path, models: Mapping[str, nn.Module], data: Annotated, size: int) -> None:
    """The images of `data`, their classes, and what the models say, written to `path`."""
    samples = [data[i] for i in range(len(data))]
    found = {
        name: [predict(model, image, size).cpu().numpy() for image, _ in samples] for name, model in models.items()
    }
    images = [image.permute(1, 2, 0).numpy() for image, _ in samples]
    segmentation(images, [labels.numpy() for _, labels in samples], found, path)
