"""Checkpoints: the same numbers back on any number of ranks and any ZeRO stage, and damage that is noticed."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jepa import zero
from jepa.checkpoint import Saver
from jepa.interop import load_encoder
from jepa.masks import sample_masks
from jepa.objective import JepaModel
from jepa.restore import CheckpointError, read_state
from small import run_ranks, small_config, whole_weights

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
SAVED = list(itertools.product((0, 1, 2, 3), (False, True)))


def start(folder: Path, stage: int, bf16: bool) -> tuple[object, Saver]:
    config = small_config(
        f"engine.zero_stage={stage}", f"meta.use_bfloat16={bf16}", "logging.save_every=1", "logging.keep_last=2",
        f"data.batch_size={8 // dist.get_world_size()}", "mask.cut=global", f"logging.folder={folder}",
    )  # fmt: skip
    engine = zero.start(JepaModel(config), config)
    return engine, Saver(config, engine, steps_per_epoch=1000)


def one_step(engine: object, step: int) -> None:
    """A step whose images depend on nothing but its number, however many ranks share them."""
    share = 8 // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    features = torch.randn(8, 64, 24, generator=torch.Generator().manual_seed(step))
    masks = sample_masks(small_config().mask_spec, seed=0, step=step, first=0, batch=8)
    zero.schedule(engine, torch.tensor([0.01, 0.1, 0.9], dtype=torch.float64))
    output = engine(images[mine], masks.context[:, mine], masks.target[:, mine], features[mine])
    engine.backward(output.losses.total)
    assert zero.step(engine).applied


def everything(engine: object) -> dict[str, dict[str, Tensor]]:
    return {kind: whole_weights(engine, kind) for kind in KINDS}


def train_and_save(folder: Path) -> dict[str, dict]:
    """Two steps and a checkpoint at every stage and precision; the state that each should hold."""
    states = {}
    for stage, bf16 in SAVED:
        torch.manual_seed(stage)
        engine, saver = start(folder / f"{stage}{bf16}", stage, bf16)
        progress = saver.begin()
        for step in range(2):
            one_step(engine, step)
            progress.count(True, 8)
        saver.save(progress)
        states[f"{stage}{bf16}"] = everything(engine)
    return states


def resume_all(folder: Path, wanted: dict[str, dict]) -> list[str]:
    """Loads every checkpoint into another stage; returns what differs."""
    wrong = []
    for stage, bf16 in SAVED:
        name, other = f"{stage}{bf16}", (stage + 1 + dist.get_world_size()) % 4
        torch.manual_seed(99)
        engine, saver = start(folder / name, other, bf16)
        progress = saver.resume("latest")
        found = everything(engine)
        case = f"ZeRO-{stage} to {other}, bf16 {bf16}, on {dist.get_world_size()} rank(s)"
        if (progress.step, progress.applied, progress.samples) != (2, 2, 16):
            wrong.append(f"{case}: {progress}")
        for kind, parameter in itertools.product(KINDS, wanted[name]["weight"]):
            a, b = (state[kind].get(parameter) for state in (found, wanted[name]))
            if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
                wrong.append(f"{case}: {kind} of {parameter} differs")
        if other < 3:
            low = torch.bfloat16 if bf16 else torch.float32
            for parameter, p in engine.module.named_parameters():
                if not torch.equal(p.detach().flatten(), wanted[name]["weight"][parameter].to(low)):
                    wrong.append(f"{case}: the training weight {parameter} is not the rounded fp32 weight")
        one_step(engine, 2)
    return wrong


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_any_topology_resumes_any_other(before: int, after: int, tmp_path: Path) -> None:
    states = run_ranks(before, train_and_save, tmp_path)[0]
    for name, state in states.items():
        encoder, _ = load_encoder(tmp_path / name / "jepa-latest")
        for parameter, value in encoder.named_parameters():
            assert torch.equal(value.flatten(), state["ema"][f"encoder.{parameter}"]), (name, parameter)
    for found in run_ranks(after, resume_all, tmp_path, states):
        assert not found, found


def save_thrice(folder: Path) -> None:
    engine, saver = start(folder, 1, False)
    progress = saver.begin()
    for step in range(3):
        one_step(engine, step)
        progress.count(True, 8)
        saver.save(progress)


def resume(folder: Path, which: str) -> int | str:
    """The step gone on from, or why not."""
    engine, saver = start(folder, 1, False)
    before = whole_weights(engine)
    try:
        return saver.resume(which).step
    except CheckpointError as error:
        after = whole_weights(engine)
        assert all(torch.equal(before[name], after[name]) for name in before), "a failed load changed the weights"
        return str(error)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[int(torch.randint(len(data), ()))] ^= 1 << int(torch.randint(8, ()))
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda folder: flip_a_bit(folder / "rank-00000.safetensors"),
    "a file cut short": lambda folder: os.truncate(folder / "rank-00000.safetensors", 1000),
    "a missing file": lambda folder: (folder / "rank-00000.safetensors").unlink(),
    "a flipped bit in the state": lambda folder: flip_a_bit(folder / "state.json"),
    "a missing state": lambda folder: (folder / "state.json").unlink(),
    "a state cut short": lambda folder: os.truncate(folder / "state.json", 200),
}


def resume_damaged(folder: Path) -> None:
    whole = folder / "whole"
    save_thrice(whole)
    names = sorted(p.name for p in whole.glob("jepa-step*"))
    assert names == ["jepa-step00000002", "jepa-step00000003"], "keep_last=2"
    assert (whole / "jepa-latest").resolve().name == "jepa-step00000003"
    for what, damage in DAMAGE.items():
        copy = folder / what
        shutil.copytree(whole, copy, symlinks=True)
        damage(copy / "jepa-step00000003")
        assert resume(copy, "latest") == 2, what
        assert isinstance(resume(copy, str(copy / "jepa-step00000003")), str), what
        damage(copy / "jepa-step00000002")
        assert "no whole checkpoint" in str(resume(copy, "latest")), what
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        start(whole, 1, False)[1].begin()


def test_damage_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    run_ranks(1, resume_damaged, tmp_path)


def fail_to_write(folder: Path) -> str:
    """The second rank cannot write: its file's name is taken by a folder."""
    _, saver = start(folder, 1, False)
    progress = saver.begin()
    progress.count(True, 8)
    saver.save(progress)
    progress.count(True, 8)
    rename = Path.mkdir

    def mkdir_with_obstacle(self: Path, *args: object, **kwargs: object) -> None:
        rename(self, *args, **kwargs)
        if self.name.endswith(".partial"):
            rename(self / "rank-00001.safetensors")

    Path.mkdir = mkdir_with_obstacle
    try:
        saver.save(progress)
    except CheckpointError as error:
        return str(error)
    finally:
        Path.mkdir = rename
    return "saved"


def test_a_rank_that_cannot_write_stops_all_and_harms_nothing(tmp_path: Path) -> None:
    for message in run_ranks(2, fail_to_write, tmp_path):
        assert "rank 1" in message and "could not be written" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["jepa-latest", "jepa-step00000001"]
    state = read_state(tmp_path / "jepa-step00000001")
    assert state["step"] == 1 and len(state["files"]) == 2


def resume_another(folder: Path) -> list[str]:
    _, saver = start(folder, 1, False)
    progress = saver.begin()
    progress.count(True, 8)
    saver.save(progress)
    messages = []
    for change in ("meta.depth=3", "engine.seed=5", "engine.gradient_accumulation_steps=2"):
        config = small_config(change, "data.batch_size=8", "mask.cut=global", f"logging.folder={folder}")
        try:
            Saver(config, zero.start(JepaModel(config), config), 1000).resume("latest")
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_another_model_seed_or_batch_is_refused(tmp_path: Path) -> None:
    model, seed, batch = run_ranks(1, resume_another, tmp_path)[0]
    assert "another model" in model and "encoder.blocks.2" in model
    assert "engine.seed 0, this run has 5" in seed
    assert "global batch 8, this run has 16" in batch
    assert json.loads((tmp_path / "jepa-step00000001" / "state.json").read_text())["samples"] == 8
