"""What a method without averages does, whichever it is: two ranks are one, at every ZeRO stage it trains the same,
holds no memory for an average and is probed, it resumes bit for bit and is replayed, and it learns."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jepa.data import synthetic
from jepa.data.loader import eval_batches
from jepa.data.sources import open_images
from jepa.methods import build
from jepa.model.layout import Place
from jepa.probes.knn import knn
from jepa.state.encoder import load_encoder
from jepa.state.partitions import flats
from jepa.train import zero
from jepa.train.memory import memory_per_rank
from jepa.train.step import start_model
from processes import start, write_config, write_images
from small import run_ranks
from soak import log_of
from views import OWN, WITHOUT_AVERAGES, config_of, general, random_views

pytestmark = pytest.mark.ranks

CPU = torch.device("cpu")
each = pytest.mark.parametrize("name", WITHOUT_AVERAGES)


def losses_and_gradient(name: str, state: dict[str, Tensor], views: list[Tensor]) -> tuple[list[Tensor], Any]:
    """This rank's part of the batch: its loss and terms, and the gradient averaged over the ranks."""
    config, rank, world = config_of(name), dist.get_rank(), dist.get_world_size()
    model = build(config)
    model.load_state_dict(state)
    mine = [images.chunk(world)[rank] for images in views]
    output = model(mine, model.layout(config, Place(3, 0, rank, world), CPU), None)
    output.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    dist.all_reduce(gradient)
    return [output.loss.detach(), *output.terms], gradient / world


@each
def test_two_ranks_with_half_the_batch_are_one_rank_with_all_of_it(name: str) -> None:
    config = config_of(name)
    state, views = general(config).state_dict(), random_views(config, 8)
    (wanted, gradient), *_ = run_ranks(1, losses_and_gradient, name, state, views)
    halves = run_ranks(2, losses_and_gradient, name, state, views)
    for one, other, whole in zip(halves[0][0], halves[1][0], wanted, strict=True):
        assert ((one + other) / 2).item() == pytest.approx(whole.item(), rel=1e-5, abs=2e-6)
    for _, mean in halves:
        assert float((mean - gradient).norm()) < 2e-5 * float(gradient.norm())


def kinds_of_state(name: str) -> dict[int, set[str]]:
    """What the optimizer keeps of the weights after a step, at each ZeRO stage."""
    found = {}
    for stage in range(4):
        config = config_of(name, f"engine.zero_stage={stage}")
        model_engine, teacher = start_model(config, CPU)
        zero.schedule(model_engine, torch.tensor([1e-3, 0.1, 0.9], dtype=torch.float64))
        layout = model_engine.module.layout(config, Place(0, 0, dist.get_rank(), dist.get_world_size()), CPU)
        model_engine.backward(model_engine(random_views(config, 4), layout, None).loss)
        assert teacher is None and zero.step(model_engine).applied
        state = model_engine.basic_optimizer.state
        found[stage] = {kind for flat in flats(model_engine) for kind in state.get(flat.weight, {})}
        model_engine.destroy()
    return found


@each
def test_there_is_no_teacher_and_no_memory_for_one(name: str) -> None:
    for found in run_ranks(2, kinds_of_state, name):
        assert all(found[stage] == {"step", "exp_avg", "exp_avg_sq"} for stage in range(4))
    for stage in range(4):
        memory = memory_per_rank(config_of(name, f"engine.zero_stage={stage}"), 2)
        assert memory.ema == memory.teacher == 0 and memory.moments > 0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which two ranks have different numbers of batches."""
    return write_images(tmp_path_factory.mktemp("images"), 41)


@pytest.fixture(scope="module")
def words(images: Path) -> tuple[object, ...]:
    config = write_config(images.parent / "config.yaml", images)
    probe = ("eval.every=4", f"eval.train_path={images}", f"eval.val_path={images}", "eval.knn_k=3")
    return ("--config", config, "logging.save_every=2", "logging.health_freq=2", *probe)


def of(name: str) -> tuple[str, ...]:
    return (f"loss.objective={name}", *OWN.get(name, ()))


def accuracy(checkpoint: Path, images: Path) -> float:
    """Of the encoder in a checkpoint, as the online probe measures it."""
    encoder, config = load_encoder(checkpoint)
    source = open_images(images)
    ((pixels, numbers),) = eval_batches(source, crop_size=config.data.crop_size, batch_size=len(source))
    with torch.no_grad():
        x, y = encoder(pixels).mean(1), torch.from_numpy(source.labels[numbers])
    return knn(x, y, x, y, k=3)


@each
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_trains_alike_and_is_probed(
    name: str, ranks: int, words: tuple[object, ...], images: Path, tmp_path: Path
) -> None:
    logs = []
    for stage in (0, 1, 2, 3) if ranks == 2 else (3,):
        folder = tmp_path / str(stage)
        run = start(ranks, folder, *words, *of(name), "engine.max_steps=4", f"engine.zero_stage={stage}")
        assert run.wait() == [0] * ranks, run.text()
        logs.append(log_of(folder)[0])
        assert logs[-1][3]["knn"] == pytest.approx(accuracy(folder / "jepa-latest", images), abs=1e-6), stage
        assert not any("teacher" in key or key == "momentum" for row in logs[-1] for key in row)
    for log in logs[1:]:
        for row, wanted in zip(log, logs[0], strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=2e-6) and row.keys() == wanted.keys()


@each
@pytest.mark.parametrize("stage", [1, 3])
def test_it_resumes_bit_for_bit_and_is_replayed(
    name: str, stage: int, words: tuple[object, ...], tmp_path: Path
) -> None:
    words = (*words, *of(name), f"engine.zero_stage={stage}", "engine.gradient_accumulation_steps=2")
    words += ("optimization.epochs=4",)  # of two steps
    for folder, *more in (("whole", "engine.max_steps=5"), ("parts", "engine.max_steps=2")):
        assert start(2, tmp_path / folder, *words, *more).wait() == [0, 0]
    run = start(2, tmp_path / "parts", *words, "engine.max_steps=5", "--resume")
    assert run.wait() == [0, 0], run.text()
    log = log_of(tmp_path / "whole")
    assert log_of(tmp_path / "parts") == log and [row["step"] for row in log[0]] == [*range(5)]

    run = start(2, tmp_path / "whole", *words, "--replay-step", 4)
    assert run.wait() == [0, 0], run.text()
    totals = [float(value) for value in re.findall(r"rank \d: total (\S+)", run.text())]
    norm = float(re.findall(r"gradient norm (\S+):", run.text())[0])
    row = log[0][4]
    assert sum(totals) / 2 == pytest.approx(row["loss"], rel=1e-6) and "everything is finite" in run.text()
    assert norm == pytest.approx(row["grad_norm"], rel=1e-5)


@each
def test_it_learns_from_the_demos_scenes(name: str, tmp_path: Path) -> None:
    synthetic.write(tmp_path / "scenes", {"train": 256, "val": 6}, 0)
    config = write_config(tmp_path / "config.yaml", tmp_path / "scenes/train")
    size = ("data.crop_size=64", "mask.patch_size=8", "data.batch_size=32", "data.num_workers=2")
    rate = ("optimization.lr=2e-3", "optimization.warmup=1", "optimization.epochs=20", "logging.health_freq=20")
    run = start(1, tmp_path / "run", "--config", config, *of(name), *size, *rate)
    assert run.wait(seconds=300) == [0], run.text()
    log = log_of(tmp_path / "run")[0]
    first, *_, last = torch.tensor([row["loss"] for row in log]).chunk(4)
    error = ((first.var() + last.var()) / len(last)).sqrt()  # of the difference of the means
    assert last.mean() < first.mean() - 5 * error
    assert "collapsing" not in run.text() and log[-1]["feature_rank"] > 2
