"""The probes against independent computations, and evaluate.py on a real checkpoint."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image

from evaluate import features, labels_of, last, pixels
from jepa.data.sources import open_images
from jepa.data.synthetic import write
from jepa.model.vit import VisionTransformer
from jepa.probes.features import evenly, extract, open_labelled
from jepa.probes.knn import knn
from jepa.probes.linear import _solve, linear_probe
from jepa.probes.online import OnlineProbe
from small import MAPPING, run_ranks, small_config

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def blobs(samples: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes of points around fixed corners of 5 dimensions."""
    labels = torch.randint(0, 3, (samples,))
    corners = torch.tensor([[2.0, 0, 0, 0, 0], [0, 2.0, 0, 0, 1], [0, 0, 2.0, 1, 0]])
    return corners[labels] + spread * torch.randn(samples, 5), labels


def test_knn_votes_as_defined() -> None:
    train_x, train_y = blobs(150, 1.0)
    test_x, test_y = blobs(60, 1.0)
    a, b = train_x.double().numpy(), test_x.double().numpy()
    right = 0
    for row, label in zip(b, test_y.tolist(), strict=True):
        cosine = a @ row / np.linalg.norm(a, axis=1) / np.linalg.norm(row)
        votes = np.zeros(3)
        for i in np.argsort(-cosine)[:7]:
            votes[train_y[i]] += np.exp(cosine[i] / 0.07)
        right += votes.argmax() == label
    assert knn(train_x, train_y, test_x, test_y, k=7) == pytest.approx(right / 60)


def test_linear_probe_is_as_good_as_the_best_linear_rule() -> None:
    """Gaussian classes with the same covariance: the optimal rule is linear and known."""
    (train_x, train_y), (test_x, test_y) = blobs(3000, 0.9), blobs(3000, 0.9)
    corners = torch.tensor([[2.0, 0, 0, 0, 0], [0, 2.0, 0, 0, 1], [0, 0, 2.0, 1, 0]])
    best = (torch.cdist(test_x, corners).argmin(1) == test_y).double().mean().item()
    # Standardisation undoes the shift and scale of the features.
    found = linear_probe(train_x * 50 + 7, train_y, test_x * 50 + 7, test_y)
    assert abs(found - best) < 0.02


def test_solver_finds_the_minimum_that_newton_finds() -> None:
    """On features whose scales span a factor of 1000, like an untrained encoder's along their principal axes."""
    (x, y), strength = blobs(120, 1.5), 10.0 ** float(np.random.default_rng(random.getrandbits(64)).uniform(-8, 0))
    x = x.double() * torch.logspace(0, -3, 5, dtype=torch.float64)
    design = np.hstack([x.numpy(), np.ones((120, 1))])
    penalty = np.kron(np.diag([strength] * 5 + [0.0]), np.eye(3))
    weights = np.zeros((6, 3))
    for _ in range(50):
        scores = design @ weights
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        slope = (design.T @ (p - np.eye(3)[y.numpy()]) / 120).ravel() + penalty @ weights.ravel()
        curve = np.einsum("sa,sb,sij->aibj", design, design, p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None])
        # Shifting all biases changes nothing, so the Hessian is singular along that direction: least squares.
        weights -= np.linalg.lstsq(curve.reshape(18, 18) / 120 + penalty, slope, rcond=1e-12)[0].reshape(6, 3)
    found = _solve(x, y, torch.zeros(6, 3, dtype=torch.float64), strength).numpy()
    np.testing.assert_allclose(found[:-1], weights[:-1], atol=1e-3 * np.abs(weights).max(), err_msg=f"{strength=}")
    probability = torch.from_numpy(design @ found).softmax(1).numpy()
    np.testing.assert_allclose(probability, p, atol=1e-4, err_msg=f"{strength=}")


@pytest.mark.parametrize("probe", [knn, linear_probe])
def test_probes_refuse_what_means_nothing(probe: Callable[..., float]) -> None:
    (x, y), (t, u) = blobs(40, 1.0), blobs(10, 1.0)
    broken = x.clone()
    broken[3, 2] = torch.nan
    for given in ((broken, y, t, u), (x, y[1:], t, u), (x, y, t[:, 1:], u), (x[:4], y[:4], t, u), (x, y, t[:0], u[:0])):
        with pytest.raises(ValueError, match=r"train|test"):
            probe(*given)


def test_linear_probe_finds_nothing_in_noise() -> None:
    labels = torch.randint(0, 4, (4000,))
    noise = torch.randn(4000, 20)
    found = linear_probe(noise[:2000], labels[:2000], noise[2000:], labels[2000:])
    assert abs(found - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_extract_pools_over_patches() -> None:
    batches = [(torch.randint(0, 256, (n, 4, 4, 3), dtype=torch.uint8), list(range(n))) for n in (5, 2)]
    features, numbers = extract(lambda images: images.flatten(2).double(), batches)
    wanted = np.concatenate([images.numpy().reshape(-1, 4, 12).mean(1) for images, _ in batches])
    np.testing.assert_allclose(features, wanted, rtol=1e-6)
    assert numbers == [0, 1, 2, 3, 4, 0, 1]


def shades(folder: Path, splits: dict[str, int]) -> None:
    """`splits` gives the images per class; one class is dark, one light. The first dark one for training is damaged."""
    for split, images in splits.items():
        for darkest, name in ((0, "dark"), (160, "light")):
            (folder / split / name).mkdir(parents=True)
            for i in range(images):
                colour = tuple(random.randint(darkest, darkest + 80) for _ in range(3))
                Image.new("RGB", (16, 16), colour).save(folder / split / name / f"{i}.png")
    (folder / "train/dark/0.png").write_bytes(b"not an image")


def online(train: str, val: str) -> tuple[float, int]:
    """A rank's accuracy with mean colours as features, and how many images it saw."""
    overrides = "eval.every=1", f"eval.train_path={train}", f"eval.val_path={val}", "eval.knn_k=3"
    probe, seen = OnlineProbe(small_config(*overrides), dist.get_rank(), dist.get_world_size(), CPU), []

    def colours(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images.flatten(1, 2).double()

    return probe(colours)["knn"], sum(seen)


@pytest.mark.ranks
def test_ranks_share_a_probe_however_few_its_images(tmp_path: Path) -> None:
    """Five readable images of six, and two, on three ranks: the same result as on one."""
    shades(tmp_path, {"train": 3, "val": 1})
    train, val = str(tmp_path / "train"), str(tmp_path / "val")
    ((alone, images),) = run_ranks(1, online, train, val)
    assert images == 5 + 2
    together = run_ranks(3, online, train, val)
    assert [accuracy for accuracy, _ in together] == [alone] * 3 and sum(seen for _, seen in together) == images


def test_labels_follow_the_images_that_can_be_read(tmp_path: Path) -> None:
    """The pixels separate the classes, so a single misaligned label would show."""
    shades(tmp_path, {"train": 8, "val": 4})
    (tmp_path / "val/light/2.png").write_bytes(b"not an image")
    sources, config = open_labelled(tmp_path / "train", tmp_path / "val"), small_config()
    read = [features(pixels, source, config, CPU) for source in sources]
    assert [len(numbers) for _, numbers in read] == [15, 7]
    sets = [x for (found, numbers), y in zip(read, labels_of(sources, None), strict=True) for x in (found, y[numbers])]
    assert linear_probe(*sets) == 1.0


def test_last_joins_the_blocks_asked_for() -> None:
    encoder = VisionTransformer(16, 4, 24, 3, 2).eval()
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(last(encoder, 1)(images), encoder(images))
        joined = last(encoder, 2)(images)
        torch.testing.assert_close(joined[..., 24:], encoder(images))
        # The second of three blocks is the last of an encoder without the third.
        encoder.blocks = encoder.blocks[:2]
        torch.testing.assert_close(joined[..., :24], encoder(images))
    for layers in (0, 3):
        with pytest.raises(ValueError, match="2 blocks"):
            last(encoder, layers)


def test_labels_are_read_from_the_table_whatever_the_way_to_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "set", {"train": 40, "val": 12})
    sources = [open_images(os.path.relpath(tmp_path / "set" / split)) for split in ("train", "val")]
    counts, distances = labels_of(sources, "count"), labels_of(sources, "distance")
    for source, count, quarter in zip(sources, counts, distances, strict=True):
        with (Path(source.path) / "labels.csv").open() as file:
            rows = {row["file"]: row for row in csv.DictReader(file)}
        mine = [rows["/".join(Path(source.name(i)).parts[-2:])] for i in range(len(source))]
        assert count.tolist() == [int(row["count"]) - 1 for row in mine]
        values = np.array([float(row["distance"]) for row in mine])
        assert all(values[quarter == q].max() < values[quarter == q + 1].min() for q in range(3))
    table = tmp_path / "set/val/labels.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match="no row for 1 images"):
        labels_of(sources, "count")


def test_evenly_spreads_without_repeats() -> None:
    for total in (1, 7, 100, 101):
        for wanted in (None, 1, 7, 100, 500):
            chosen = evenly(total, wanted)
            assert len(set(chosen.tolist())) == len(chosen) == min(total, wanted or total)
            assert chosen.min() >= 0 and chosen.max() < total


@pytest.mark.slow
def test_evaluate_and_online_probe_agree(tmp_path: Path) -> None:
    write(tmp_path / "set", {"train": 60, "val": 24})
    train, val = (str(tmp_path / "set" / split) for split in ("train", "val"))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(MAPPING | {"data": MAPPING["data"] | {"root_path": train}}))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}

    def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "engine" / program), *words]
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)

    done = run(
        "train.py", "--config", str(config), f"logging.folder={tmp_path / 'run'}", "engine.max_steps=3", "eval.every=3",
        f"eval.train_path={train}", f"eval.val_path={val}", "eval.knn_k=5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    online = json.loads((tmp_path / "run/jepa.jsonl").read_text().splitlines()[-1])["knn"]
    checkpoint, out = str(tmp_path / "run/jepa-latest"), tmp_path / "probe.json"
    done = run(
        "evaluate.py",
        checkpoint,
        "--train",
        train,
        "--val",
        val,
        "--label",
        "shape",
        "--label",
        "distance",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    rows = {row["features"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"target encoder", "untrained encoder", "pixels"}
    assert rows["target encoder"]["shape k-NN"] == pytest.approx(100 * online)
    assert f"{rows['pixels']['shape linear']:.1f} %" in done.stdout

    plain = tmp_path / "plain"  # no sub-folders, so no classes: the table's labels suffice
    for split in ("train", "val"):
        (plain / split).mkdir(parents=True)
        with (tmp_path / "set" / split / "labels.csv").open(newline="") as table:
            kept = [row | {"file": row["file"].replace("/", "-")} for row in csv.DictReader(table)]
        for path in (tmp_path / "set" / split).glob("*/*.jpg"):
            shutil.copy(path, plain / split / f"{path.parent.name}-{path.name}")
        with (plain / split / "labels.csv").open("w", newline="") as table:
            writer = csv.DictWriter(table, list(kept[0]))
            writer.writeheader()
            writer.writerows(kept)
    folders = "--train", str(plain / "train"), "--val", str(plain / "val")
    done = run("evaluate.py", checkpoint, *folders, "--label", "shape", "--out", str(out))
    assert done.returncode == 0, done.stderr
    for row in json.loads(out.read_text()):
        assert row["shape k-NN"] == pytest.approx(rows[row["features"]]["shape k-NN"])
    wrong = run("evaluate.py", checkpoint, "--train", train, "--val", str(tmp_path / "nowhere"))
    assert wrong.returncode == 1 and "nowhere" in wrong.stderr and "Traceback" not in wrong.stderr
