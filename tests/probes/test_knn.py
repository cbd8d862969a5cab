"""The nearest neighbours' vote against scikit-learn's neighbours and a plain vote in float64."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jepa.data.sources import open_images
from jepa.probes import knn as protocol
from jepa.probes.knn import knn, nearest, vote
from probing import Encoder, alone, job_of, options, pixels_of, write_shades
from small import run_ranks

CPU = torch.device("cpu")


def blobs(samples: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Overlapping classes around corners of 12 dimensions that are the same in every set, none near the origin."""
    labels = torch.randint(0, classes, (samples,))
    corners = torch.randn(classes, 12, generator=torch.Generator().manual_seed(0)) + 1
    return corners[labels] + 1.2 * torch.randn(samples, 12), labels


def nearest_by_scikit_learn(train_x: Tensor, test_x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and indices."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    found = neighbors.NearestNeighbors(n_neighbors=k, metric="cosine").fit(train_x.double().numpy())
    distance, index = found.kneighbors(test_x.double().numpy())
    return 1 - distance, index


def plain_knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int, temperature: float) -> list[int]:
    """The classes that scikit-learn's neighbours vote for."""
    classes = []
    for row, numbers in zip(*nearest_by_scikit_learn(train_x, test_x, min(k, len(train_x))), strict=True):
        votes: dict[int, float] = {}
        for cosine, i in zip(row, numbers, strict=True):
            label = int(train_y[i])
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
        classes.append(max(votes, key=lambda label: votes[label]))
    return classes


@pytest.mark.parametrize("keys, queries", [(65536, 1024), (50, 7), (1, 1000)], ids=["whole", "in chunks", "one by one"])
def test_neighbours_are_scikit_learns(monkeypatch: pytest.MonkeyPatch, keys: int, queries: int) -> None:
    monkeypatch.setattr(protocol, "KEYS", keys)
    monkeypatch.setattr(protocol, "QUERIES", queries)
    (train_x, train_y), (test_x, test_y) = blobs(211), blobs(64)
    chosen, ks = np.sort(np.random.default_rng(random.getrandbits(32)).permutation(64)[:50]), [1, 3, 20, 211, 500]
    cosine, index = nearest(train_x, test_x, chosen, max(ks), CPU)
    wanted = nearest_by_scikit_learn(train_x, test_x[chosen], 211)
    np.testing.assert_allclose(cosine, wanted[0], atol=1e-6)
    np.testing.assert_array_equal(index[:, :20], wanted[1][:, :20])
    for temperature in (0.07, 0.005, 2.0):
        right = vote(cosine, index, train_y, test_y[chosen], ks, temperature)
        for k, total in zip(ks, right, strict=True):
            classes = plain_knn(train_x, train_y, test_x[chosen], k, temperature)
            assert total == sum(a == b for a, b in zip(classes, test_y[chosen].tolist(), strict=True)), (k, temperature)


def test_the_accuracy_is_the_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    (train_x, train_y), (test_x, test_y) = blobs(150), blobs(60)
    for k in (1, 7, 300):
        classes = torch.tensor(plain_knn(train_x, train_y, test_x, k, 0.07))
        assert knn(train_x, train_y, test_x, test_y, k=k) == pytest.approx((classes == test_y).double().mean().item())
    assert knn(train_x, train_y, train_x, train_y, k=1) == 1.0


def test_what_means_nothing_is_refused() -> None:
    (x, y), (t, u) = blobs(40), blobs(10)
    broken = x.clone()
    broken[3, 2] = torch.nan
    for given in ((broken, y, t, u), (x, y[1:], t, u), (x, y, t[:, 1:], u), (x[:4], y[:4], t, u), (x, y, t[:0], u[:0])):
        with pytest.raises(ValueError, match=r"train|test"):
            knn(*given)


def of_set(encoder: Encoder, root: Path, out: Path, *words: str) -> list[dict[str, str | float]]:
    """What the protocol finds on the ranks that are up."""
    folders = ("--train", root / "train", "--val", root / "val")
    return protocol.run(job_of(encoder, out), options(protocol, *folders, *words)).rows


def test_a_rank_without_images_finds_nothing() -> None:
    (train_x, train_y), (test_x, test_y) = blobs(20), blobs(1)
    none = np.arange(0)
    cosine, index = nearest(train_x, test_x, none, 3, CPU)
    assert cosine.shape == index.shape == (0, 3)
    assert vote(cosine, index, train_y, test_y[none], [1, 3], 0.07) == [0, 0]


@pytest.mark.ranks
def test_the_protocol_on_two_ranks_is_one_rank_and_the_oracle(tmp_path: Path) -> None:
    """Several k at once, of shades some of which are in the wrong class; two images are damaged."""
    write_shades(tmp_path, {"train": 9, "val": 6})
    for split in ("train", "val"):
        (tmp_path / split / "dark/0.png").rename(tmp_path / split / "light/9.png")
        (tmp_path / split / "light/1.png").rename(tmp_path / split / "dark/9.png")
        (tmp_path / split / "dark/2.png").write_bytes(b"not an image")
    encoder, words = Encoder(), ("--k", "1", "--k", "4", "--k", "99", "--temperature", "0.05", "--layers", "2")
    with alone():
        rows = of_set(encoder, tmp_path, tmp_path / "one", *words)
    assert run_ranks(2, of_set, encoder, tmp_path, tmp_path / "two", *words) == [rows, rows]

    features, shades, labels = [], [], []
    for split in ("train", "val"):
        source = open_images(tmp_path / split)
        good = [i for i, file in enumerate(source.files) if not file.endswith("dark/2.png")]
        images = pixels_of([source.files[i] for i in good])
        features.append(torch.cat([encoder.plain(images, layer).mean(1) for layer in (-2, -1)], 1))
        shades.append(torch.from_numpy(images.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))).flatten(1))
        labels.append(torch.from_numpy(source.labels[good]))
    assert [len(y) for y in labels] == [17, 11]
    for row, (train_x, val_x) in zip(rows, (features, shades), strict=True):
        for k in (1, 4, 99):
            classes = torch.tensor(plain_knn(train_x, labels[0], val_x, k, 0.05))
            assert row[f"class k={k}"] == pytest.approx(100 * (classes == labels[1]).double().mean().item()), k
    assert [row["features"] for row in rows] == ["encoder", "pixels"]


def test_sets_without_a_usable_image_and_senseless_options_are_refused(one_rank: None, tmp_path: Path) -> None:
    write_shades(tmp_path, {"train": 3, "val": 1})
    for words in (("--k", "0"), ("--k", "5", "--k", "-1"), ("--temperature", "0")):
        with pytest.raises(ValueError, match=r"--k .*, --temperature .*: wanted at least 1 and more than 0"):
            of_set(Encoder(), tmp_path, tmp_path / "out", *words)
    for split in ("val", "train"):
        for path in (tmp_path / split).rglob("*.png"):
            path.write_bytes(b"not an image")
        with pytest.raises(
            ValueError, match=rf"none of the {6 if split == 'train' else 2} images of .*/{split} can be"
        ):
            of_set(Encoder(), tmp_path, tmp_path / "out")
