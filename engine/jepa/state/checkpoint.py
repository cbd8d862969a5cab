"""Saves and loads a run's state: fp32 weights, both moments and the EMA by parameter name, for any number of ranks.

A checkpoint is a folder:

    state.json               step, counters, resolved config, versions; for every rank file its size, its SHA-256 and
                             which elements of which parameter are where in it
    rank-00000.safetensors   the flat fp32 tensors of rank 0: weight.i, exp_avg.i, exp_avg_sq.i, ema.i
    ...

Every rank writes its own part, so no rank ever holds the whole state; nothing is pickled. A checkpoint is written under
a temporary name and renamed once all of it is on disk, so a folder with its final name is complete.
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

from jepa.config.schema import Config

from . import manifest
from .lock import Lock
from .partitions import Flat, flats, refresh_training_weights
from .restore import (
    KINDS,
    NAMES,
    CheckpointError,
    Reader,
    candidates,
    entries,
    find_whole,
    kinds_in,
    on_all,
    on_first,
    refuse_change,
    shapes_of,
    together,
    versions,
)


@dataclass
class Progress:
    """A run's progress. `step` counts attempted steps and selects the data, `applied` those that updated weights."""

    step: int = 0
    applied: int = 0
    samples: int = 0
    skipped: int = 0

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """Reads it from the contents of state.json."""
        return cls(**{key: state[key] for key in asdict(cls())})

    def count(self, applied: bool, samples: int) -> None:
        """Counts one attempted step."""
        self.step += 1
        if applied:
            self.applied += 1
            self.samples += samples
        else:
            self.skipped += 1


class Saver:
    """The checkpoints of one run: rolling `{tag}-step{N}`, of which the newest few are kept, and `{tag}-ep{N}`, which
    are all kept. `{tag}-latest` is a symlink to the newest.

    Every rank calls every method at the same step.
    """

    def __init__(
        self,
        config: Config,
        model_engine: Any,
        steps_per_epoch: int,
        images: dict[str, int | str] | None = None,
        lock: Lock | None = None,
    ) -> None:
        """`images`: `ImageSource.fingerprint`."""
        self.config, self.model_engine, self.steps_per_epoch, self.images = (
            config,
            model_engine,
            steps_per_epoch,
            images or {},
        )
        self.folder, self.tag = Path(config.logging.folder), config.logging.write_tag
        self.every = config.logging.save_every or steps_per_epoch
        self.every_epochs = config.logging.checkpoint_freq * steps_per_epoch
        self.lock = lock or Lock(config)
        self.newest: Path | None = None

    def begin(self) -> Progress:
        """Begins a new run. Raises CheckpointError if the folder already holds checkpoints: nothing is overwritten."""
        if self._open_folder(parents=True):
            raise CheckpointError(
                f"{self.folder} already holds checkpoints of {self.tag!r}: add --resume to continue from the newest, "
                "or choose another logging.folder or logging.write_tag"
            )
        return Progress()

    def resume(self, which: str, accept_changes: bool = False) -> Progress:
        """Continues from a path, or from the newest intact checkpoint ("latest"); "auto" also begins a new run if there
        is no checkpoint at all.

        Raises CheckpointError if none is intact, if it belongs to another model, or, unless `accept_changes`, if a step
        would compute something different than in the run that wrote it (`refuse_change`).
        """
        named = which not in ("latest", "auto")
        if which == "latest" and not self._on_first(lambda: bool(entries(self.folder))):
            found = []  # without creating the folder
        else:
            found = self._open_folder(parents=named)
        paths = [Path(which)] if named else [path for _, path in found]
        if which == "auto" and not paths:
            return Progress()
        if not paths:
            raise CheckpointError(
                f"--resume or meta.load_checkpoint: no checkpoint of {self.tag!r} in {self.folder}; start without"
            )
        path, state = find_whole(paths)
        refuse_change(path, state, self.config, shapes_of(self.model_engine.module), self.images, accept_changes)
        progress = load(path, state, self.model_engine)
        self.newest = path
        self._on_first(lambda: self._set_aside([p for step, p in found if step > progress.step]))
        if dist.get_rank() == 0:
            print(f"resuming from {path} at step {state['step']}", flush=True)
        return progress

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step % self.every == 0 or step % self.every_epochs == 0

    def save(self, progress: Progress, rotate: bool = True) -> Path:
        """Writes a checkpoint and, if `rotate`, deletes rolling ones that are too old. Two of them are always kept:
        every step from the newest one's weights may be non-finite, while the one before is known to have led to a
        finite step, provided that `rotate` is false while steps are being skipped."""
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
        except OSError as error:  # the link is a convenience, and not every file system has symlinks
            print(f"{self.tag}-latest does not point to {path.name}: {error}", flush=True)

    def _rotate(self) -> None:
        names = [re.fullmatch(rf"{re.escape(self.tag)}-step(\d+)", entry.name) for entry in entries(self.folder)]
        rolling = sorted((int(name[1]), name[0]) for name in names if name)
        for _, name in rolling[: -max(2, self.config.logging.keep_last)]:
            _delete(self.folder / name)

    def _open_folder(self, parents: bool) -> list[tuple[int, Path]]:
        """Creates the folder, takes its lock, cleans it up, and returns the checkpoints in it, newest first.

        `parents`: if false, only the last component of the path is created, so that a run does not start over below
        the mount point of a missing disk.
        """

        def work() -> tuple[str, list[tuple[int, Path]]]:
            try:
                self.folder.mkdir(parents=parents, exist_ok=True)
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"--resume auto creates only the last folder of a path, and {self.folder.parent} does not exist: "
                    "mount it or create it"
                ) from error
            text = self.lock.take()
            tidy(self.folder, self.tag)
            return text, candidates(self.folder, self.tag, self.steps_per_epoch)

        text, found = self._on_first(work)
        on_all(self.folder, lambda: self.lock.see(text))
        return found

    def _set_aside(self, later: list[Path]) -> None:
        """Steps after the resumed one are repeated: checkpoints of them must not be mistaken for this run's."""
        for path in later:
            aside = _unused(path.with_name(f"{path.name}.aside"))
            path.rename(aside)
            print(f"{path.name} is from a later step: renamed to {aside.name}, which can be deleted", flush=True)

    def _on_first(self, work: Callable[[], Any]) -> Any:
        return on_first(self.folder, work)

    def _write(self, name: str, progress: Progress) -> Path:
        """Writes `folder/name`, replacing one of the same name.

        Raises CheckpointError on every rank if any rank fails to write; existing checkpoints are then untouched.
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
            files = together(lambda: _write_rank(unfinished, self.model_engine))
            together(finish)
        except OSError as error:
            if first:
                _delete(unfinished)
            raise CheckpointError(
                f"the checkpoint {final} could not be written ({error}); earlier checkpoints are intact"
            ) from error
        return final

    def _state(self, progress: Progress, files: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "format": manifest.FORMAT,
            **asdict(progress),
            "moments": all(flat.weight in self.model_engine.basic_optimizer.state for flat in flats(self.model_engine)),
            "steps_per_epoch": self.steps_per_epoch,
            "fingerprint": self.config.fingerprint(dist.get_world_size()) | self.images,
            "config": self.config.model_dump(mode="json"),
            "versions": versions(),
            "averaged": list(self.config.method.averaged),
            "shapes": shapes_of(self.model_engine.module),
            "files": files,
        }


def _write_rank(folder: Path, model_engine: Any) -> dict[str, Any]:
    rank, state = dist.get_rank(), model_engine.basic_optimizer.state
    mine = _to_write(model_engine)
    tensors, pieces = {}, []
    for i, flat in enumerate(mine):
        kept = state.get(flat.weight, {})
        tensors[f"weight.{i}"] = flat.weight.detach()
        tensors |= {f"{kind}.{i}": kept[kind] for kind in KINDS if kind in kept}
        pieces += [[p.name, p.start, p.length, i, p.offset] for p in flat.fragments]
    return {**_write_tensors(folder / f"rank-{rank:05d}.safetensors", tensors), "pieces": pieces}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes flat fp32 tensors to a safetensors file, one after another.

    The SHA-256 is of the data as written, not as read back, so corruption on the way to disk is detected.
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


def _to_write(model_engine: Any) -> list[Flat]:
    """The flats this rank writes. Without ZeRO every rank holds all parameters, so each writes a share of them."""
    everything = flats(model_engine)
    if model_engine.zero_optimization_stage() > 0:
        return everything
    return everything[dist.get_rank() :: dist.get_world_size()]


def load(path: Path, state: dict[str, Any], model_engine: Any) -> Progress:
    """Loads this rank's weights, moments and EMA from `path`, saved by any number of ranks at any ZeRO stage.

    `state` is its state.json; the caller has verified the files and that they hold this model.
    """
    progress = Progress.of(state)
    optimizer, reader, begun = model_engine.basic_optimizer, Reader(path, state), "ema" in kinds_in(state)
    for flat in flats(model_engine):
        kept = {kind: torch.zeros_like(flat.weight) for kind in KINDS[1:] if kind != "ema" or flat.group["ema"]}
        if begun:
            counter = torch.tensor(float(progress.applied), device=flat.weight.device)
            optimizer.state[flat.weight] = {"step": counter, **kept}
        for kind, target in {"weight": flat.weight.data, **(kept if begun else {})}.items():
            for fragment in flat.fragments:
                for start, values in reader.read(kind, fragment.name, fragment.start, fragment.length):
                    place = fragment.offset + start - fragment.start
                    target.view(-1)[place : place + len(values)].copy_(values)
    refresh_training_weights(model_engine)
    return progress


def tidy(folder: Path, tag: str) -> None:
    """Cleans up after a run that was killed while writing or deleting a checkpoint."""
    for path in [Path(entry) for entry in entries(folder) if entry.name.startswith(f".{tag}-")]:
        match = re.fullmatch(rf"({NAMES}|latest)\.(partial|deleted|old)(-\d+)?", path.name[len(tag) + 2 :])
        if match is None:
            continue
        final = path.with_name(f"{tag}-{match[1]}")
        if path.is_symlink():
            path.unlink()
        elif match[3] == "old" and not final.exists():
            path.rename(final)
            print(f"{final.name} was being replaced when the run ended: restored", flush=True)
        elif _delete(path):
            print(f"removed {path.name}, left by a killed run", flush=True)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(partial: Path, final: Path) -> None:
    """Renames a finished folder to its final name; an existing one is moved aside first and deleted last."""
    _sync(partial)
    old = _unused(final.with_name(f".{final.name}.old")) if final.exists() else None
    if old:
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    if old:
        _delete(old)


def _unused(path: Path) -> Path:
    """`path`, or if it exists, the first numbered variant (`path-2`, ...) that does not."""
    names = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(name for name in chain([path], names) if not os.path.lexists(name))


def _delete(path: Path) -> bool:
    """Deletes a folder if it exists; an old one that cannot be deleted must not stop the run. Returns whether it did.

    A checkpoint is renamed first, so that a folder with a checkpoint's name is always complete.
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
        print(f"{path} could not be deleted and is left for later: {error}", flush=True)
        return False
