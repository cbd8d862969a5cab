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
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from . import manifest
from .config import Config
from .zero import Flat, flats, refresh_training_weights

NAMES = r"(step\d{8,}|ep\d+)"  # what follows {tag}-
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which file, why, and what to do."""


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


@dataclass(frozen=True)
class Part:
    """Elements [start, start + length) of a parameter, at `offset` in the `index`-th flat tensors of a rank's file."""

    name: str
    start: int
    length: int
    file: str
    index: int
    offset: int


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
            if _step_of(path, self.steps_per_epoch) > step:
                aside = path.with_name(f"{path.name}.aside")
                if aside.exists():
                    _delete(aside)
                path.rename(aside)
                print(f"{path.name} is of a later step: renamed to {aside.name}; delete it when you like", flush=True)

    def _on_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on the first rank, whose view of the folder counts. Raises CheckpointError on all."""
        try:
            return _together(lambda: work() if dist.get_rank() == 0 else None)[0]
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
            _together(prepare)
            files = _together(lambda: _write_rank(unfinished, self.engine))
            _together(finish)
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


def find_whole(paths: list[Path]) -> tuple[Path, dict[str, Any], list[str]]:
    """The first of `paths` that is whole, its state.json, and what is wrong with those before it.

    Every rank calls it, and checks its share of the files. Raises CheckpointError where none is whole.
    """
    damage: list[str] = []
    for path in paths:
        try:
            return path, _together(partial(_checked, path))[0], damage
        except OSError as error:
            damage.append(str(error))
    raise CheckpointError("--resume: no whole checkpoint: " + "; ".join(damage))


def _checked(path: Path) -> dict[str, Any]:
    state = read_state(path)
    verify(path, state["files"][dist.get_rank() :: dist.get_world_size()])
    return state


def refuse_change(path: Path, state: dict[str, Any], config: Config, accept: bool = False) -> None:
    """Raises CheckpointError where a step of this run is not what the same step was in the run that wrote `path`.

    Refused, and not only warned of: the losses of a run that changes its own law look like those of one that learns.
    Seed and global batch choose the images, and cannot be accepted.
    """
    here, there = config.law(dist.get_world_size()), state["law"]
    changed = [key for key in {**there, **here} if here.get(key) != there.get(key)]
    if not changed:
        return
    differences = ", ".join(f"{key} {there.get(key, 'any')}, this run has {here.get(key, 'any')}" for key in changed)
    message = f"{path} was trained with {differences} on {dist.get_world_size()} rank(s)"
    if {"engine.seed", "global batch"} & set(changed):
        raise CheckpointError(
            f"{message}: the same steps would hold other images. Set it as it was "
            "(engine.global_batch_size, engine.seed)"
        )
    if not accept:
        raise CheckpointError(
            f"{message}: the same steps would compute another loss. Set it as it was (data.batch_size x ranks x "
            "accumulation is the global batch; with mask.cut=global the ranks' shares do not matter to the masks), or "
            "add --accept-changes"
        )
    if dist.get_rank() == 0:
        print(f"accepted: {message}", flush=True)


def shapes_of(model: torch.nn.Module) -> dict[str, list[int]]:
    """The parameters' shapes by name; ZeRO-3 empties the parameters themselves."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def _together(work: Callable[[], Any]) -> list[Any]:
    """What `work` returned on each rank. Raises OSError on all ranks where it raised one on any: none waits in vain."""
    outcome: tuple[Any, str | None]
    try:
        outcome = work(), None
    except (OSError, safetensors.SafetensorError, CheckpointError) as error:
        outcome = None, f"rank {dist.get_rank()}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    if failures := [failure for _, failure in outcomes if failure]:
        raise OSError("; ".join(failures))
    return [result for result, _ in outcomes]


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
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path), "pieces": pieces}


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


class Reader:
    """Reads any range of any parameter from the rank files of a checkpoint.

    Raises CheckpointError where a file cannot be read or does not have what state.json says it has.
    """

    def __init__(self, path: Path, state: dict[str, Any]) -> None:
        self.files: dict[str, Any] = {}
        self.parts: dict[str, list[Part]] = {}
        kinds = KINDS if state["applied"] else KINDS[:1]
        for file in state["files"]:
            where = path / file["name"]
            try:
                opened = self.files[file["name"]] = safetensors.safe_open(where, framework="pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{where} cannot be read: {str(error)[:300]}") from error
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            found = {key: (s.get_dtype(), s.get_shape()) for key, s in slices.items()}
            for name, start, length, index, offset in file["pieces"]:
                for key in [f"{kind}.{index}" for kind in kinds if kind != "ema" or name.startswith("encoder.")]:
                    dtype, shape = found.get(key, (None, []))
                    if dtype != "F32" or len(shape) != 1 or shape[0] < offset + length:
                        raise CheckpointError(f"{where}: {key} is not the fp32 line that holds a piece of {name}")
                self.parts.setdefault(name, []).append(Part(name, start, length, file["name"], index, offset))

    def read(self, kind: str, name: str, start: int, length: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (first element, fp32 values) until elements [start, start + length) of the parameter are covered."""
        missing = length
        for part in self.parts.get(name, []):
            begin, end = max(start, part.start), min(start + length, part.start + part.length)
            if begin < end:
                shift = part.offset - part.start
                yield (
                    begin,
                    self.files[part.file].get_slice(f"{kind}.{part.index}")[begin + shift : end + shift],
                )
                missing -= end - begin
        if missing:
            raise CheckpointError(f"{missing} elements of {kind} of {name} are in none of the checkpoint's files")

    def tensor(self, kind: str, name: str, shape: list[int]) -> Tensor:
        """The whole of one parameter, fp32."""
        values = torch.empty(shape)
        for start, part in self.read(kind, name, 0, values.numel()):
            values.view(-1)[start : start + len(part)] = part
        return values


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError for all that `manifest.State` does not let through."""
    file = path / "state.json"
    try:
        with file.open("rb") as opened:
            text = opened.read(manifest.MAX_BYTES)
        if not manifest.is_sealed(text):
            raise CheckpointError(f"{file} is damaged, or of another version: it does not end with its own SHA-256")
        return manifest.State.model_validate_json(text).model_dump()
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_input=False)
        place = ".".join(map(str, first["loc"])) or "its JSON"
        reason = f"{place}: {first['msg']}" + (f"; {len(more)} more problems" if more else "")
        raise CheckpointError(f"{file} is not a state that this version reads: {reason}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from error


def verify(path: Path, files: list[dict[str, Any]]) -> None:
    """Compares rank files with the sizes and the SHA-256 in state.json. Raises OSError at a difference."""
    for file in files:
        part = path / file["name"]
        if not part.is_file() or part.stat().st_size != file["bytes"]:
            found = f"{part.stat().st_size} bytes" if part.is_file() else "missing"
            raise OSError(f"{part} is damaged: wanted {file['bytes']} bytes, found {found}")
        if _sha256(part) != file["sha256"]:
            raise OSError(f"{part} is damaged: its contents do not match the SHA-256 in state.json")


def candidates(folder: Path, tag: str) -> list[Path]:
    """The checkpoints of a run, the newest step first, those that cannot be read last."""
    steps = {}
    for path in folder.glob(f"{glob.escape(tag)}-*"):
        if re.fullmatch(NAMES, path.name[len(tag) + 1 :]) and path.is_dir() and not path.is_symlink():
            try:
                steps[path] = read_state(path)["step"]
            except CheckpointError:
                steps[path] = -1
    return sorted(steps, key=lambda path: (steps[path], path.name), reverse=True)


def _step_of(path: Path, steps_per_epoch: int) -> int:
    """The step in a checkpoint's name: that of a damaged one can be read nowhere else."""
    number = int(re.sub(r".*\D", "", path.name))
    return number * steps_per_epoch if path.name.endswith(f"-ep{number}") else number


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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


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
