"""The quick linear classifier against scikit-learn's logistic regression, the best linear rule, and itself on ranks."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa.data.sources import open_images
from jepa.data.synthetic import draw
from jepa.model.vit import VisionTransformer
from jepa.probes import linear
from jepa.probes.linear import STRENGTHS, Axes, linear_probe
from probing import Encoder, alone, job_of, options, pixels_of, write_shades
from small import run_ranks

CPU = torch.device("cpu")
Sets = list[tuple[Tensor, Tensor]]
CORNERS = torch.tensor([[2.0, 0, 0, 0, 0], [0, 2.0, 0, 0, 1], [0, 0, 2.0, 1, 0]])


def blobs(samples: int, spread: float) -> tuple[Tensor, Tensor]:
    """Three classes of points around fixed corners of 5 dimensions."""
    labels = torch.randint(0, 3, (samples,))
    return CORNERS[labels] + spread * torch.randn(samples, 5), labels


def of_scenes(width: int, *numbers: int) -> Sets:
    """A random encoder's features of drawn scenes, and their shapes: training and test set."""
    encoder = VisionTransformer(64, 16, width, 2, 3).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    sets, seed = [], random.getrandbits(31)
    for split, number in enumerate(numbers):
        scenes = draw(0, number, split=split, seed=seed)
        x = [encoder(images).mean(1) for images in torch.from_numpy(scenes.images).split(250)]
        sets.append((torch.cat(x), torch.from_numpy(scenes.shape)))
    return sets


def standardised(train_x: Tensor, test_x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    mean, deviation = train_x.double().mean(0), train_x.double().std(0, unbiased=False)
    return ((train_x.double() - mean) / deviation).numpy(), ((test_x.double() - mean) / deviation).numpy()


def by_scikit_learn(x: np.ndarray, y: Tensor, strength: float) -> Any:
    models = pytest.importorskip("sklearn.linear_model")
    return models.LogisticRegression(C=1 / (strength * len(x)), max_iter=5000, tol=1e-7).fit(x, y.numpy())


@pytest.fixture(scope="module")
def many() -> Sets:
    return of_scenes(48, 1200, 1200)


@pytest.fixture(scope="module")
def few() -> Sets:
    """Fewer images than dimensions."""
    return of_scenes(192, 120, 800)


@pytest.mark.slow
@pytest.mark.parametrize("which, strengths", [("many", (0.1, 1e-2, 1e-3)), ("few", (1.0, 0.01))])
def test_it_is_scikit_learns_logistic_regression_on_an_encoders_features(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, which: str, strengths: tuple[float, ...]
) -> None:
    """At the same strength of the penalty: accuracy, and what is minimised."""
    (train_x, train_y), (test_x, test_y) = request.getfixturevalue(which)
    a, b = standardised(train_x, test_x)
    axes = Axes(train_x, CPU)
    rotated = axes.rotated(train_x)
    ours = linear.fit(rotated, train_y, torch.arange(len(a)), axes, strengths, 6)
    for i, strength in enumerate(strengths):
        model = by_scikit_learn(a, train_y, strength)
        monkeypatch.setattr(linear, "STRENGTHS", (strength,))
        found = linear_probe(train_x, train_y, test_x, test_y)
        assert abs(found - model.score(b, test_y.numpy())) <= 0.005, strength

        def value(x: Tensor, weight: Tensor, bias: Tensor, strength: float = strength) -> float:
            loss = F.cross_entropy(x.double() @ weight.double() + bias.double(), train_y)
            return float(loss + strength / 2 * weight.double().square().sum())

        best = value(torch.from_numpy(a), torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_))
        assert best - 1e-4 < value(rotated, ours[0][:, i], ours[1][i]) < 1.01 * best + 1e-3


@pytest.mark.slow
def test_it_is_scikit_learns_best_of_several_strengths(monkeypatch: pytest.MonkeyPatch, many: Sets) -> None:
    """Chosen on the same fifth; strengths that it ranks within two of its 240 images may change places."""
    monkeypatch.setattr(linear, "STRENGTHS", (1.0, 0.1, 1e-3))
    (train_x, train_y), (test_x, test_y) = many
    a, b = standardised(train_x, test_x)
    held, fitted = linear.held_out(train_y, torch.randperm(1200, generator=torch.Generator().manual_seed(0)))
    scores = {s: by_scikit_learn(a[fitted], train_y[fitted], s).score(a[held], train_y[held]) for s in linear.STRENGTHS}
    best = [strength for strength, score in scores.items() if score >= max(scores.values()) - 2.5 / 240]
    wanted = [by_scikit_learn(a, train_y, strength).score(b, test_y.numpy()) for strength in best]
    found = linear_probe(train_x, train_y, test_x, test_y)
    assert min(abs(found - one) for one in wanted) <= 0.005, (found, wanted, scores)


def test_a_fifth_of_each_class_is_held_out() -> None:
    y = torch.cat([torch.full((count,), label) for label, count in enumerate((1, 2, 4, 9, 10, 50, 0, 1))])
    y = y[torch.randperm(len(y))]
    order = torch.randperm(len(y))
    held, fitted = linear.held_out(y, order)
    assert sorted(torch.cat([held, fitted]).tolist()) == list(range(len(y)))
    assert torch.bincount(y[held], minlength=8).tolist() == [0, 1, 1, 1, 2, 10, 0, 0]
    first = {label: [i for i in order.tolist() if y[i] == label] for label in range(8)}
    assert all(i in first[int(y[i])][:10] for i in held.tolist())


def test_one_image_of_each_class_is_enough() -> None:
    corners = 3 * torch.randn(6, 16)
    test_y = torch.randint(0, 6, (300,))
    test_x = corners[test_y] + 0.3 * torch.randn(300, 16)
    assert linear_probe(corners, torch.arange(6), test_x, test_y) > 0.9


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough where classes overlap."""
    monkeypatch.setattr(linear, "STEPS", 300)


def test_a_penalty_so_weak_that_noise_is_fitted_is_not_chosen(monkeypatch: pytest.MonkeyPatch, few_steps: None) -> None:
    """Dimensions of noise beside a few that matter, nearly as many as images."""

    def hard(samples: int) -> tuple[Tensor, Tensor]:
        x, y = blobs(samples, 1.0)
        return torch.cat([x, torch.randn(samples, 190)], 1), y

    (train_x, train_y), (test_x, test_y) = hard(200), hard(2000)
    found, alone = [], []
    for strengths in ((0.1, 1e-8), (1e-8, 0.1)):
        monkeypatch.setattr(linear, "STRENGTHS", strengths)
        found.append(linear_probe(train_x, train_y, test_x, test_y))
        monkeypatch.setattr(linear, "STRENGTHS", strengths[:1])
        alone.append(linear_probe(train_x, train_y, test_x, test_y))
    assert found == [alone[0]] * 2 and alone[0] > alone[1] + 0.1


def test_it_is_as_good_as_the_best_linear_rule_whatever_the_scale_of_the_features(few_steps: None) -> None:
    """Gaussian classes with the same covariance: the optimal rule is linear and known."""
    (train_x, train_y), (test_x, test_y) = blobs(5000, 0.9), blobs(20_000, 0.9)
    best = (torch.cdist(test_x, CORNERS).argmin(1) == test_y).double().mean().item()
    found = linear_probe(train_x, train_y, test_x, test_y)
    assert abs(found - best) < 0.01
    scale, shift = torch.logspace(-2, 3, 5), torch.tensor([7.0, -300, 0, 40, 1000])
    moved = linear_probe(train_x * scale + shift, train_y, test_x * scale + shift, test_y)
    assert moved == pytest.approx(found, abs=0.002)


def test_collinear_and_constant_features_are_as_good_as_what_they_are_made_of(few_steps: None) -> None:
    (train_x, train_y), (test_x, test_y) = blobs(1000, 0.9), blobs(2000, 0.9)
    found = linear_probe(train_x, train_y, test_x, test_y)
    mix = torch.randn(5, 40) * torch.logspace(0, -3, 40)
    mixed = [torch.cat([x @ mix + 5, torch.ones(len(x), 3)], 1) for x in (train_x, test_x)]
    assert linear_probe(mixed[0], train_y, mixed[1], test_y) == pytest.approx(found, abs=0.015)


def test_it_finds_nothing_in_noise(few_steps: None) -> None:
    labels, noise = torch.randint(0, 4, (4000,)), torch.randn(4000, 20)
    found = linear_probe(noise[:2000], labels[:2000], noise[2000:], labels[2000:])
    assert abs(found - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_axes_are_numpys_principal_axes_of_the_standardised_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in chunks, far from the origin."""
    monkeypatch.setattr(linear, "CHUNK", 64)
    x = 100 + torch.randn(300, 12) @ torch.randn(12, 12)
    axes = Axes(x, CPU)
    a, _ = standardised(x, x)
    _, singular, rows = np.linalg.svd(a, full_matrices=False)
    np.testing.assert_allclose(axes.squares.flip(0), singular**2 / 300, rtol=1e-3, atol=1e-5)
    turned = axes(x).double().numpy()
    np.testing.assert_allclose((turned**2).mean(0), axes.squares, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.abs(turned[:, ::-1]), np.abs(a @ rows.T), atol=2e-3)


def test_features_that_are_read_piece_by_piece_give_the_same(monkeypatch: pytest.MonkeyPatch, few_steps: None) -> None:
    (train_x, train_y), (test_x, test_y) = blobs(700, 1.2), blobs(500, 1.2)
    whole = linear_probe(train_x, train_y, test_x, test_y)
    axes = Axes(train_x, CPU)
    weights = [linear.fit(axes.rotated(train_x), train_y, torch.arange(700), axes, STRENGTHS[:4], 3)]
    monkeypatch.setattr(linear, "IN_MEMORY", 100)
    monkeypatch.setattr(linear, "CHUNK", 32)
    assert isinstance(axes.rotated(train_x), linear.Rotated)
    weights += [linear.fit(axes.rotated(train_x), train_y, torch.arange(700), axes, STRENGTHS[:4], 3)]
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert linear_probe(train_x, train_y, test_x, test_y) == pytest.approx(whole, abs=0.004)


def test_what_means_nothing_is_refused() -> None:
    (x, y), (t, u) = blobs(40, 1.0), blobs(10, 1.0)
    broken = x.clone()
    broken[3, 2] = torch.nan
    for given in ((broken, y, t, u), (x, y[1:], t, u), (x, y, t[:, 1:], u), (x[:4], y[:4], t, u), (x, y, t[:0], u[:0])):
        with pytest.raises(ValueError, match=r"train|test"):
            linear_probe(*given)


def of_set(encoder: Encoder, root: Path, out: Path) -> list[dict[str, str | float]]:
    """What the protocol finds on the ranks that are up."""
    folders = ("--train", root / "train", "--val", root / "val")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "STEPS", 300)
        return linear.run(job_of(encoder, out), options(linear, *folders, "--layers", 2)).rows


@pytest.mark.ranks
def test_the_protocol_on_two_ranks_is_one_rank_and_the_probe_of_the_same_features(
    tmp_path: Path, few_steps: None
) -> None:
    """Shades, some of which are in the wrong class, and one that is damaged: a misaligned label would show."""
    write_shades(tmp_path, {"train": 12, "val": 8})
    (tmp_path / "train/light/1.png").rename(tmp_path / "train/dark/90.png")
    (tmp_path / "val/light/1.png").rename(tmp_path / "val/dark/90.png")
    (tmp_path / "val/dark/2.png").write_bytes(b"not an image")
    encoder = Encoder()
    with alone():
        rows = of_set(encoder, tmp_path, tmp_path / "one")
    assert run_ranks(2, of_set, encoder, tmp_path, tmp_path / "two") == [rows, rows]
    sets: list[Tensor] = []
    for split in ("train", "val"):
        source = open_images(tmp_path / split)
        good = [i for i, file in enumerate(source.files) if not file.endswith("val/dark/2.png")]
        images = pixels_of([source.files[i] for i in good])
        x = torch.cat([encoder.plain(images, layer).mean(1) for layer in (-2, -1)], 1).float()
        sets += [x, torch.from_numpy(source.labels[good])]
    assert len(sets[3]) == 15
    assert rows[0] == {"features": "encoder", "class": pytest.approx(100 * linear_probe(*sets))}
    assert [row["features"] for row in rows] == ["encoder", "pixels"]
