"""Checkpoints, read: which there are, which of them is whole, and any part of any parameter in one.

jepa.checkpoint writes them and says what they look like. Nothing is taken on trust: see jepa.manifest.
"""

import glob
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from . import manifest
from .config import Config

NAMES = r"(step\d{8,}|ep\d+)"  # what follows {tag}-
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which file, why, and what to do."""


@dataclass(frozen=True)
class Part:
    """Elements [start, start + length) of a parameter, at `offset` in the `index`-th flat tensors of a rank's file."""

    name: str
    start: int
    length: int
    file: str
    index: int
    offset: int


def find_whole(paths: list[Path]) -> tuple[Path, dict[str, Any], list[str]]:
    """The first of `paths` that is whole, its state.json, and what is wrong with those before it.

    Every rank calls it, and checks its share of the files. Raises CheckpointError where none is whole.
    """
    damage: list[str] = []
    for path in paths:
        try:
            return path, together(partial(_checked, path))[0], damage
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


def together(work: Callable[[], Any]) -> list[Any]:
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
        if sha256_of(part) != file["sha256"]:
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


def step_of(path: Path, steps_per_epoch: int) -> int:
    """The step in a checkpoint's name: that of a damaged one can be read nowhere else."""
    number = int(re.sub(r".*\D", "", path.name))
    return number * steps_per_epoch if path.name.endswith(f"-ep{number}") else number


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
