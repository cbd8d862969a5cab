"""Segmentation in ADE20K's layout: its metric, its windows, its heads, and the loop that trains them."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jepa.data.drawn import ade20k
from jepa.model.vit import VisionTransformer
from packages import need
from small import run_ranks

need("torchvision", "torchmetrics")

from jepa.probes import segment
from jepa.probes.drop_path import drop_path
from jepa.probes.pyramid import Rescaling
from jepa.probes.upernet import Linear, UPerNet
from jobs import job_of
from probing import alone

TINY = "--size", 48, "--classes", ade20k.CLASSES, "--channels", 12, "--batch", 8, "--warmup", 5, "--lr", 3e-3


@pytest.fixture(autouse=True, scope="module")
def group():
    with alone():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "ade20k"
    ade20k.write(folder, random.getrandbits(30), train=32, val=6)
    return folder


def test_miou_is_that_of_one_confusion_matrix(monkeypatch, tmp_path):
    """Of 7 classes, 0 is never there nor predicted, 1 is there and not predicted, and 2 predicted and not there."""
    rng = np.random.default_rng(random.getrandbits(64))
    sizes = rng.integers(5, 40, (6, 2))
    truths = [rng.choice([1, 3, 4, 5, 6, segment.IGNORED], size).astype(np.uint8) for size in sizes]
    guesses = [
        np.where((rng.random(t.shape) < 0.6) & (t > 2) & (t < 7), t, rng.integers(2, 7, t.shape)) for t in truths
    ]
    matrix = np.zeros((7, 7), np.int64)
    for truth, guess in zip(truths, guesses, strict=True):
        labelled = truth != segment.IGNORED
        np.add.at(matrix, (truth[labelled], guess[labelled]), 1)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    wanted = (matrix.diagonal()[1:] / union[1:]).mean()
    assert union[0] == 0 and matrix[:, 1].sum() == 0 and matrix[2].sum() == 0

    data = [(torch.zeros(3, *t.shape, dtype=torch.uint8), torch.from_numpy(t)) for t in truths]
    answers = iter(guesses)
    monkeypatch.setattr(segment, "predict", lambda model, image, size: torch.from_numpy(next(answers)))
    job, args = job_of(tmp_path, segment, "nowhere", "--classes", 7)
    assert segment.evaluate(job, nn.Linear(1, 1), data, args) == pytest.approx(wanted, rel=1e-6)


def test_windows_cover_an_image_and_overlap_by_a_third():
    for _ in range(200):
        size = random.randint(3, 60)
        length = random.randint(size, 5 * size)
        found = segment.starts(length, size)
        assert found[0] == 0 and found[-1] == length - size and found == sorted(set(found))
        assert max(np.diff(found), default=0) <= 2 * size / 3 + 1


class Brightest(nn.Module):
    """The scores of a pixel are its three channels and, with `beside`, one that says where in its window it is."""

    def __init__(self, beside: bool = False) -> None:
        super().__init__()
        self.unused, self.beside = nn.Parameter(torch.zeros(1)), beside

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() + (torch.arange(images.shape[3]) if self.beside else 0)


def test_predictions_are_of_the_image_whatever_its_shape():
    for height, width in ((24, 61), (70, 24), (24, 24)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        found = segment.predict(Brightest(), image, 24)
        assert torch.equal(image.gather(0, found[None].to(torch.int64))[0], image.amax(0))
    # Twice as large: the image is reduced for the model and the scores enlarged again.
    blocks = torch.randint(0, 3, (6, 9)).repeat_interleave(16, 0).repeat_interleave(16, 1)
    image = 255 * nn.functional.one_hot(blocks).permute(2, 0, 1).to(torch.uint8)
    agree = segment.predict(Brightest(beside=True), image, 48) == blocks
    assert agree.float().mean() > 0.8 and agree.unfold(0, 16, 16).unfold(1, 16, 16)[..., 6:10, 6:10].all()


def test_heads_have_their_shapes_and_learn_everywhere():
    for side in (3, 4, 7):
        maps = [torch.randn(2, 24, side, side) for _ in range(4)]
        shapes = [list(x.shape) for x in Rescaling(24)(maps)]
        assert shapes == [[2, 6, 4 * side, 4 * side], [2, 12, 2 * side, 2 * side], [2, 24, side, side],
                          [2, 24, (side + 1) // 2, (side + 1) // 2]]  # fmt: skip
        head = UPerNet(24, 8, 5)
        scores = head(maps)
        assert list(scores.shape) == [2, 5, 4 * side, 4 * side]
        scores.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
        assert list(Linear(24, 4, 5)(maps).shape) == [2, 5, side, side]


def test_the_linear_head_is_a_batch_norm_and_a_matrix():
    head = Linear(6, 2, 4)
    nn.init.normal_(head.norm.weight), nn.init.normal_(head.norm.bias)
    maps = [3 + 2 * torch.randn(3, 6, 5, 5) for _ in range(2)]
    x = torch.cat(maps, 1).permute(0, 2, 3, 1).reshape(-1, 12).double().numpy()
    norm = head.norm
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + norm.eps) * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    wanted = x @ head.classify.weight.detach().numpy()[:, :, 0, 0].T + head.classify.bias.detach().numpy()
    got = head(maps).permute(0, 2, 3, 1).reshape(-1, 4).detach().numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_drop_path_drops_branches_in_training_only():
    encoder = VisionTransformer(16, 4, 24, 2, 2)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    wanted = encoder(images)
    names = list(encoder.state_dict())
    drop_path(encoder, 1.0)  # from 0 in the first block
    assert list(encoder.state_dict()) == names
    torch.testing.assert_close(encoder.eval()(images), wanted)
    without = encoder.norm(encoder.blocks[0](encoder.embed(images)))
    torch.testing.assert_close(encoder.train()(images), without)


def losses(text: str) -> list[float]:
    return [float(line.split("loss ")[1].split(",")[0]) for line in text.splitlines() if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_it_learns(head, root, tmp_path, capsys):
    """One class everywhere is worth at most 1 / 8."""
    job, args = job_of(tmp_path, segment, root, *TINY, "--head", head, "--layers", 2, "--steps", 60)
    before = {name: value.clone() for name, value in job.subjects[0].encoder.state_dict().items()}
    (row,) = segment.run(job, args).rows
    seen = losses(capsys.readouterr().err)
    assert np.mean(seen[-3:]) < 0.8 * np.mean(seen[:3])
    assert row["features"] == "encoder" and 100 / 8 < row["mIoU"] <= 100
    assert (tmp_path / "segment.png").stat().st_size > 1000
    for name, value in job.subjects[0].encoder.state_dict().items():
        assert torch.equal(value, before[name])  # it is a copy that is trained
    (path,) = (tmp_path / "segment").iterdir()
    trained = torch.load(path, weights_only=True)["model"]
    matrices = [name for name in trained if name.startswith("encoder.blocks")]
    assert bool(matrices) == (head == "upernet")
    assert all(not torch.equal(trained[name], before[name.removeprefix("encoder.")]) for name in matrices)


@pytest.mark.slow
def test_interrupted_training_ends_as_if_it_had_not_been(monkeypatch, root, tmp_path, capsys):
    words = root, *TINY, "--drop-path", 0.5, "--steps", 7, "--save-every", 3
    whole = segment.run(*job_of(tmp_path / "whole", segment, *words))
    real, calls = segment.loss_of, []

    def failing(model, samples):
        calls.append(len(samples))
        if len(calls) == 6:  # two steps after the state of step 3
            raise KeyboardInterrupt
        return real(model, samples)

    monkeypatch.setattr(segment, "loss_of", failing)
    with pytest.raises(KeyboardInterrupt):
        segment.run(*job_of(tmp_path / "parts", segment, *words))
    torch.randn(random.randint(1, 9))
    parts = segment.run(*job_of(tmp_path / "parts", segment, *words))
    assert len(calls) == 6 + 4 and parts == whole
    states = [torch.load(next((tmp_path / run / "segment").iterdir()), weights_only=True) for run in ("whole", "parts")]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    again = segment.run(*job_of(tmp_path / "parts", segment, *words))
    assert len(calls) == 10 and again == whole  # nothing left to train
    with pytest.raises(ValueError, match=r"other settings \(lr 0.003, now 0.1\)"):
        segment.run(*job_of(tmp_path / "parts", segment, *words, "--lr", 0.1))


def on_ranks(root: Path, out: Path) -> tuple[float, list, dict]:
    job, args = job_of(out, segment, root, *TINY, "--head", "linear", "--steps", 2, "--warmup", 1, "--lr", 6e-4)
    _, val = segment.open_layout(args.data)
    untrained = segment.build(job.subjects[0], args)
    alone = segment.evaluate(job, untrained, segment.Annotated(val, args.classes), args)
    rows = segment.run(job, args).rows
    (path,) = (out / "segment").iterdir()
    return alone, rows, torch.load(path, weights_only=True)["model"]


@pytest.mark.ranks
@pytest.mark.slow
def test_ranks_share_the_images(root, tmp_path):
    one = on_ranks(root, tmp_path / "one")
    first, second = run_ranks(2, on_ranks, root, tmp_path / "two")
    assert 0 < one[0] == pytest.approx(first[0], rel=1e-6) and first[0] == second[0]
    assert first[1] == second[1]
    weight = "head.classify.weight"  # batch norm sees half the batch on a CPU: alike, not equal
    torch.testing.assert_close(first[2][weight], one[2][weight], atol=3e-3, rtol=0)


@pytest.mark.slow
def test_another_set_under_the_same_names_is_not_taken_for_the_trained_one(root, tmp_path):
    words = "--size", 48, "--classes", ade20k.CLASSES, "--batch", 4, "--steps", 3, "--head", "linear"
    for seed in (1, 2):
        ade20k.write(tmp_path / f"set{seed}", seed, train=6, val=2)
    first = segment.run(*job_of(tmp_path / "out", segment, tmp_path / "set1", *words))
    with pytest.raises(ValueError, match=r"is of other settings \(files \w+, now \w+\); delete it"):
        segment.run(*job_of(tmp_path / "out", segment, tmp_path / "set2", *words))
    (tmp_path / "set1").rename(tmp_path / "moved")
    assert segment.run(*job_of(tmp_path / "out", segment, tmp_path / "moved", *words)) == first


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_picture(monkeypatch, root, tmp_path, capsys):
    def broken(*_):
        raise RuntimeError("no fonts")

    words = root, *TINY, "--head", "linear", "--steps", 2, "--warmup", 0
    drawn = segment.run(*job_of(tmp_path / "out", segment, *words))
    (tmp_path / "out/segment.png").unlink()
    monkeypatch.setattr(segment, "segmentation", broken)
    assert segment.run(*job_of(tmp_path / "out", segment, *words)) == drawn
    assert "segment.png could not be drawn (RuntimeError: no fonts)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["--size 0", "--steps 0", "--lr 0", "--classes 256", "--channels 0", "--warmup 40", "--batch 1"]
)
def test_options_that_mean_nothing_are_named(words, root, tmp_path):
    given = root, "--steps", 40, *words.split()
    with pytest.raises(ValueError, match=f"^{words}: wanted"):
        segment.run(*job_of(tmp_path, segment, *given))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["folder", "annotation", "class", "size", "kind"])
def test_another_layout_is_one_line(fault, root, tmp_path):
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            (tmp_path / kind / split).mkdir(parents=True)
            for path in (root / kind / split).iterdir():
                (tmp_path / kind / split / path.name).write_bytes(path.read_bytes())
    first = min((tmp_path / "annotations/training").iterdir())
    labels = np.array(Image.open(first))
    if fault == "folder":
        (tmp_path / "annotations/validation").rename(tmp_path / "elsewhere")
    elif fault == "annotation":
        first.unlink()
    else:
        wrong = {"class": labels.clip(0) + 100, "size": labels[1:], "kind": labels[..., None].repeat(3, 2)}[fault]
        Image.fromarray(wrong.astype(np.uint8)).save(first)
    wanted = {
        "folder": r"annotations/validation/\*.png",
        "annotation": f"1 of 32 images have no annotation.*{first.stem}",
        "class": r"has class 10\d, wanted 0 to 8 \(--classes\)",
        "size": rf"{first.name}.*wanted one 8-bit number for each of the \d+ x \d+ pixels of {first.stem}.jpg",
        "kind": "wanted one 8-bit number",
    }[fault]
    with pytest.raises(ValueError, match=wanted) as caught:
        segment.run(*job_of(tmp_path / "out", segment, tmp_path, *TINY, "--steps", 40, "--head", "linear"))
    assert "\n" not in str(caught.value)


def test_labels_begin_at_0_and_what_is_unlabelled_is_ignored(root):
    train, _ = segment.open_layout(root)
    number = random.randrange(len(train))
    image, labels = segment.Annotated(train, ade20k.CLASSES)[number]
    stored = np.array(Image.open(train[number].annotation)).astype(int)
    np.testing.assert_array_equal(labels.numpy(), np.where(stored == 0, segment.IGNORED, stored - 1))
    augment = segment.augmentation(40, (0.5, 0.5, 0.5))
    image, labels = segment.Annotated(train, ade20k.CLASSES, augment)[number]
    assert image.shape == (3, 40, 40) and labels.shape == (40, 40) and type(labels) is torch.Tensor
    assert set(labels.unique().tolist()) <= {*(stored[stored > 0] - 1).tolist(), segment.IGNORED}


def test_recomputed_blocks_drop_the_same_images() -> None:
    encoder = VisionTransformer(32, 8, 24, 4, 2)
    drop_path(encoder, 0.6)
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    found = []
    for encoder.checkpointing in (False, True):
        torch.manual_seed(4)
        encoder.zero_grad()
        encoder.features(images, (1, 3))[1].square().sum().backward()
        found.append([parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)
