"""The figures, read back from their pixels, and the program that draws them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import visualize
from jepa.data.masks import Masks, MaskSpec, sample_masks
from jepa.model.vit import build_encoder
from jepa.pictures.attention import attention_maps
from jepa.pictures.curves import training_curves
from jepa.pictures.masks import masks_on_images
from jepa.pictures.pca import feature_pca, principal_components
from jepa.pictures.style import PALETTE
from small import small_config

PROGRAM = Path(__file__).resolve().parents[2] / "engine/visualize.py"
SIDE, PATCH = 8, 4
SIZE = SIDE * PATCH


def panels(path: Path, figure: Figure, count: int) -> list[np.ndarray]:
    """The pixels of the first `count` axes, cropped from the file that was written."""
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    cut = []
    for axes in figure.axes[:count]:
        x0, y0, x1, y1 = (round(edge) for edge in axes.get_window_extent().extents)
        cut.append(sheet[len(sheet) - y1 : len(sheet) - y0, x0:x1])
    return cut


def patch_centres(panel: np.ndarray) -> np.ndarray:
    """The colours in the middle of the patches, [SIDE * SIDE, 3]."""
    middle = ((np.arange(SIDE) + 0.5) * len(panel) / SIDE).astype(int)
    return panel[np.ix_(middle, middle)].reshape(-1, 3)


def coloured_patches(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with one random, strong colour per patch, and these colours [batch, N, 3]."""
    colors = torch.randint(0, 80, (batch, SIDE * SIDE, 3), dtype=torch.uint8)
    colors[..., 0] += 170
    grid = colors.view(batch, SIDE, SIDE, 3)
    return grid.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2), colors


@pytest.mark.parametrize("mode", ["reference", "packed"])
def test_masks_show_the_patches_that_are_kept_and_no_others(tmp_path: Path, mode: str) -> None:
    images, colors = coloured_patches(3)
    spec = MaskSpec(SIDE, SIDE, min_keep=4, num_enc_masks=2, mode=mode)
    masks = sample_masks(spec, seed=int(torch.randint(2**31, ())), step=3, first=0, batch=3)
    figure = masks_on_images(images, masks, PATCH, tmp_path / "masks.png")

    lengths = torch.full((2, 3), masks.context.shape[-1]) if masks.lengths is None else masks.lengths
    ends = lengths.flatten().cumsum(0)
    flat = masks.context.flatten().tolist()
    drawn = panels(tmp_path / "masks.png", figure, 3 * 7)
    for b in range(3):
        contexts = [flat[ends[e * 3 + b] - lengths[e, b] : ends[e * 3 + b]] for e in range(2)]
        expected = [range(SIDE * SIDE), *contexts, *masks.target[:, b].tolist()]
        for panel, kept in zip(drawn[7 * b : 7 * b + 7], expected, strict=True):
            shown = (abs(patch_centres(panel) - colors[b].numpy()) <= 1).all(-1)
            assert set(np.flatnonzero(shown)) == set(kept)


def test_each_target_is_outlined_in_its_own_colour(tmp_path: Path) -> None:
    images = torch.full((1, SIZE, SIZE, 3), 255, dtype=torch.uint8)
    block = torch.tensor([18, 19, 26, 27])  # rows 2 and 3, columns 2 and 3
    masks = Masks(torch.tensor([[[0, 1]]]), torch.stack([block, block + 20])[:, None])
    figure = masks_on_images(images, masks, PATCH, tmp_path / "masks.png")
    context, first, second = panels(tmp_path / "masks.png", figure, 4)[1:]

    def box(panel: np.ndarray, color: str) -> list[float]:
        """The bounds, in patches, of the rows and columns of pixels of this colour."""
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        y, x = np.nonzero((abs(panel - rgb) <= 2).all(-1))
        return [round(edge / len(panel) * SIDE, 1) for edge in (y.min(), y.max() + 1, x.min(), x.max() + 1)]

    for panel, color, expected in (
        (first, PALETTE[0], (2, 4, 2, 4)),
        (second, PALETTE[1], (4, 6, 6, 8)),
        (context, PALETTE[0], (2, 4, 2, 4)),
    ):
        assert box(panel, color) == pytest.approx(expected, abs=0.2)


def test_masks_of_other_images_are_refused(tmp_path: Path) -> None:
    images, _ = coloured_patches(2)
    masks = sample_masks(MaskSpec(14, 14), seed=0, step=0, first=0, batch=2)
    with pytest.raises(ValueError, match="patch_size"):
        masks_on_images(images, masks, PATCH, tmp_path / "masks.png")
    assert not list(tmp_path.iterdir())


def test_attention_is_brightest_where_it_goes(tmp_path: Path) -> None:
    N, peaks = SIDE * SIDE, torch.randperm(SIDE * SIDE)[:4].view(2, 2)  # of two images and two heads
    attention = torch.rand(2, 2, N, N)
    for b in range(2):
        for head in range(2):
            attention[b, head, :, peaks[b, head]] += 9
    attention /= attention.sum(-1, keepdim=True)
    images = torch.full((2, SIZE, SIZE, 3), 90, dtype=torch.uint8)
    figure = attention_maps(images, attention, tmp_path / "attention.png")

    drawn = panels(tmp_path / "attention.png", figure, 2 * 4)
    for b in range(2):
        _, mean, *heads = (patch_centres(panel).sum(-1) for panel in drawn[4 * b : 4 * b + 4])
        assert [int(head.argmax()) for head in heads] == peaks[b].tolist()
        assert set(np.argsort(mean)[-2:]) == set(peaks[b].tolist())


def test_principal_components_are_those_of_numpys_svd() -> None:
    features = torch.randn(3, 49, 20) @ torch.randn(20, 20) + 5 * torch.randn(20)
    components = principal_components(features)

    x = features.flatten(0, 1).double().numpy()
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    ours, theirs = components.flatten(0, 1).numpy(), u[:, :3] * s[:3]
    np.testing.assert_allclose(np.abs(ours.T @ theirs), np.diag(s[:3] ** 2), atol=1e-6 * s[0] ** 2)
    with pytest.raises(ValueError, match="width of 2"):
        principal_components(features[..., :2])


def test_patches_with_the_same_features_have_the_same_colour_in_every_image(tmp_path: Path) -> None:
    kinds = torch.randint(0, 4, (2, SIDE * SIDE))
    features = 10 * torch.randn(4, 12)[kinds] + 1e-3 * torch.randn(2, SIDE * SIDE, 12)
    images, _ = coloured_patches(2)
    figure = feature_pca(images, features, tmp_path / "features.png")

    colors = np.stack([patch_centres(panel) for panel in panels(tmp_path / "features.png", figure, 4)[2:]])
    means = np.stack([colors[kinds.numpy() == kind].mean(0) for kind in range(4)])
    assert abs(colors - means[kinds.numpy()]).max() <= 2
    apart = abs(means[:, None] - means[None]).max(-1) + 255 * np.eye(4)
    assert apart.min() > 20


def log_file(path: Path, rows: list[dict], end: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def test_a_log_has_a_panel_for_what_it_holds_and_the_lines_go_through_its_values(tmp_path: Path) -> None:
    values = np.random.default_rng(random.getrandbits(64)).random((12, 2))
    rows: list[dict] = [{"step": 5 * i, "loss": a, "jepa": a, "sim": 0.0, "std": 0.0, "cov": 0.0, "lr": b}
                        for i, (a, b) in enumerate(values.tolist())]  # fmt: skip
    rows[3] |= {"knn": 0.25, "target_rank": 7.0}
    rows[6] |= {"loss": float("nan"), "jepa": float("nan")}
    rows[8] |= {"knn": 0.5, "target_rank": 9.0, "linear": 0.75}
    rows[9] |= {"linear": 0.625}
    del rows[4]["lr"]
    figure = training_curves(log_file(tmp_path / "run.jsonl", rows, '{"step": 6'), tmp_path / "curves.png")

    found = {axes.get_title("left"): [line.get_xydata() for line in axes.lines] for axes in figure.axes}
    probes = found.pop("Accuracy of probes (%)")
    for line, wanted in zip(probes, ([[15, 25], [40, 50]], [[40, 75], [45, 62.5]]), strict=True):
        np.testing.assert_allclose(line, wanted)
    assert all(len(lines) == 1 for lines in found.values())  # the loss of I-JEPA is its prediction loss
    lines = {title: lines[0] for title, lines in found.items()}
    assert set(lines) == {"Loss", "Learning rate", "Effective rank of features"}
    np.testing.assert_allclose(lines["Learning rate"][:, 0], [5 * i for i in range(12) if i != 4])
    np.testing.assert_allclose(lines["Learning rate"][:, 1], np.delete(values[:, 1], 4))
    assert np.isnan(lines["Loss"][6, 1]) and np.isfinite(lines["Loss"]).sum() == 23
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["curves.png", "run.jsonl"]
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).min() < 128


def test_a_long_noisy_log_of_a_cjepa_is_smoothed_past_a_slow_first_step(tmp_path: Path) -> None:
    rng = np.random.default_rng(random.getrandbits(64))
    rows = [
        {"step": i, "loss": 2 - i / 400 + rng.normal(0, 0.1), "jepa": 1.0, "sim": rng.random(), "std": rng.random(),
         "cov": rng.random(), "step_ms": 9e4 if i == 0 else rng.uniform(90, 110), "data_wait_ms": 1.0}
        for i in range(400)
    ]  # fmt: skip
    figure = training_curves(log_file(tmp_path / "run.jsonl", rows), tmp_path / "curves.png")
    axes = {axes.get_title("left"): axes for axes in figure.axes}
    assert set(axes) == {"Loss", *(f"Loss term {key!r}" for key in ("jepa", "sim", "std", "cov")), "Step time (ms)"}
    raw, smooth = (line.get_ydata() for line in axes["Loss"].lines[:2])
    wanted = 2 - np.arange(400) / 400
    assert abs(smooth - wanted).mean() < 0.7 * abs(raw - wanted).mean()
    assert axes["Step time (ms)"].get_ylim()[1] < 400
    assert axes["Step time (ms)"].lines[1].get_ydata().max() < 120


@pytest.mark.parametrize("content", ["", '{"step": 1}\n', "step,loss\n", '{"step": 0, "loss": 1}\n?\n{"step": 2}\n'])
def test_a_log_without_numbers_or_damaged_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"run\.jsonl"):
        training_curves(tmp_path / "run.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def run_program(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, args)])
    return visualize.main()


def test_the_program_draws_a_checkpoint_and_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(random.getrandbits(64)).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
    config = small_config()
    monkeypatch.setattr(visualize, "load_encoder", lambda path: (build_encoder(config).eval(), config))
    log = log_file(tmp_path / "run.jsonl", [{"step": 0, "loss": 1.0}])
    out = tmp_path / "new" / "out"
    args = ("a checkpoint", "--images", tmp_path / "images", "--log", log, "--out", out, "--count", 3)
    assert run_program(monkeypatch, *args) == 0
    names = ["attention.png", "features.png", "masks.png", "curves.png"]
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in names]
    for name in names:
        with Image.open(out / name) as picture:
            picture.verify()


@pytest.mark.parametrize(
    "args, word",
    [
        ([], "checkpoint"),
        (["nowhere"], "--images"),
        (["--images", "."], "checkpoint"),
        (["nowhere", "--images", "."], "nowhere"),
        (["nowhere", "--images", ".", "--count", "0"], "--count"),
        (["--log", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_program(monkeypatch, *args, "--out", tmp_path / "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and word in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_it_runs_as_people_start_it(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    command = [sys.executable, str(PROGRAM), "--log", "empty.jsonl", "--out", "out"]
    env = os.environ | {"PYTHONPATH": str(PROGRAM.parents[1] / "kernels")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "empty.jsonl" in done.stderr
