"""A non-finite step is skipped and reported, and any single step can be replayed."""

import json
import re
from pathlib import Path

import pytest
import torch

from jepa.config.file import load_config
from jepa.config.schema import Config
from jepa.data.masks import Masks
from jepa.model.layout import Place
from jepa.train.schedules import Schedules
from jepa.train.step import poison
from processes import rows, start, write_config, write_images

pytestmark = pytest.mark.ranks

BAD_STEP, BAD_RANK, BAD_IMAGE = 3, 1, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    return write_config(folder / "config.yaml", write_images(folder / "images"))


def test_poison_changes_no_bit_and_makes_every_gradient_nan_where_the_loss_is_not_finite() -> None:
    for value in (*torch.randn(20).tolist(), 0.0, 1e38, 1e-44):
        x = torch.tensor(value, requires_grad=True)
        y = poison(x)
        y.backward(torch.tensor(0.3))
        assert y.item() == x.item() and x.grad is not None and x.grad.item() == torch.tensor(0.3).item()
    for value in (float("inf"), -float("inf"), float("nan")):
        x = torch.tensor(value, requires_grad=True)
        poison(x).backward()
        assert x.grad is not None and x.grad.isnan()


def one_image_is_poison(rank: int) -> None:
    """In the second micro-batch of one step, the target features of one image of one rank become NaN."""
    if rank != BAD_RANK:
        return
    from jepa.methods import ijepa
    from jepa.model.vit import VisionTransformer

    of, forward, at = ijepa.masks_of, VisionTransformer.forward, [(-1, -1)]

    def masks_of(config: Config, place: Place) -> Masks:
        at[0] = place.step, place.micro
        return of(config, place)

    def bad_forward(self: object, images: torch.Tensor, *context: object, **more: object) -> torch.Tensor:
        features = forward(self, images, *context, **more)
        if not context and at[0] == (BAD_STEP, 1):
            features = features.clone()
            features[BAD_IMAGE] = float("nan")
        return features

    ijepa.masks_of = masks_of
    VisionTransformer.forward = bad_forward


def test_a_poisoned_step_is_skipped_told_of_and_replayed(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("--config", config, "engine.gradient_accumulation_steps=2", "data.batch_size=3", "engine.zero_stage=1")
    words += (f"logging.save_every={BAD_STEP}", "logging.log_freq=4", "optimization.epochs=4")
    run = start(2, folder, *words, "engine.max_steps=8", fault=one_image_is_poison)
    assert run.wait() == [0, 0], run.text()
    assert f"step {BAD_STEP} skipped: the loss of rank(s) [{BAD_RANK}] is not finite" in run.text()
    log = {row["step"]: row for row in rows(folder)}
    bad = log.pop(BAD_STEP)
    assert bad["skipped"] and bad["bad_ranks"] == [BAD_RANK] and bad["loss"] is None and len(bad["files"]) == 6
    assert set(log) == {2, 5, 7} and not any("skipped" in row for row in log.values())
    schedules = Schedules(load_config(config, ["optimization.epochs=4"]), steps_per_epoch=40 // 12)
    for step, applied in ((2, 2), (5, 4), (7, 6)):  # the schedules did not advance for the skipped step
        wanted = (schedules.lr(applied), schedules.weight_decay(applied), schedules.momentum(applied))
        assert tuple(log[step][name] for name in ("lr", "weight_decay", "momentum")) == wanted, step
    state = json.loads((folder / "jepa-latest/state.json").read_text())
    assert (state["step"], state["applied"], state["skipped"], state["samples"]) == (8, 7, 1, 7 * 12)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run/**/*")}
    words += ("--replay-step", str(BAD_STEP), "--resume", str(folder / "jepa-step00000003"))
    alone = start(2, tmp_path / "alone", *words, fault=one_image_is_poison)
    assert alone.wait() == [0, 0], alone.text()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run/**/*")}
    assert not (tmp_path / "alone").exists()
    found = re.findall(r"rank (\d), features 'target' of (.*)", alone.text())
    assert found == [(str(BAD_RANK), bad["files"][3 + BAD_IMAGE])]
    assert re.search(r"rank 1, losses total, jepa\n", alone.text()) and "rank 0, losses" not in alone.text()
    assert re.search(r"\ngradients of .*encoder.blocks.0", alone.text())
    assert not re.search(r"rank 0, features", alone.text())


@pytest.mark.parametrize(("bf16", "mode", "step"), [(False, "packed", 3), (True, "reference", 3), (False, "packed", 4)])
def test_a_replay_is_the_step(bf16: bool, mode: str, step: int, config: Path, tmp_path: Path) -> None:
    """Loss and gradient norm are those that the run logged, even if no checkpoint is from right before the step."""
    folder = tmp_path / "run"
    words = (
        "--config",
        config,
        f"meta.use_bfloat16={bf16}",
        f"mask.mode={mode}",
        "logging.save_every=3",
        "engine.zero_stage=2",
    )
    assert start(2, folder, *words, "engine.max_steps=5").wait() == [0, 0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run = start(2, folder, *words, "--replay-step", step)
    assert run.wait() == [0, 0], run.text()
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    how = "" if step == 3 else ", advanced by 1 steps"
    assert "everything is finite" in run.text() and f"of step 3{how}\n" in run.text()
    row = rows(folder)[step]
    loss = sum(float(value) for value in re.findall(r"rank \d: total (\S+)", run.text())) / 2
    norm = float(re.findall(r"gradient norm (\S+):", run.text())[0])
    assert loss == pytest.approx(row["loss"], rel=1e-7)
    # In bf16 the run rounds each rank's gradient, and their mean, to 8 bits.
    assert norm == pytest.approx(row["grad_norm"], rel=2**-7 if bf16 else 1e-5)


def test_a_replay_with_other_weights_says_so_and_one_of_another_run_is_refused(config: Path, tmp_path: Path) -> None:
    folder, words = tmp_path / "run", ("--config", config, "logging.save_every=2")
    assert start(1, folder, *words, "engine.max_steps=3").wait() == [0]
    run = start(1, folder, *words, "--replay-step", 1, "--resume", folder / "jepa-step00000002")
    assert run.wait() == [0] and "not the weights that the run had at this step" in run.text()
    run = start(1, folder, *words, "--replay-step", 1)
    assert run.wait() == [1] and "no checkpoint of step 1 or before" in run.text()
    run = start(1, folder, *words, "--replay-step", 2, "loss.beta_vicreg=0.5")
    assert run.wait() == [1] and "loss.beta_vicreg 0.001, this run has 0.5" in run.text()
