"""Detection in COCO's layout: reading it, average precision, the pyramid, and Mask R-CNN on it."""

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jepa.model.vit import VisionTransformer
from packages import need
from small import run_ranks

need("torchvision", "pycocotools")

from jepa.data.drawn import coco as drawn
from jepa.data.drawn.shapes import Shape
from jepa.probes import coco, detect
from jepa.probes.mask_rcnn import mask_rcnn, stride_of
from jepa.probes.pyramid import SimplePyramid
from jobs import job_of
from probing import alone

TINY = "--size", 48, "--channels", 16, "--batch", 4, "--warmup", 10, "--lr", 5e-3, "--scale", 0.9, 1.1


@pytest.fixture(autouse=True, scope="module")
def group():
    with alone():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "coco"
    drawn.write(folder, random.getrandbits(30), train=48, val=12)
    return folder


def perfect(truth: coco.COCO, number: int, chosen: slice | list[int] = slice(None)) -> dict[str, Tensor]:
    """What a detector that knows the truth says of image `number`; of the objects `chosen` only."""
    target = coco.objects(truth, number)
    labels, masks = target["labels"][chosen], target["masks"][chosen]
    boxes = [each["bbox"] for each in truth.loadAnns(truth.getAnnIds(number, iscrowd=False))]
    left, top, width, height = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)[chosen].unbind(1)
    around = torch.stack([left, top, left + width, top + height], 1)
    return {
        "boxes": around,
        "masks": masks[:, None].float(),
        "labels": labels,
        "scores": 0.5 + 0.5 * torch.rand(len(labels)),
    }


def test_average_precision_of_all_of_some_and_of_nothing(root):
    """If the objects found are found exactly, precision is 1 up to the recall, and 0 above; both sets have crowds."""
    _, val = coco.open_layout(root)
    assert any(each["iscrowd"] for each in val.anns.values())
    everything = [each for number in val.imgs for each in coco.annotations(perfect(val, number), number, val)]
    assert coco.average_precision(val, everything) == pytest.approx({"box AP": 100, "mask AP": 100})
    assert coco.average_precision(val, []) == {"box AP": 0, "mask AP": 0}

    known, found, some = dict.fromkeys(val.cats, 0), dict.fromkeys(val.cats, 0), []
    for each in (one for one in val.anns.values() if not one["iscrowd"]):
        known[each["category_id"]] += 1
    for number in val.imgs:
        count = len(val.getAnnIds(number, iscrowd=False))
        chosen = [i for i in range(count) if random.random() < 0.5]
        some += coco.annotations(perfect(val, number, chosen), number, val)
    for each in some:
        found[each["category_id"]] += 1
    recalls = np.linspace(0, 1, 101)
    wanted = np.mean([(recalls <= found[c] / known[c]).mean() if found[c] else 0 for c in known if known[c]])
    assert coco.average_precision(val, some) == pytest.approx({"box AP": 100 * wanted, "mask AP": 100 * wanted})


def test_average_precision_of_a_box_that_is_off(tmp_path):
    """A box of 100 pixels that is 14 off overlaps by 86 / 114 = .754: right at 6 of the 10 overlaps from .5 to .95."""
    square = {"id": 3, "image_id": 9, "category_id": 40, "iscrowd": 0, "bbox": [50, 50, 100, 100], "area": 10_000,
              "segmentation": [[50, 50, 150, 50, 150, 150, 50, 150]]}  # fmt: skip
    content = {"images": [{"id": 9, "file_name": "9.jpg", "height": 200, "width": 200}], "annotations": [square],
               "categories": [{"id": 40, "name": "square"}, {"id": 7, "name": "never there"}]}  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(content))
    truth = coco.COCO(str(tmp_path / "one.json"))
    mask = torch.zeros(1, 1, 200, 200)
    mask[..., 50:150, 50:150] = 0.6
    found = {
        "boxes": torch.tensor([[64.0, 50, 164, 150]]),
        "masks": mask,
        "labels": torch.tensor([2]),
        "scores": torch.ones(1),
    }
    assert coco.average_precision(truth, coco.annotations(found, 9, truth)) == pytest.approx(
        {"box AP": 60, "mask AP": 100}
    )
    # A false one that is surer halves the precision at every recall; one that is less sure costs nothing.
    for score, wanted in ((1.1, 50), (0.9, 100)):
        doubled = {name: torch.cat([value, value]) for name, value in found.items()}
        doubled["boxes"] = torch.tensor([[50.0, 50, 150, 150], [0, 0, 20, 20]])
        doubled["masks"][1] = 0
        doubled["masks"][1, 0, :20, :20] = 1
        doubled["scores"][1] = score
        both = {"box AP": wanted, "mask AP": wanted}
        assert coco.average_precision(truth, coco.annotations(doubled, 9, truth)) == pytest.approx(both)


def test_the_drawn_set_holds_what_was_drawn(monkeypatch, root):
    """Run lengths exactly, polygons up to their rim; numbers have gaps; boxes and areas are the masks'."""
    shapes: list[Shape] = []
    real = drawn.put_shapes
    monkeypatch.setattr(drawn, "put_shapes", lambda *args: shapes.extend(real(*args)) or shapes)
    kinds = set()
    for number in range(random.randrange(1000), 2500, 39):
        shapes.clear()
        picture, entries = drawn.draw(np.random.default_rng(number), number, 64)
        assert len(entries) == len(shapes)
        truth = coco.COCO()
        about = {"id": 1, "height": picture.shape[0], "width": picture.shape[1]}
        truth.dataset = {"images": [about], "annotations": [], "categories": []}
        truth.createIndex()
        for shape, entry in zip(shapes, entries, strict=True):
            mask = truth.annToMask(entry | {"image_id": 1}).astype(bool)
            exact = isinstance(entry["segmentation"], dict)
            kinds.add((exact, entry["iscrowd"]))
            overlap = (mask & shape.mask).sum() / (mask | shape.mask).sum()
            assert overlap == 1 if exact else overlap > 0.8, shape.name
            rows, columns = np.nonzero(shape.mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert entry["bbox"] == box and entry["area"] == shape.mask.sum()
            assert entry["category_id"] == drawn.CATEGORIES[shape.name]
    assert kinds == {(True, 0), (True, 1), (False, 0)}
    train, val = coco.open_layout(root)
    assert coco.categories(train) == coco.categories(val) == [2, 5, 8, 11, 14, 17]
    assert 1 not in np.diff(sorted(val.imgs)) and any(
        not val.getAnnIds(number) for number in train.imgs if number % 56 == 0
    )


class Painted:
    """Images whose objects are as bright as their labels: 40, 80, ..., 240."""

    def __init__(self, truth: coco.COCO) -> None:
        self.truth = truth

    def __getitem__(self, number: int) -> Tensor:
        target = coco.objects(self.truth, number)
        bright = (target["masks"] * 40 * target["labels"][:, None, None].to(torch.uint8)).amax(0)
        return bright[None].repeat(3, 1, 1)


def test_augmentation_moves_images_masks_boxes_and_labels_together(root):
    train, _ = coco.open_layout(root)
    data = coco.Augmented(train, root / "train2017", coco.augmentation(48, (0.5, 2.0), (0.5, 0.5, 0.5)))
    assert len(data) == len({each["image_id"] for each in train.anns.values() if not each["iscrowd"]}) < len(train.imgs)
    data.images = Painted(train)
    kept = 0
    for i in range(len(data)):
        image, target = data[i]
        assert image.shape == (3, 48, 48) and image.dtype == torch.uint8
        assert len(target["boxes"]) == len(target["masks"]) == len(target["labels"])
        for box, mask, label in zip(target["boxes"], target["masks"], target["labels"], strict=True):
            rows, columns = np.nonzero(mask.numpy())
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            if len(rows) > 60:  # enough to have an inside
                assert abs(int(image[0][mask.bool()].max()) - 40 * int(label)) <= 12
                kept += 1
    assert kept > 10


@pytest.mark.parametrize("patch", [4, 14, 16])
def test_the_pyramid_has_strides_that_torchvision_takes_it_to_have(patch):
    encoder = VisionTransformer(2 * patch, patch, 16, 1, 2)
    stride = stride_of(encoder)
    assert stride == {4: 4, 14: 16, 16: 16}[patch]
    size = 4 * stride
    detector = mask_rcnn(encoder, 3, size, 8, (0.5, 0.5, 0.5)).eval()
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    maps = detector.backbone(images)
    assert {name: list(x.shape) for name, x in maps.items()} == {
        "0": [2, 8, 16, 16], "1": [2, 8, 8, 8], "2": [2, 8, 4, 4], "3": [2, 8, 2, 2], "pool": [2, 8, 1, 1],
    }  # fmt: skip
    detector([*images])
    assert detector.roi_heads.box_roi_pool.scales == [4 / stride, 2 / stride, 1 / stride, 0.5 / stride]
    cells = [cell[0] for cell in detector.rpn.anchor_generator.cell_anchors]  # the flattest of each level
    assert [float((c[2] - c[0]) * (c[3] - c[1])) ** 0.5 for c in cells] == pytest.approx(
        [2 * stride * 2**i for i in range(5)], rel=0.1
    )


def test_the_pyramid_is_local():
    """A patch that changes moves only what lies around it, at its place on every level."""
    pyramid = SimplePyramid(16, 8)
    x = torch.randn(1, 16, 16, 16)
    y = x.clone()
    y[0, :, 4, 10] += 1
    for name, before in pyramid(x).items():
        rows, columns = (before != pyramid(y)[name])[0].any(0).nonzero().unbind(1)
        scale = before.shape[2] / 16
        for places, at in ((rows, 4), (columns, 10)):
            assert places.min() >= at * scale - 2 and places.max() <= (at + 1) * scale + 1, name


def test_images_become_squares_and_boxes_return():
    transform = mask_rcnn(VisionTransformer(16, 4, 16, 1, 2), 2, 48, 8, (0.1, 0.2, 0.3)).transform.eval()
    for height, width in ((96, 60), (24, 48), (48, 48), (5, 300)):
        image = torch.randint(0, 256, (3, 1, 1), dtype=torch.uint8).repeat(1, height, width)
        images, _ = transform([image])
        h, w = (max(1, round(side * 48 / max(height, width))) for side in (height, width))
        assert images.image_sizes == [(h, w)] and images.tensors.shape == (1, 3, 48, 48)
        assert (images.tensors[0, :, :h, :w] == image[:, :1, :1]).all()
        rest = torch.ones(48, 48, dtype=torch.bool)
        rest[:h, :w] = False
        assert (images.tensors[0].permute(1, 2, 0)[rest] == torch.tensor([26, 51, 76])).all()  # 255 times the mean
        found = [{"boxes": torch.tensor([[0.0, 0, w, h]]), "masks": torch.ones(1, 1, 28, 28)}]
        (back,) = transform.postprocess(found, images.image_sizes, [(height, width)])
        assert back["boxes"].tolist() == [[0, 0, width, height]] and back["masks"].shape == (1, 1, height, width)


@pytest.fixture
def light(monkeypatch):
    """Fewer proposals, in a tenth of the time."""

    def lighter(*args, **options):
        detector = mask_rcnn(*args, **options)
        detector.rpn._pre_nms_top_n = detector.rpn._post_nms_top_n = {"training": 100, "testing": 50}
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = 32
        return detector

    monkeypatch.setattr(detect, "mask_rcnn", lighter)


@pytest.mark.slow
def test_it_learns(light, tmp_path):
    """The images that it is trained on. Without training nothing is found; the loss says little, because good proposals
    bring boxes and masks that can be wrong.
    """
    root = tmp_path / "coco"
    drawn.write(root, random.getrandbits(30), train=8, val=1)
    shutil.rmtree(root / "val2017")
    (root / "val2017").symlink_to("train2017")
    shutil.copy(root / "annotations/instances_train2017.json", root / "annotations/instances_val2017.json")
    words = "--channels", 32, "--lr", 3e-3, "--scale", 1, 1, "--epochs", 45, "--drop-path", 0
    job, args = job_of(tmp_path, detect, root, *TINY, *words)
    before = copy.deepcopy(job.subjects[0].encoder.state_dict())
    (row,) = detect.run(job, args).rows
    assert set(row) == {"features", "box AP", "mask AP"}
    assert 2 < row["box AP"] <= 100 and 2 < row["mask AP"] <= 100, row
    assert (tmp_path / "detect.png").stat().st_size > 1000
    (path,) = (tmp_path / "detect").iterdir()
    trained = torch.load(path, weights_only=True)["model"]
    assert all(
        not torch.equal(trained[f"backbone.encoder.{name}"], before[name]) for name in before if "qkv.weight" in name
    )
    assert all(torch.equal(value, before[name]) for name, value in job.subjects[0].encoder.state_dict().items())


@pytest.mark.slow
def test_interrupted_training_ends_as_if_it_had_not_been(light, monkeypatch, root, tmp_path):
    words = root, *TINY, "--warmup", 2, "--epochs", 0.5, "--save-every", 2
    whole = detect.run(*job_of(tmp_path / "whole", detect, *words))
    real, calls = detect.loss_of, []

    def failing(model, samples):
        calls.append(len(samples))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(model, samples)

    monkeypatch.setattr(detect, "loss_of", failing)
    with pytest.raises(KeyboardInterrupt):
        detect.run(*job_of(tmp_path / "parts", detect, *words))
    torch.randn(random.randint(1, 9))
    assert detect.run(*job_of(tmp_path / "parts", detect, *words)) == whole
    states = [torch.load(next((tmp_path / run / "detect").iterdir()), weights_only=True) for run in ("whole", "parts")]
    assert states[0]["step"] == states[1]["step"] == len(calls) - 2 > 4
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


class Knowing(nn.Module):
    """Finds, in an image that it knows by its pixels, all but the first object, a little off."""

    def __init__(self, truth: coco.COCO, folder: Path) -> None:
        super().__init__()
        images = coco.Images(truth, folder)
        self.truth, self.known = truth, {images[number].numpy().tobytes(): number for number in truth.imgs}

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        (image,) = images
        number = self.known[image.numpy().tobytes()]
        stream = torch.Generator().manual_seed(number)
        found = perfect(self.truth, number)
        found["boxes"] += 2 * torch.randn(found["boxes"].shape, generator=stream)
        found["scores"] = torch.rand(len(found["boxes"]), generator=stream).round(decimals=1)  # some are equal
        return [{name: value[1:] for name, value in found.items()}]


def on_ranks(root: Path, out: Path) -> tuple[dict[str, float], list]:
    job, args = job_of(out, detect, root, *TINY, "--warmup", 0, "--epochs", 0.1)
    _, val = coco.open_layout(root)
    return detect.evaluate(job, Knowing(val, root / "val2017"), val, args), detect.run(job, args).rows


@pytest.mark.ranks
@pytest.mark.slow
def test_ranks_share_the_images(root, tmp_path):
    one = on_ranks(root, tmp_path / "one")
    first, second = run_ranks(2, on_ranks, root, tmp_path / "two")
    assert one[0] == first[0] == second[0] and 0 < one[0]["box AP"] < one[0]["mask AP"] < 100
    assert first[1] == second[1]


@pytest.mark.slow
def test_what_is_trained_is_known_again_by_its_settings_and_files(light, monkeypatch, tmp_path, capsys):
    """The default scale may be spelled out; a picture that fails is a line; another set of the same size is refused."""

    def broken(*_):
        raise RuntimeError("no fonts")

    words = "--size", 48, "--channels", 16, "--batch", 4, "--epochs", 0.5
    for seed in (1, 2):
        drawn.write(tmp_path / f"set{seed}", seed, train=8, val=2)
    first = detect.run(*job_of(tmp_path / "out", detect, tmp_path / "set1", *words))
    monkeypatch.setattr(detect, "detection", broken)
    monkeypatch.setattr(detect, "loss_of", broken)  # nothing is left to train
    assert detect.run(*job_of(tmp_path / "out", detect, tmp_path / "set1", *words, "--scale", "0.1", "2")) == first
    assert "detect.png could not be drawn (RuntimeError: no fonts)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"is of other settings \(.*files \w+, now \w+\); delete it"):
        detect.run(*job_of(tmp_path / "out", detect, tmp_path / "set2", *words))


@pytest.mark.parametrize("words", ["--size 0", "--batch 0", "--epochs 0", "--channels 0", "--scale 2 1", "--warmup 9"])
def test_options_that_mean_nothing_are_named(words, root, tmp_path):
    with pytest.raises(ValueError, match=f"^{words}: wanted"):
        detect.run(*job_of(tmp_path, detect, root, "--epochs", 0.1, *words.split()))


@pytest.mark.parametrize("fault", ["folder", "table", "image", "json", "keys", "nothing", "categories", "size"])
def test_another_layout_is_one_line(fault, root, tmp_path):
    for name in ("train2017", "val2017"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "annotations").mkdir()
    tables = {name: tmp_path / f"annotations/instances_{name}.json" for name in ("train2017", "val2017")}
    content = {name: json.loads((root / f"annotations/{path.name}").read_text()) for name, path in tables.items()}
    val = content["val2017"]
    if fault == "image":
        val["images"][2]["file_name"] = "elsewhere.jpg"
    elif fault == "keys":
        del val["annotations"][0]["iscrowd"]
    elif fault == "nothing":
        val["annotations"] = []
    elif fault == "categories":
        val["categories"] = val["categories"][1:]
    elif fault == "size":
        for image in content["train2017"]["images"]:
            image["height"] += 1
    for name, path in tables.items():
        path.write_text(json.dumps(content[name]))
    if fault == "folder":
        (tmp_path / "val2017").unlink()
    elif fault == "table":
        tables["train2017"].unlink()
    elif fault == "json":
        tables["val2017"].write_text('{"images": [')
    wanted = {
        "folder": "not in COCO's layout: there is no .*/val2017",
        "table": "not in COCO's layout: there is no .*/instances_train2017.json",
        "image": "val2017 lacks 1 of 12 images, for example elsewhere.jpg",
        "json": "instances_val2017.json: JSONDecodeError",
        "keys": "instances_val2017.json: KeyError: 'iscrowd'; wanted COCO's images, annotations",
        "nothing": "instances_val2017.json has 0 objects",
        "categories": "the categories of training and validation differ",
        "size": r"train2017/0+\d+.jpg has (64|80) x (64|80) pixels, and (65|81) x (64|80) in the annotations",
    }[fault]
    with pytest.raises(ValueError, match=wanted) as caught:
        detect.run(*job_of(tmp_path / "out", detect, tmp_path, *TINY))
    assert "\n" not in str(caught.value)
