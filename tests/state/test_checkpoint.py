"""Checkpoints restore the same values on any number of ranks at any ZeRO stage, and damage is noticed."""

import contextlib
import errno
import io
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jepa.data.masks import sample_masks
from jepa.methods import build
from jepa.state import restore
from jepa.state.checkpoint import Saver
from jepa.state.encoder import load_encoder
from jepa.state.restore import CheckpointError, read_state
from jepa.train import zero
from small import every_row, run_ranks, small_config, whole_weights

pytestmark = pytest.mark.ranks

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
SAVED = list(itertools.product((0, 1, 2, 3), (False, True)))


def start(folder: Path, stage: int, bf16: bool, *words: str) -> tuple[Any, Saver]:
    config = small_config(
        f"engine.zero_stage={stage}", f"meta.use_bfloat16={bf16}", "logging.save_every=1", "logging.keep_last=2",
        f"data.batch_size={8 // dist.get_world_size()}", "mask.cut=global", f"logging.folder={folder}", *words,
    )  # fmt: skip
    model_engine = zero.start(build(config), config)
    return model_engine, Saver(config, model_engine, steps_per_epoch=1000)


def one_step(model_engine: Any, step: int) -> None:
    """A step whose images depend only on its number, however many ranks share them."""
    share = 8 // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    features = torch.randn(8, 64, 24, generator=torch.Generator().manual_seed(step))
    masks = sample_masks(small_config().mask_spec, seed=0, step=step, first=0, batch=8)
    zero.schedule(model_engine, torch.tensor([0.01, 0.1, 0.9], dtype=torch.float64))
    output = model_engine([images[mine]], every_row(masks.context[:, mine], masks.target[:, mine]), features[mine])
    model_engine.backward(output.loss)
    assert zero.step(model_engine).applied


def everything(model_engine: object) -> dict[str, dict[str, Tensor]]:
    return {kind: whole_weights(model_engine, kind) for kind in KINDS}


def train_and_save(folder: Path) -> dict[str, dict]:
    """Two steps and a checkpoint at every stage and precision; returns the state that each should hold."""
    states = {}
    for stage, bf16 in SAVED:
        torch.manual_seed(stage)
        model_engine, saver = start(folder / f"{stage}{bf16}", stage, bf16)
        progress = saver.begin()
        for step in range(2):
            one_step(model_engine, step)
            progress.count(True, 8)
        saver.save(progress)
        states[f"{stage}{bf16}"] = everything(model_engine)
    return states


def resume_all(folder: Path, wanted: dict[str, dict]) -> list[str]:
    """Loads every checkpoint at another ZeRO stage; returns what differs."""
    wrong = []
    for stage, bf16 in SAVED:
        name, other = f"{stage}{bf16}", (stage + 1 + dist.get_world_size()) % 4
        torch.manual_seed(99)
        model_engine, saver = start(folder / name, other, bf16)
        progress = saver.resume("latest")
        found = everything(model_engine)
        case = f"ZeRO-{stage} to {other}, bf16 {bf16}, on {dist.get_world_size()} rank(s)"
        if (progress.step, progress.applied, progress.samples) != (2, 2, 16):
            wrong.append(f"{case}: {progress}")
        for kind, parameter in itertools.product(KINDS, wanted[name]["weight"]):
            a, b = (state[kind].get(parameter) for state in (found, wanted[name]))
            if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
                wrong.append(f"{case}: {kind} of {parameter} differs")
        if other < 3:
            low = torch.bfloat16 if bf16 else torch.float32
            for parameter, p in model_engine.module.named_parameters():
                if not torch.equal(p.detach().flatten(), wanted[name]["weight"][parameter].to(low)):
                    wrong.append(f"{case}: the training weight {parameter} is not the rounded fp32 weight")
        one_step(model_engine, 2)
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
    model_engine, saver = start(folder, 1, False)
    progress = saver.begin()
    for step in range(3):
        one_step(model_engine, step)
        progress.count(True, 8)
        saver.save(progress)


def resume(folder: Path, which: str, said: io.StringIO | None = None) -> int | str:
    """The step resumed from, or why not."""
    model_engine, saver = start(folder, 1, False)
    before = whole_weights(model_engine)
    try:
        with contextlib.redirect_stdout(said or io.StringIO()):
            return saver.resume(which).step
    except CheckpointError as error:
        after = whole_weights(model_engine)
        assert all(torch.equal(before[name], after[name]) for name in before), "a failed load changed the weights"
        return str(error)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[int(torch.randint(len(data), ()))] ^= 1 << int(torch.randint(8, ()))
    path.write_bytes(data)


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "a flipped bit": lambda folder: flip_a_bit(folder / "rank-00000.safetensors"),
    "a file cut short": lambda folder: os.truncate(folder / "rank-00000.safetensors", 1000),
    "a missing file": lambda folder: (folder / "rank-00000.safetensors").unlink(),
    "a flipped bit in the state": lambda folder: flip_a_bit(folder / "state.json"),
    "a missing state": lambda folder: (folder / "state.json").unlink(),
    "a state cut short": lambda folder: os.truncate(folder / "state.json", 200),
    "a pipe in place of the state": lambda folder: pipe_instead(folder / "state.json"),
    "a pipe in place of a file": lambda folder: pipe_instead(folder / "rank-00000.safetensors"),
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
        said = io.StringIO()
        assert resume(copy, "latest", said) == 2, what
        assert re.search(r"skipped: rank 0: .*/jepa-step00000003", said.getvalue()), what
        shutil.rmtree(copy / "jepa-step00000003.aside")
        if what == "a missing state":
            assert "no intact checkpoint" in str(resume(copy, str(copy / "jepa-step00000003"))), what
        damage(copy / "jepa-step00000002")
        assert "no intact checkpoint" in str(resume(copy, "latest")), what
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        start(whole, 1, False)[1].begin()


def test_damage_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    run_ranks(1, resume_damaged, tmp_path)


def watched_saves(folder: Path) -> None:
    """What a save does on disk, in which order, and which errors it survives."""
    model_engine, saver = start(folder, 1, False, "logging.keep_last=1")
    progress = saver.begin()
    fsync, rename, rmtree, symlink = os.fsync, Path.rename, shutil.rmtree, Path.symlink_to
    done: list[tuple[str, str]] = []

    def save(*faults: tuple[object, str, object], rotate: bool = True) -> str:
        progress.count(True, 8)
        one_step(model_engine, progress.step)
        with contextlib.ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()) as said:
            for where, name, fault in faults:
                stack.enter_context(mock.patch.object(where, name, fault))
            saver.save(progress, rotate)
        return said.getvalue()

    def noting_fsync(handle: int) -> None:
        done.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def noting_rename(self: Path, target: Path) -> None:
        done.append(("rename", str(target)))
        rename(self, target)

    save((os, "fsync", noting_fsync), (Path, "rename", noting_rename))
    partial, final = folder / ".jepa-step00000001.partial", folder / "jepa-step00000001"
    named = done.index(("rename", str(final)))
    for path in (partial / "rank-00000.safetensors", partial / "state.json", partial):
        assert ("sync", str(path)) in done[:named], path
    assert ("sync", str(folder)) in done[named:]

    def no_links(self: Path, target: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    assert "does not point to jepa-step00000002: [Errno 1] no links here" in save((Path, "symlink_to", no_links))
    assert Path.symlink_to is symlink and os.readlink(folder / "jepa-latest") == final.name

    # Two are kept though keep_last is 1; none is deleted while `rotate` is false.
    save()
    assert names(folder) == ["jepa-step00000002", "jepa-step00000003"]
    save(rotate=False)
    assert names(folder) == ["jepa-step00000002", "jepa-step00000003", "jepa-step00000004"]

    def stubborn(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "held open by somebody", str(path))

    assert "could not be deleted and is left for later" in save((shutil, "rmtree", stubborn))
    assert names(folder) == ["jepa-step00000004", "jepa-step00000005"]
    shutil.rmtree = stubborn
    assert resume(folder, "latest") == 5
    shutil.rmtree = rmtree
    assert resume(folder, "latest") == 5 and not list(folder.glob(".*.deleted*"))

    def flipping_fsync(handle: int) -> None:
        """Flips a bit on the way to disk."""
        if (path := Path(os.readlink(f"/proc/self/fd/{handle}"))).suffix == ".safetensors":
            flip_a_bit(path)
        fsync(handle)

    saver.lock.take()  # `resume` took it
    save((os, "fsync", flipping_fsync))
    said = io.StringIO()
    assert resume(folder, "latest", said) == 5 and "do not match the SHA-256" in said.getvalue()

    # What was set aside before is not overwritten.
    shutil.copytree(folder / "jepa-step00000005", folder / "jepa-step00000006")
    assert resume(folder, "latest") == 5
    assert {"jepa-step00000006.aside", "jepa-step00000006.aside-2"} <= {path.name for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("jepa-step*"))


def test_a_save_is_on_the_disk_before_it_has_its_name_and_survives_what_is_in_its_way(tmp_path: Path) -> None:
    run_ranks(1, watched_saves, tmp_path)


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
    assert sorted(p.name for p in tmp_path.iterdir()) == [".jepa.lock", "jepa-latest", "jepa-step00000001"]
    state = read_state(tmp_path / "jepa-step00000001")
    assert state["step"] == 1 and len(state["files"]) == 2


CHANGES = {
    "meta.depth=3": "refused: .*different model.*encoder.blocks.2",
    "engine.seed=5": "refused: .*engine.seed 0, this run has 5",
    "engine.gradient_accumulation_steps=2": "refused: .*global batch 8, this run has 16",
    "meta.num_heads=4": r"refused: .*encoder Size\(.*num_heads=2.*this run has Size\(.*num_heads=4",
    "data.crop_scale=[0.5,1.0]": r"refused: .*data.crop_scale \(0.3, 1.0\), this run has \(0.5, 1.0\)",
    "data.use_color_distortion=true": "refused: .*data.use_color_distortion False, this run has True",
    "data.use_gaussian_blur=true": "refused: .*data.use_gaussian_blur False, this run has True",
    "data.color_jitter_strength=0.5": "refused: .*data.color_jitter_strength 0.0, this run has 0.5",
    "mask.min_keep=5": "refused: .*mask.min_keep 4, this run has 5",
    "loss.beta_vicreg=0.5": "refused: .*loss.beta_vicreg 0.001, this run has 0.5.*--accept-changes",
    "meta.use_bfloat16=true": "refused: .*engine.precision fp32, this run has bf16",
    "optimization.lr=0.5": "optimization, lr 0.001, this run has 0.5\n",
    "data.num_workers=3": r"versions, torch \S+, this run has 9\n(.*\n)*resuming from \S+ at step 1\n",
}


def resume_another(folder: Path) -> list[str]:
    model_engine, saver = start(folder, 1, False)
    progress = saver.begin()
    one_step(model_engine, 0)
    progress.count(True, 8)
    saver.save(progress)
    messages = []
    for change in CHANGES:
        config = small_config(change, "data.batch_size=8", "mask.cut=global", f"logging.folder={folder}")
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), mock.patch.object(restore, "versions", lambda: {"torch": "9"}):
                Saver(config, zero.start(build(config), config), 1000).resume("latest")
            messages.append(said.getvalue())
        except CheckpointError as error:
            messages.append(f"refused: {error}")
    return messages


def test_what_changes_the_steps_is_refused_and_what_may_change_them_is_said(tmp_path: Path) -> None:
    for found, wanted in zip(run_ranks(1, resume_another, tmp_path)[0], CHANGES.values(), strict=True):
        assert re.search(wanted, found), (wanted, found)
    state = json.loads((tmp_path / "jepa-step00000001" / "state.json").read_text())
    assert state["samples"] == 8 and {"torch", "deepspeed", "numpy", "python"} <= set(state["versions"])
