"""Objects in images in COCO's layout, and the average precision of what is found of them."""

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from .picture_files import open_picture

Target = dict[str, Tensor]
SURE = 0.5  # probability from which on a pixel belongs to an object


def open_layout(root: Path) -> tuple[COCO, COCO]:
    """ROOT/annotations/instances_{train,val}2017.json. Raises ValueError if something is missing or does not fit."""
    sets = []
    for split in ("train2017", "val2017"):
        folder, table = root / split, table_of(root, split)
        for path, found in ((folder, folder.is_dir()), (table, table.is_file())):
            if not found:
                raise ValueError(f"{root} is not in COCO's layout: there is no {path}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                coco = COCO(str(table))
            names, instances = [image["file_name"] for image in coco.imgs.values()], [*coco.anns.values()]
            scored = [each["segmentation"] for each in instances if not each["iscrowd"]]
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            wanted = "wanted COCO's images, annotations (with segmentation and iscrowd) and categories"
            raise ValueError(f"{table}: {type(error).__name__}: {error}; {wanted}") from error
        if not scored or not coco.cats:
            raise ValueError(f"{table} has {len(scored)} objects of {len(coco.cats)} categories; wanted some")
        present = set(os.listdir(folder))
        if missing := [name for name in names if name not in present]:
            raise ValueError(f"{folder} lacks {len(missing)} of {len(names)} images, for example {missing[0]}")
        sets.append(coco)
    train, val = sets
    if train.getCatIds() != val.getCatIds():
        raise ValueError(f"{root}: the categories of training and validation differ; wanted the same numbers in both")
    return train, val


def table_of(root: Path, split: str) -> Path:
    """The file of annotations of train2017 or val2017."""
    return root / f"annotations/instances_{split}.json"


def categories(coco: COCO) -> list[int]:
    """The categories' numbers in COCO, which have gaps, in order: class c of the detector, from 1, is number c - 1."""
    return sorted(coco.getCatIds())


def objects(coco: COCO, number: int) -> Target:
    """What image `number` shows, but for crowds: `masks` uint8 [N, H, W] and `labels` int64 [N]."""
    (about,) = coco.loadImgs(number)
    classes = {category: c for c, category in enumerate(categories(coco), 1)}
    found = coco.loadAnns(coco.getAnnIds(number, iscrowd=False))
    masks = [torch.from_numpy(coco.annToMask(each)) for each in found]
    return {
        "masks": torch.stack(masks) if masks else torch.zeros(0, about["height"], about["width"], dtype=torch.uint8),
        "labels": torch.tensor([classes[each["category_id"]] for each in found], dtype=torch.int64),
    }


class Images(Dataset):
    """The images by their numbers, uint8 [3, H, W]."""

    def __init__(self, coco: COCO, folder: Path) -> None:
        self.coco, self.folder = coco, folder

    def __getitem__(self, number: int) -> Tensor:
        (about,) = self.coco.loadImgs(number)
        path = self.folder / about["file_name"]
        image = torch.from_numpy(np.array(open_picture(path).convert("RGB"))).permute(2, 0, 1)
        H, W = image.shape[1:]
        if (about["height"], about["width"]) != (H, W):
            raise ValueError(
                f"{path} has {H} x {W} pixels, and {about['height']} x {about['width']} in the annotations"
            )
        return image


class Augmented(Dataset):
    """Training images with at least one object, as squares: (uint8 [3, S, S], {boxes, masks, labels})."""

    def __init__(self, coco: COCO, folder: Path, augment: Callable[..., Any]) -> None:
        self.coco, self.images, self.augment = coco, Images(coco, folder), augment
        self.numbers = sorted({each["image_id"] for each in coco.anns.values() if not each["iscrowd"]})
        self.files = [folder / about["file_name"] for about in coco.loadImgs(self.numbers)]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        image, target = self.images[self.numbers[i]], objects(self.coco, self.numbers[i])
        image, masks = self.augment(tv_tensors.Image(image), tv_tensors.Mask(target["masks"]))
        left = masks.bool().flatten(1).any(1)  # of the objects, after the crop
        masks = masks[left]
        return image, {"boxes": around(masks), "masks": masks, "labels": target["labels"][left]}


def augmentation(size: int, scales: tuple[float, float], mean: list[float] | tuple[float, ...]) -> v2.Compose:
    """Scale jitter (Ghiasi et al. 2021, arXiv 2012.07177), as in ViTDet: a crop of an image made larger or smaller."""
    grey = {tv_tensors.Image: [round(255 * value) for value in mean], tv_tensors.Mask: 0}
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.ScaleJitter((size, size), tuple(scales), antialias=True),
            v2.RandomCrop(size, pad_if_needed=True, fill=grey),
            v2.ToPureTensor(),
        ]
    )


def around(masks: Tensor) -> Tensor:
    """Boxes fp32 [N, 4] (left, top, right, bottom, in pixels' edges) around masks [N, H, W], none of which is empty."""
    return masks_to_boxes(masks).float() + torch.tensor([0.0, 0.0, 1.0, 1.0])


def annotations(found: Target, number: int, coco: COCO) -> list[dict[str, Any]]:
    """A detector's findings in image `number`, as entries of COCO's results."""
    boxes, masks = found["boxes"].cpu(), (found["masks"][:, 0] >= SURE).cpu().numpy().astype(np.uint8)
    left, top, right, bottom = boxes.unbind(1)
    sizes = torch.stack([left, top, right - left, bottom - top], 1).tolist()
    return [
        {
            "image_id": number,
            "category_id": categories(coco)[label - 1],
            "bbox": box,
            "score": score,
            "segmentation": run_lengths.encode(np.asfortranarray(mask)),
        }
        for box, label, score, mask in zip(
            sizes, found["labels"].tolist(), found["scores"].tolist(), masks, strict=True
        )
    ]


def average_precision(truth: COCO, found: list[dict[str, Any]]) -> dict[str, float]:
    """{"box AP", "mask AP"} in percent: COCO's, at overlaps of .5 to .95, of objects of all sizes, 100 an image."""
    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):
        answers = COCO()
        entries = [
            {"id": i, "iscrowd": 0, "area": each["bbox"][2] * each["bbox"][3], **each}
            for i, each in enumerate(found, 1)
        ]
        answers.dataset = {key: truth.dataset[key] for key in ("images", "categories")} | {"annotations": entries}
        answers.createIndex()
        for name, kind in (("box AP", "bbox"), ("mask AP", "segm")):
            judge = COCOeval(truth, answers, kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            scores[name] = 100 * float(judge.stats[0])
    return scores
