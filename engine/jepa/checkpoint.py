"""The state of a run, in and out: fp32 weights, both moments and the EMA by parameter name, for any number of ranks.

A checkpoint is a folder:

    state.json               step, counters, resolved config, versions; for every rank file its size, its SHA-256 and
                             which elements of which parameter lie where in it
    rank-00000.safetensors   the flat fp32 tensors of rank 0: weight.i, exp_avg.i, exp_avg_sq.i, ema.i
    ...

Every rank writes its own part, so no rank ever holds the whole; nothing in it is a pickle. It is written under a
temporary name and renamed when all of it is on the disk: a folder with its final name is whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import manifest
from .config import Config
from .lock import Lock
from .restore import (
    KINDS,
    NAMES,
    CheckpointError,
    Reader,
    candidates,
    entries,
    find_whole,
    on_all,
    on_first,
    refuse_change,
    shapes_of,
    together,
    versions,
)
from .zero import Flat, flats, refresh_training_weights


@dataclass
class Progress:
    """How far a run is. `step` counts the steps tried and chooses the data; `applied` those that moved the weights."""

    step: int = 0
    applied: int = 0
    samples: int = 0
    skipped: int = 0

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """What state.json says."""
        return cls(**{key: state[key] for key in asdict(cls())})

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

    def __init__(
        self,
        config: Config,
        engine: Any,
        steps_per_epoch: int,
        images: dict[str, int | str] | None = None,
        lock: Lock | None = None,
    ) -> None:
        """`images`: `ImageSource.fingerprint`."""
        self.config, self.engine, self.steps_per_epoch, self.images = config, engine, steps_per_epoch, images or {}
        self.folder, self.tag = Path(config.logging.folder), config.logging.write_tag
        self.every = config.logging.save_every or steps_per_epoch
        self.every_epochs = config.logging.checkpoint_freq * steps_per_epoch
        self.lock = lock or Lock(config)
        self.newest: Path | None = None

    def begin(self) -> Progress:
        """A new run. Raises CheckpointError where the folder holds checkpoints already: nothing is overwritten."""
        if self._open_folder(parents=True):
            raise CheckpointError(
                f"{self.folder} already holds checkpoints of {self.tag!r}: add --resume to go on from the newest, "
                "or choose another logging.folder or logging.write_tag"
            )
        return Progress()

    def resume(self, which: str, accept_changes: bool = False) -> Progress:
        """Goes on from a path, or from the newest whole checkpoint ("latest"); "auto" also begins a run where there
        is no checkpoint at all.

        Raises CheckpointError where there is none that is whole, where it belongs to another model, and where a step
        would compute something else than in the run that wrote it (`refuse_change`), unless `accept_changes`.
        """
        named = which not in ("latest", "auto")
        if which == "latest" and not self._on_first(lambda: bool(entries(self.folder))):
            found = []  # and no folder is made
        else:
            found = self._open_folder(parents=named)
        paths = [Path(which)] if named else [path for _, path in found]
        if which == "auto" and not paths:
            return Progress()
        if not paths:
            raise CheckpointError(f"--resume: no checkpoint of {self.tag!r} in {self.folder}; start without --resume")
        path, state = find_whole(paths)
        refuse_change(path, state, self.config, shapes_of(self.engine.module), self.images, accept_changes)
        progress = load(path, state, self.engine)
        self.newest = path
        self._on_first(lambda: self._set_aside([p for step, p in found if step > progress.step]))
        if dist.get_rank() == 0:
            print(f"resuming from {path} at step {state['step']}", flush=True)
        return progress

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step % self.every == 0 or step % self.every_epochs == 0

    def save(self, progress: Progress, rotate: bool = True) -> Path:
        """Writes a checkpoint and, if `rotate`, deletes those that are too old. Of the rolling ones two always stay:
        the newest may hold weights from which no step is finite, and of the one before it is known that one was, if
        `rotate` is false while steps are being skipped."""
        if progress.step % self.every_epochs == 0:
            path = self._write(f"{self.tag}-ep{progress.step // self.steps_per_epoch}", progress)
        else:
            path = self._write(f"{self.tag}-step{progress.step:08d}", progress)
        self._on_first(lambda: self._link(path))
        if rotate:
            self._on_first(self._rotate)
        self.newest = path
        return path

    def _link(self, path: Path) -> None:
        link = self.folder / f".{self.tag}-latest.partial"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            os.replace(link, self.folder / f"{self.tag}-latest")
        except OSError as error:  # a convenience, and not every file system has links
            print(f"{self.tag}-latest does not point to {path.name}: {error}", flush=True)

    def _rotate(self) -> None:
        names = [re.fullmatch(rf"{re.escape(self.tag)}-step(\d+)", entry.name) for entry in entries(self.folder)]
        rolling = sorted((int(name[1]), name[0]) for name in names if name)
        for _, name in rolling[: -max(2, self.config.logging.keep_last)]:
            _delete(self.folder / name)

    def _open_folder(self, parents: bool) -> list[tuple[int, Path]]:
        """Makes the folder, takes its lock, clears it up, and returns the checkpoints in it, the newest first.

        `parents`: else only the last part of its path is made, so that a run does not begin anew beneath the mount
        point of a disk that is missing.
        """

        def work() -> tuple[str, list[tuple[int, Path]]]:
            try:
                self.folder.mkdir(parents=parents, exist_ok=True)
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"--resume auto makes no folder but the last, and {self.folder.parent} does not exist: mount it, "
                    "or make it"
                ) from error
            text = self.lock.take()
            tidy(self.folder, self.tag)
            return text, candidates(self.folder, self.tag, self.steps_per_epoch)

        text, found = self._on_first(work)
        on_all(self.folder, lambda: self.lock.see(text))
        return found

    def _set_aside(self, later: list[Path]) -> None:
        """Steps after the one gone on from are taken again: their checkpoints must not pass for this run's."""
        for path in later:
            aside = _unused(path.with_name(f"{path.name}.aside"))
            path.rename(aside)
            print(f"{path.name} is of a later step: renamed to {aside.name}; delete it when you like", flush=True)

    def _on_first(self, work: Callable[[], Any]) -> Any:
        return on_first(self.folder, work)

    def _write(self, name: str, progress: Progress) -> Path:
        """Writes `folder/name`; one of this name is replaced.

        Raises CheckpointError on every rank if any rank failed to write; what was there before is then untouched.
        """
        final, unfinished, first = self.folder / name, self.folder / f".{name}.partial", dist.get_rank() == 0

        def prepare() -> None:
            if first:
                self.lock.see(self.lock.mine)
                _delete(unfinished)
                unfinished.mkdir(parents=True, exist_ok=True)

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
                _delete(unfinished)
            raise CheckpointError(
                f"the checkpoint {final} could not be written ({error}); those written before are whole"
            ) from error
        return final

    def _state(self, progress: Progress, files: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "format": manifest.FORMAT,
            **asdict(progress),
            "steps_per_epoch": self.steps_per_epoch,
            "fingerprint": self.config.fingerprint(dist.get_world_size()) | self.images,
            "config": self.config.model_dump(mode="json"),
            "versions": versions(),
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
    return {**_write_tensors(folder / f"rank-{rank:05d}.safetensors", tensors), "pieces": pieces}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes flat fp32 tensors as a safetensors file, one after the other.

    The SHA-256 is that of what was to be written, not of what can be read back: damage on the way to the disk is seen.
    """
    places, end = {}, 0
    for key, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        places[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [begin, end]}
    head = json.dumps(places).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        lines: Iterator[Any] = (tensor.float().flatten().cpu().numpy() for tensor in tensors.values())
        for data in chain([len(head).to_bytes(8, "little"), head], lines):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": 8 + len(head) + end, "sha256": digest.hexdigest()}


def _to_write(engine: Any) -> list[Flat]:
    """Without ZeRO every rank holds everything: then each writes its share of the parameters."""
    everything = flats(engine)
    if engine.zero_optimization_stage() > 0:
        return everything
    return everything[dist.get_rank() :: dist.get_world_size()]


def load(path: Path, state: dict[str, Any], engine: Any) -> Progress:
    """Fills this rank's weights, moments and EMA from `path`, saved by any number of ranks at any ZeRO stage.

    `state` is its state.json; its files are taken to be verified, and to hold this model.
    """
    progress = Progress.of(state)
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


def gathered(engine: Any, kind: str, name: str, shape: list[int]) -> Tensor:
    """The whole of one parameter, fp32, from all ranks: what `Reader.tensor` reads. Every rank calls it."""
    values = torch.zeros(shape, device=flats(engine)[0].weight.device)
    for flat in _to_write(engine):
        line = flat.weight.detach() if kind == "weight" else engine.basic_optimizer.state[flat.weight].get(kind)
        for piece in (piece for piece in flat.pieces if piece.name == name):
            part = line.view(-1)[piece.offset : piece.offset + piece.length]
            values.view(-1)[piece.start : piece.start + piece.length] = part
    dist.all_reduce(values)  # each element is one rank's, and zero elsewhere
    return values


def tidy(folder: Path, tag: str) -> None:
    """Clears up after a run that was killed while it wrote or deleted: see the head of this file."""
    for path in [Path(entry) for entry in entries(folder) if entry.name.startswith(f".{tag}-")]:
        match = re.fullmatch(rf"({NAMES}|latest)\.(partial|deleted|old)(-\d+)?", path.name[len(tag) + 2 :])
        if match is None:
            continue
        final = path.with_name(f"{tag}-{match[1]}")
        if path.is_symlink():
            path.unlink()
        elif match[3] == "old" and not final.exists():
            path.rename(final)
            print(f"{final.name} was being replaced when the run ended: its name is given back", flush=True)
        elif _delete(path):
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
    old = _unused(final.with_name(f".{final.name}.old")) if final.exists() else None
    if old:
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    if old:
        _delete(old)


def _unused(path: Path) -> Path:
    """This name or, where it is taken, the first one with a number behind it that is not."""
    names = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(name for name in chain([path], names) if not os.path.lexists(name))


def _delete(path: Path) -> bool:
    """Deletes a folder if it is there and lets itself be deleted; what is old must not stop what is new.

    A checkpoint loses its name first: a folder of such a name is whole or not there.
    """
    try:
        if not path.name.startswith("."):
            going = _unused(path.with_name(f".{path.name}.deleted"))
            path.rename(going)
            path = going
        shutil.rmtree(path)
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        print(f"{path} cannot be deleted, which can wait: {error}", flush=True)
        return False
