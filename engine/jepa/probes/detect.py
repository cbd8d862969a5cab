"""Object detection and instance segmentation in COCO's layout, as average precision (AP) of boxes and masks.

    ROOT/{train2017,val2017}/*.jpg
    ROOT/annotations/instances_{train,val}2017.json     outlines as polygons or run lengths; numbers may have gaps

torchvision's Mask R-CNN on the encoder through ViTDet's simple feature pyramid; all weights are trained. Images with
objects are trained on at random --scale of --size, cropped or padded to a square of --size; the learning rate falls to
a tenth at 8/9 of the training and to a hundredth at 26/27. Validation images are resized to a longer side of --size and
padded below or to the right; AP is pycocotools', of all of them together, over overlaps of .5 to .95. Crowds are not
learned and, as COCO has it, count neither as missed nor as false. --precision bf16 also holds for training: of the
encoder and the pyramid, by autocast.

Sources: ViTDet, arXiv 2203.16527, with attention in all blocks global. Positions are those of the training crop's area,
computed for the patches of --size.
"""

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn

from jepa.pictures.detection import Objects, detection
from jepa.ranks.stop import StopRequest

from . import coco, fit
from .drawing import draw
from .drop_path import drop_path
from .fingerprint import fingerprint
from .job import Job, Result, Row, Subject
from .mask_rcnn import mask_rcnn, stride_of

WARMUP = 250
SHOWN, SCORE = 4, 0.5  # validation images in the picture; the least score of what is shown in them


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="ROOT", help="a data set in COCO's layout")
    parser.add_argument("--size", type=int, default=1024, help="pixels, rounded up to 4 patches (default: 1024)")
    parser.add_argument("--channels", type=int, default=256, help="of pyramid and heads (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, nargs=2, default=[0.1, 2.0], metavar=("LOW", "HIGH"), help="default: 0.1 2"
    )
    parser.add_argument("--epochs", type=float, default=25)
    parser.add_argument("--lr", type=float, default=1e-4)
    fit.arguments(parser, weight_decay=0.1, warmup=WARMUP)


def run(job: Job, args: argparse.Namespace) -> Result:
    fit.check(args)
    if args.scale[0] > args.scale[1]:
        raise ValueError(f"--scale {args.scale[0]:g} {args.scale[1]:g}: wanted the smaller one first")
    train, val = coco.open_layout(args.data)
    unit = 4 * stride_of(job.subjects[0].encoder)
    args.size = -(-args.size // unit) * unit
    mean = job.config.data.mean
    data = coco.Augmented(train, args.data / "train2017", coco.augmentation(args.size, args.scale, mean))
    args.steps = max(1, round(args.epochs * len(data) / args.batch))
    args.warmup = fit.warmup(args.warmup, WARMUP, args.steps)
    files = fingerprint(job, [coco.table_of(args.data, "train2017"), *data.files])
    rows: list[Row] = []
    models: dict[str, nn.Module] = {}
    with StopRequest(job.ranks, args.max_minutes) as stop:
        for subject in job.subjects:
            model = build(subject, len(coco.categories(train)), mean, args)
            path = job.out / "detect" / f"{subject.key}.pt"
            fit.fit(job, path, f"detect, {subject.name}", model, data, loss_of, steps_down, args, files, stop)
            rows.append({"features": subject.name, **evaluate(job, model, val, args, stop)})
            models[subject.name] = model
    path = job.out / "detect.png"
    draw(job, path, lambda: picture(path, models, val, args.data / "val2017"))
    papers = (len(train.imgs), len(val.imgs), len(val.cats)) == (118_287, 5_000, 80)
    return Result(rows, "COCO" if papers else None)


def build(subject: Subject, classes: int, mean: tuple[float, ...] | list[float], args: argparse.Namespace) -> nn.Module:
    """A detector whose parts but the encoder are the same for all subjects."""
    encoder = copy.deepcopy(subject.encoder).float().requires_grad_(True)
    encoder.checkpointing = args.checkpointing
    drop_path(encoder, args.drop_path)
    torch.manual_seed(args.seed)
    return mask_rcnn(encoder, classes, args.size, args.channels, mean, args.precision == "bf16")


def steps_down(done: float) -> float:
    return 1.0 if done < 8 / 9 else 0.1 if done < 26 / 27 else 0.01


def loss_of(model: nn.Module, samples: list[tuple[Tensor, coco.Target]]) -> Tensor:
    """The sum of Mask R-CNN's five losses."""
    device = next(model.parameters()).device
    images = [image.to(device) for image, _ in samples]
    targets = [{name: value.to(device) for name, value in target.items()} for _, target in samples]
    return sum(model(images, targets).values(), torch.zeros((), device=device))


@torch.no_grad()
def evaluate(
    job: Job, model: nn.Module, val: COCO, args: argparse.Namespace, stop: StopRequest | None = None
) -> dict[str, float]:
    """box AP and mask AP of all ranks' shares together, in percent."""
    model.to(job.ranks.device).eval()
    found, images = [], coco.Images(val, args.data / "val2017")
    for number, image in fit.shared_out(job, "detect", images, sorted(val.imgs), args.workers, stop):
        found += coco.annotations(model([image.to(job.ranks.device)])[0], number, val)
    everything = sorted((each for part in job.gather(found) for each in part), key=lambda each: each["image_id"])
    scores: dict[str, float] = {}
    job.first_only(lambda: scores.update(coco.average_precision(val, everything)))
    return job.gather(scores)[0]


@torch.no_grad()
def picture(path: Path, models: Mapping[str, nn.Module], val: COCO, folder: Path) -> None:
    """The first validation images with objects, and what the models find in them, written to `path`."""
    numbers = sorted({each["image_id"] for each in val.anns.values() if not each["iscrowd"]})[:SHOWN]
    images = [coco.Images(val, folder)[number] for number in numbers]
    truth = [coco.objects(val, number) for number in numbers]
    columns = {"truth": [_objects(each | {"boxes": coco.around(each["masks"])}, val) for each in truth]}
    for name, model in models.items():
        device = next(model.parameters()).device
        columns[name] = [_objects(_surely(model([image.to(device)])[0]), val) for image in images]
    detection([image.permute(1, 2, 0).numpy() for image in images], columns, path)


def _surely(found: coco.Target) -> coco.Target:
    sure = found["scores"] > SCORE
    return {name: value[sure] for name, value in found.items()} | {"masks": found["masks"][sure, 0] >= coco.SURE}


def _objects(target: coco.Target, val: COCO) -> Objects:
    names = [val.cats[number]["name"] for number in coco.categories(val)]
    labels = target["labels"].tolist()
    scores = [f" {score:.2f}" for score in target["scores"].tolist()] if "scores" in target else [""] * len(labels)
    captions = [names[label - 1] + score for label, score in zip(labels, scores, strict=True)]
    return Objects(target["boxes"].cpu().numpy(), target["masks"].cpu().numpy().astype(bool), labels, captions)
