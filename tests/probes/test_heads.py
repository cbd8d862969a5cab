"""The paper's linear heads: LARS and steps with batch norm against their definitions; whole trainings; interruption."""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.data.loader import Loader
from jepa.probes import heads, linear
from jepa.probes.heads import Group, lars
from jepa.probes.labels import Labelled, open_labelled
from probing import Encoder, Stopped, alone, config_of, job_of, options, pixels_of, write_shades
from small import run_ranks

GRID = [(0.3, 0.0), (2.0, 0.01), (0.05, 0.5)]
MOMENTUM, TRUST = 0.9, 0.001


class PlainLars:
    """LARS of one matrix in float64, from the formula of arXiv 1708.03888."""

    def __init__(self, weight: Tensor, rate: float, decay: float) -> None:
        self.weight, self.rate, self.decay = weight.double().clone(), rate, decay
        self.speed = torch.zeros_like(self.weight)

    def step(self, slope: Tensor, factor: float) -> None:
        slope = slope.double()
        size, steepness = math.sqrt((self.weight**2).sum()), math.sqrt((slope**2).sum())
        local = TRUST * size / (steepness + self.decay * size) if size and steepness else 1.0
        self.speed = MOMENTUM * self.speed + local * (slope + self.decay * self.weight)
        self.weight = self.weight - factor * self.rate * self.speed


def test_lars_is_that_of_the_paper_for_each_head() -> None:
    weight = torch.randn(3, 4, 5) * torch.tensor([1.0, 30.0, 0.1])[:, None, None]
    plain = [PlainLars(w, *at) for w, at in zip(weight, GRID, strict=True)]
    speed = torch.zeros_like(weight)
    for step in range(5):
        slope, factor = torch.randn(3, 4, 5) * 10.0 ** random.uniform(-3, 2), random.uniform(0.1, 50)
        if step == 2:
            slope[1] = 0  # has no direction to trust
        lars(weight, slope, speed, factor, GRID)
        for one, part in zip(plain, slope, strict=True):
            one.step(part, factor)
        torch.testing.assert_close(weight.double(), torch.stack([one.weight for one in plain]), rtol=1e-4, atol=1e-5)


def test_lars_is_timms() -> None:
    """Which does not trust a slope of zero either, and adds 1e-8 to the denominator."""
    try:
        from timm.optim.lars import Lars
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError where it does not fit torch
        pytest.skip(f"timm cannot be imported: {str(error).splitlines()[0]}")
    weight = torch.randn(3, 4, 5)
    theirs = [nn.Parameter(w.clone()) for w in weight]
    makers = [
        Lars([w], lr=lr, momentum=MOMENTUM, weight_decay=decay, trust_coeff=TRUST, always_adapt=True)
        for w, (lr, decay) in zip(theirs, GRID, strict=True)
    ]
    speed = torch.zeros_like(weight)
    for _ in range(4):
        slope = torch.randn(3, 4, 5)
        lars(weight, slope, speed, 1.0, GRID)
        for w, part, optimizer in zip(theirs, slope, makers, strict=True):
            w.grad = part.clone()
            optimizer.step()
    torch.testing.assert_close(weight, torch.stack([w.detach() for w in theirs]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [False, True], ids=["linear", "batch norm"])
def test_steps_are_autograds_on_the_layers_written_out(one_rank: None, norm: bool) -> None:
    """Each head alone: nn.BatchNorm1d without scale and shift, nn.Linear, the mean cross-entropy; LARS for the matrix,
    plain momentum for the bias."""
    D, C = 7, 4
    group = Group(1, norm, D, C, GRID)
    assert 0 < group.weight.std() < 0.02 and not group.bias.any()
    layers, plain = [], []
    for h, at in enumerate(GRID):
        layer = nn.Sequential(*[nn.BatchNorm1d(D, affine=False)] * norm, nn.Linear(D, C)).double()
        layer[-1].weight.data, layer[-1].bias.data = group.weight[h].double(), group.bias[h].double()
        layers.append(layer)
        plain.append((PlainLars(group.weight[h], *at), torch.zeros(C, dtype=torch.float64)))
    centre, spread = 3 * torch.randn(D), 10 ** (2 * torch.rand(D) - 1)
    for _ in range(6):
        x, y, factor = centre + spread * torch.randn(16, D), torch.randint(0, C, (16,)), random.uniform(0.5, 10)
        group.learn(x, y, factor)
        for h, (layer, (weight, speed), (rate, _)) in enumerate(zip(layers, plain, GRID, strict=True)):
            layer.zero_grad()
            F.cross_entropy(layer(x.double()), y).backward()
            weight.step(layer[-1].weight.grad, factor)
            speed.mul_(MOMENTUM).add_(layer[-1].bias.grad)
            layer[-1].weight.data = weight.weight.clone()
            layer[-1].bias.data -= factor * rate * speed
            torch.testing.assert_close(group.weight[h].double(), layer[-1].weight.data, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(group.bias[h].double(), layer[-1].bias.data, rtol=1e-3, atol=1e-5)
    x = centre + spread * torch.randn(9, D)
    found = group.logits(group.normalised(x))
    assert found.shape == (9, 3, C)
    for h, layer in enumerate(layers):
        torch.testing.assert_close(found[:, h].double(), layer.eval()(x.double()), rtol=1e-3, atol=1e-3)
    if norm:
        torch.testing.assert_close(group.mean.double(), layers[0][0].running_mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(group.variance.double(), layers[0][0].running_var, rtol=1e-3, atol=1e-4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_shades(tmp_path / "set", {"train": 20, "val": 7})
    (tmp_path / "set/val/dark/2.png").write_bytes(b"not an image")
    return tmp_path / "set"


FAST = ("--lr", 50, 500, "--weight-decay", 0, "--head-batch", 4)  # for features and batches so small


def given(root: Path, *words: object) -> argparse.Namespace:
    folders = ("--train", root / "train", "--val", root / "val")
    return options(linear, *folders, "--form", "paper", *FAST, *words)


def trained(encoder: Encoder, root: Path, out: Path, *words: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The row of the protocol on the ranks that are up, and the state that it leaves."""
    (row,) = linear.run(job_of(encoder, out), given(root, *words)).rows
    (path,) = (out / "linear").glob("*.pt")
    groups = torch.load(path, weights_only=True)["groups"]
    return row, {f"{g}.{name}": value for g, group in enumerate(groups) for name, value in group.items()}


def scores(out: Path) -> dict[str, dict[str, float]]:
    (path,) = (out / "linear").glob("*.json")
    return json.loads(path.read_text())


def test_it_reports_the_best_of_all_heads(one_rank: None, root: Path, tmp_path: Path) -> None:
    """Every head's accuracy again, of its weights on features by plain arithmetic."""
    encoder = Encoder()
    row, state = trained(encoder, root, tmp_path / "out", "--epochs", 4)
    by_head = scores(tmp_path / "out")["class"]
    sets = open_labelled(root / "train", root / "val")
    good = [i for i, file in enumerate(sets.val.files) if not file.endswith("dark/2.png")]
    images, labels = pixels_of([sets.val.files[i] for i in good]), torch.from_numpy(sets.val_y["class"][good])
    blocks = [encoder.plain(images, layer).mean(1) for layer in range(3)]
    found: dict[str, float] = {}
    kinds = [(depth, norm) for depth in (1, 3) for norm in (False, True)]  # of an encoder with three blocks
    for g, (depth, norm) in enumerate(kinds):
        w = {name.partition(".")[2]: value.double() for name, value in state.items() if name.startswith(f"{g}.")}
        x = torch.cat(blocks[-depth:], 1)
        if norm:
            x = (x - w["mean"]) / (w["variance"] + 1e-5).sqrt()
        for h, lr in enumerate((50, 500)):
            right = ((x @ w["weight"][h].T + w["bias"][h]).argmax(1) == labels).double().mean()
            what = "last block" if depth == 1 else "last 3 blocks"
            found[f"{what}{', batch norm' if norm else ''}, lr {lr}, wd 0"] = 100 * right.item()
    assert by_head == pytest.approx(found)
    assert row == {"features": "encoder", "class": max(found.values())}


@pytest.mark.slow
def test_rates_fall_every_fifteen_epochs_and_grow_with_the_batch(
    one_rank: None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the encoder sees new views in each epoch, with the labels of the images they are of."""
    steps: list[tuple[Tensor, Tensor, float]] = []
    monkeypatch.setattr(Group, "learn", lambda group, x, y, factor: steps.append((x.clone(), y.clone(), factor)))
    words = ("--epochs", 46, "--head-batch", 4, "--encoder-batch", 2)  # two micro-batches to a step
    trained(Encoder(), root, tmp_path / "out", *words)
    of_last_block = steps[::4]
    factors = np.array([factor for _, _, factor in of_last_block]).reshape(46, 10)  # 40 images, 4 at a time
    assert (factors == factors[:, :1]).all()
    drops = 0.1 ** (np.arange(46) // 15)
    np.testing.assert_allclose(factors[:, 0], 4 / 256 * drops)
    assert [len(y) for _, y, _ in of_last_block] == [4] * 460
    epochs = torch.stack([y for _, y, _ in of_last_block]).view(46, 40)
    assert (epochs.sum(1) == 20).all(), "each image once"
    rows = torch.stack([x for x, _, _ in of_last_block]).view(46, 40, -1)
    apart = [rows[e][epochs[e] == 1].mean(0) - rows[e][epochs[e] == 0].mean(0) for e in range(46)]
    alike = F.cosine_similarity(torch.stack(apart), torch.stack(apart).mean(0), dim=1)
    assert (alike > 0.7).all(), "a class's images have its label in every epoch"
    assert len({row.tobytes() for row in rows.flatten(0, 1).numpy()}) > 0.95 * 46 * 40, "no view is seen twice"


@pytest.mark.parametrize("batch, total, expected", [(16384, 40, 4), (2, 40, 2), (16384, 5, 1)])
def test_a_step_is_at_most_a_tenth_of_the_images(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, total: int, expected: int
) -> None:
    write_shades(tmp_path / "set", {"train": total // 2 + 1, "val": 1})
    for path in sorted((tmp_path / "set/train").rglob("*.png"))[total:]:
        path.unlink()
    seen: list[int] = []
    monkeypatch.setattr(Group, "learn", lambda group, x, y, factor: seen.append(len(x)))
    trained(Encoder(), tmp_path / "set", tmp_path / "out", "--epochs", 1, "--head-batch", batch)
    assert set(seen) == {expected}


@pytest.mark.ranks
def test_two_ranks_are_one_with_the_same_batch(root: Path, tmp_path: Path) -> None:
    encoder, words = Encoder(), ("--epochs", 2, "--lr", 5, 20)
    with alone():
        row, state = trained(encoder, root, tmp_path / "one", *words)
    found = run_ranks(2, trained, encoder, root, tmp_path / "two", *words)
    assert [other for other, _ in found] == [row] * 2
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-5)
    assert scores(tmp_path / "two")["class"] == pytest.approx(scores(tmp_path / "one")["class"])


def test_an_interrupted_training_goes_on_and_ends_the_same(
    one_rank: None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, seen = Encoder(), []
    batch = Loader.batch

    def counted(loader: Loader, step: int, micro: int = 0) -> Any:
        seen.append(step)
        return batch(loader, step, micro)

    monkeypatch.setattr(Loader, "batch", counted)
    whole = trained(encoder, root, tmp_path / "whole", "--epochs", 4)
    assert sorted(seen) == list(range(40))
    for stop in (5, 25):  # within the first epoch, then 25 batches later
        encoder.seen, encoder.stop_after = [], stop
        with pytest.raises(Stopped):
            trained(encoder, root, tmp_path / "out", "--epochs", 4)
    encoder.seen, encoder.stop_after = [], 10**9
    seen.clear()
    row, state = trained(encoder, root, tmp_path / "out", "--epochs", 4)
    assert sorted(seen) == list(range(20, 40)), "two epochs were kept"
    assert row == whole[0] and all(torch.equal(value, whole[1][name]) for name, value in state.items())
    assert scores(tmp_path / "out") == scores(tmp_path / "whole")
    seen.clear()
    assert trained(encoder, root, tmp_path / "out", "--epochs", 4)[0] == row and seen == []


def test_it_stops_on_request_and_goes_on(
    one_rank: None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder()
    whole = trained(encoder, root, tmp_path / "whole", "--epochs", 2)
    for _ in range(3):
        with pytest.raises(SystemExit) as stopped:
            trained(encoder, root, tmp_path / "out", "--epochs", 2, "--max-minutes", "1e-9")
        assert stopped.value.code == 75
    seen: list[int] = []
    batch = Loader.batch

    def counted(loader: Loader, step: int, micro: int = 0) -> Any:
        seen.append(step)
        return batch(loader, step, micro)

    monkeypatch.setattr(Loader, "batch", counted)
    row, state = trained(encoder, root, tmp_path / "out", "--epochs", 2)
    assert sorted(seen) == list(range(3, 20)), "a step was taken and kept each time"
    assert row == whole[0] and all(torch.equal(value, whole[1][name]) for name, value in state.items())


def test_the_state_of_other_settings_is_not_taken(one_rank: None, root: Path, tmp_path: Path) -> None:
    """Other weights, rates, batches, epochs, views, labels, and other images."""
    encoder, out = Encoder(), tmp_path / "out"
    sets = open_labelled(root / "train", root / "val")

    def states(encoder: Encoder = encoder, sets: Labelled = sets, *words: object, crop: int = 32) -> int:
        """Trains and returns how many states there are."""
        job, encoder.seen = job_of(encoder, out, config_of(f"data.crop_size={crop}")), []
        heads.train(job, job.subjects[0], sets, given(root, "--epochs", 1, *words))
        return len(list((out / "linear").glob("*.pt")))

    assert states() == 1 and sum(encoder.seen) == 40 + 13
    assert states() == 1 and sum(encoder.seen) == 13
    assert states(Encoder()) == 2
    assert states(encoder, sets, "--lr", 1, 2) == 3
    assert states(encoder, sets, "--weight-decay", 0.1) == 4
    assert states(encoder, sets, "--head-batch", 2) == 5
    assert states(encoder, sets, "--epochs", 2) == 6
    encoder.allow(48)
    assert states(crop=48) == 7
    turned = {"class": 1 - sets.train_y["class"]}
    assert states(encoder, Labelled(sets.train, sets.val, turned, sets.val_y)) == 8
    for first in (0, 1):
        every_other = np.arange(first, 40, 2)
        some = {"class": sets.train_y["class"][every_other]}
        chosen = Labelled(sets.train.take(every_other), sets.val, some, sets.val_y)
        assert states(encoder, chosen) == 9 + first and sum(encoder.seen) == 20 + 13


def test_a_set_without_a_usable_image_is_refused(one_rank: None, root: Path, tmp_path: Path) -> None:
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"--val: none of the 14 images of .*val can be decoded"):
        trained(Encoder(), root, tmp_path / "out", "--epochs", 1)
