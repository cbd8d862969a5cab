"""The state of a run, in and out: fp32 weights, both moments and the EMA by parameter name, for any number of ranks.

A checkpoint is a folder:

    state.json               step, counters, resolved config, versions; for every rank file its size, its SHA-256 and
                             which elements of which parameter lie where in it
    rank-00000.safetensors   the flat fp32 tensors of rank 0: weight.i, exp_avg.i, exp_avg_sq.i, ema.i
    ...

Every rank writes its own part, so no rank ever holds the whole; nothing in it is a pickle. It is written under a
temporary name and renamed when all of it is on the disk: a folder with its final name is whole.
"""

import glob
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from . import manifest
from .config import Config
from .restore import (
    KINDS,
    NAMES,
    CheckpointError,
    Reader,
    candidates,
    find_whole,
    refuse_change,
    sha256_of,
    shapes_of,
    step_of,
    together,
)
from .zero import Flat, flats, refresh_training_weights


@dataclass
class Progress:
    """How far a run is. `step` counts the steps tried and chooses the data; `applied` those that moved the weights."""

    step: int = 0
    applied: int = 0
    samples: int = 0
    skipped: int = 0

    def count(self, applied: bool, samples: int) -> None:
        """One more step was tried."""
        self.step += 1
        if applied:
            self.applied += 1
            self.samples += samples
        else:
            self.skipped += 1


class Saver:
    """The checkpoints of one run: `{tag}-step{N}`, of which the newest few are kept, and `{tag}-ep{N}`, which all are.
    `{tag}-latest` is a link to the newest.

    Every rank calls every method, at the same step.
    """

    def __init__(self, config: Config, engine: Any, steps_per_epoch: int) -> None:
        self.config, self.engine, self.steps_per_epoch = config, engine, steps_per_epoch
        self.folder, self.tag = Path(config.logging.folder), config.logging.write_tag
        self.every = config.logging.save_every or steps_per_epoch
        self.every_epochs = config.logging.checkpoint_freq * steps_per_epoch
        self.saved = -1  # the step of the newest checkpoint

    def begin(self) -> Progress:
        """A new run. Raises CheckpointError where the folder holds checkpoints already: nothing is overwritten."""
        if self._on_first(lambda: candidates(self.folder, self.tag)):
            raise CheckpointError(
                f"{self.folder} already holds checkpoints of {self.tag!r}: add --resume to go on from the newest, "
                "or choose another logging.folder or logging.write_tag"
            )
        self._on_first(lambda: tidy(self.folder, self.tag))
        self._on_first(self._try_to_write)
        return Progress()

    def resume(self, which: str, accept_changes: bool = False) -> Progress:
        """Goes on from a path, or from the newest whole checkpoint ("latest"); "auto" also begins a run where there
        is no checkpoint at all.

        Raises CheckpointError where there is none that is whole, where it belongs to another model, and where a step
        would compute something else than in the run that wrote it (`Config.law`), unless `accept_changes`.
        """
        self._on_first(lambda: tidy(self.folder, self.tag))
        newest = which in ("latest", "auto")
        paths = self._on_first(lambda: candidates(self.folder, self.tag)) if newest else [Path(which)]
        if which == "auto" and not paths:
            return self.begin()
        if not paths:
            raise CheckpointError(f"--resume: no checkpoint of {self.tag!r} in {self.folder}; start without --resume")
        path, state, damage = find_whole(paths)
        if damage and dist.get_rank() == 0:
            print("skipped: " + "; ".join(damage), flush=True)
        refuse_change(path, state, self.config, accept_changes)
        progress = load(path, state, self.engine)
        self.saved = progress.step
        self._on_first(self._try_to_write)
        self._on_first(lambda: self._set_aside(progress.step))
        if dist.get_rank() == 0:
            print(f"resuming from {path} at step {state['step']}", flush=True)
        return progress

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step % self.every == 0 or step % self.every_epochs == 0

    def save(self, progress: Progress) -> Path:
        if progress.step % self.every_epochs == 0:
            path = self._write(f"{self.tag}-ep{progress.step // self.steps_per_epoch}", progress)
        else:
            path = self._write(f"{self.tag}-step{progress.step:08d}", progress)
        self._on_first(lambda: self._tell_of(path))
        self.saved = progress.step
        return path

    def _tell_of(self, path: Path) -> None:
        """The link to the newest, and an end to those that are too old."""
        link = self.folder / f".{self.tag}-latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, self.folder / f"{self.tag}-latest")
        rolling = [p for p in candidates(self.folder, self.tag) if p.name.startswith(f"{self.tag}-step")]
        for old in rolling[self.config.logging.keep_last :]:
            _delete(old)

    def _try_to_write(self) -> None:
        """Better now than at the first checkpoint, hours later."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder):
            pass

    def _set_aside(self, step: int) -> None:
        """Steps after the one gone on from are taken again: their checkpoints must not pass for this run's."""
        for path in candidates(self.folder, self.tag):
            if step_of(path, self.steps_per_epoch) > step:
                aside = path.with_name(f"{path.name}.aside")
                if aside.exists():
                    _delete(aside)
                path.rename(aside)
                print(f"{path.name} is of a later step: renamed to {aside.name}; delete it when you like", flush=True)

    def _on_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on the first rank, whose view of the folder counts. Raises CheckpointError on all."""
        try:
            return together(lambda: work() if dist.get_rank() == 0 else None)[0]
        except OSError as error:
            raise CheckpointError(f"logging.folder {self.folder} cannot be written: {error}") from error

    def _write(self, name: str, progress: Progress) -> Path:
        """Writes `folder/name`; one of this name is replaced.

        Raises CheckpointError on every rank if any rank failed to write; what was there before is then untouched.
        """
        final, unfinished, first = self.folder / name, self.folder / f".{name}.partial", dist.get_rank() == 0

        def prepare() -> None:
            if first:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)

        def finish() -> None:
            if first:
                (unfinished / "state.json").write_text(manifest.seal(self._state(progress, files)))
                _sync(unfinished / "state.json")
                _swap(unfinished, final)

        try:
            together(prepare)
            files = together(lambda: _write_rank(unfinished, self.engine))
            together(finish)
        except OSError as error:
            if first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint {final} could not be written ({error}); those written before are whole"
            ) from error
        return final

    def _state(self, progress: Progress, files: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "format": manifest.FORMAT,
            **asdict(progress),
            "steps_per_epoch": self.steps_per_epoch,
            "law": self.config.law(dist.get_world_size()),
            "config": self.config.model_dump(mode="json"),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "shapes": shapes_of(self.engine.module),
            "files": files,
        }


def _write_rank(folder: Path, engine: Any) -> dict[str, Any]:
    rank, state = dist.get_rank(), engine.basic_optimizer.state
    mine = _to_write(engine)
    tensors, pieces = {}, []
    for i, flat in enumerate(mine):
        kept = state.get(flat.weight, {})
        tensors[f"weight.{i}"] = flat.weight.detach()
        tensors |= {f"{kind}.{i}": kept[kind] for kind in KINDS if kind in kept}
        pieces += [[p.name, p.start, p.length, i, p.offset] for p in flat.pieces]
    path = folder / f"rank-{rank:05d}.safetensors"
    safetensors.torch.save_file({k: t.flatten().cpu() for k, t in tensors.items()}, path)
    _sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "pieces": pieces}


def _to_write(engine: Any) -> list[Flat]:
    """Without ZeRO every rank holds everything: then each writes its share of the parameters."""
    everything = flats(engine)
    if engine.zero_optimization_stage() > 0:
        return everything
    return everything[dist.get_rank() :: dist.get_world_size()]


def load(path: Path, state: dict[str, Any], engine: Any) -> Progress:
    """Fills this rank's weights, moments and EMA from `path`, saved by any number of ranks at any ZeRO stage.

    `state` is its state.json; the files are taken to be verified. Raises CheckpointError, before anything is changed,
    where they hold another model.
    """
    ours = shapes_of(engine.module)
    if ours != state["shapes"]:
        names = sorted(set(ours) ^ set(state["shapes"])) or [n for n in ours if ours[n] != state["shapes"][n]]
        raise CheckpointError(
            f"{path} holds another model than the config describes; they differ in {len(names)} parameters, such as "
            f"{names[0]}: there {state['shapes'].get(names[0])}, here {ours.get(names[0])}"
        )
    progress = Progress(**{key: state[key] for key in asdict(Progress())})
    optimizer, reader = engine.basic_optimizer, Reader(path, state)
    for flat in flats(engine):
        kept = {kind: torch.zeros_like(flat.weight) for kind in KINDS[1:] if kind != "ema" or flat.group["ema"]}
        if progress.applied:
            counter = torch.tensor(float(progress.applied), device=flat.weight.device)
            optimizer.state[flat.weight] = {"step": counter, **kept}
        for kind, target in {"weight": flat.weight.data, **(kept if progress.applied else {})}.items():
            for piece in flat.pieces:
                for start, values in reader.read(kind, piece.name, piece.start, piece.length):
                    place = piece.offset + start - piece.start
                    target.view(-1)[place : place + len(values)].copy_(values)
    refresh_training_weights(engine)
    return progress


def tidy(folder: Path, tag: str) -> None:
    """Clears up after a run that was killed while it wrote or deleted: see the head of this file."""
    for path in folder.glob(f".{glob.escape(tag)}-*"):
        match = re.fullmatch(rf"({NAMES}|latest)\.(partial|deleted|old)", path.name[len(tag) + 2 :])
        if match is None:
            continue
        final, state = path.with_name(f"{tag}-{match[1]}"), match[3]
        if path.is_symlink():
            path.unlink()
        elif state == "old" and not final.exists():
            path.rename(final)
            print(f"{final.name} was being replaced when the run ended: its name is given back", flush=True)
        else:
            shutil.rmtree(path)
            print(f"removed {path.name}, left by a run that was killed", flush=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(partial: Path, final: Path) -> None:
    """Gives a finished folder its name; one of that name steps aside first and is deleted last."""
    _sync(partial)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _delete(path: Path) -> None:
    """Takes the name away first: a folder of this name is whole or not there."""
    going = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going)
