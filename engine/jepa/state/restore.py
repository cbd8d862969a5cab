"""Reads checkpoints: lists them, finds an intact one, and reads any range of any parameter.

jepa.state.checkpoint writes them and documents the format. Their contents are untrusted: see jepa.state.manifest.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from jepa.config.file import parse_config
from jepa.config.schema import Config, ConfigError

from . import manifest

NAMES = r"(step\d{8,}|ep\d+)"  # what follows {tag}-
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which file, why, and what to do."""


def find_whole(paths: list[Path]) -> tuple[Path, dict[str, Any]]:
    """The first intact checkpoint among `paths` and its state.json; prints what is wrong with those before it.

    Every rank calls it and checks its share of the files. Raises CheckpointError if none is intact.
    """
    damage: list[str] = []
    for path in paths:
        try:
            state = together(partial(_checked, path))[0]
        except OSError as error:
            damage.append(str(error))
            continue
        if damage and dist.get_rank() == 0:
            print("skipped: " + "; ".join(damage), flush=True)
        return path, state
    raise CheckpointError("--resume or meta.read_checkpoint: no intact checkpoint: " + "; ".join(damage))


def _checked(path: Path) -> dict[str, Any]:
    state = read_state(path)
    verify(path, state["files"][dist.get_rank() :: dist.get_world_size()])
    return state


def refuse_change(
    path: Path,
    state: dict[str, Any],
    config: Config,
    shapes: dict[str, list[int]],
    images: dict[str, int | str],
    accept: bool = False,
) -> None:
    """Raises CheckpointError if a step of this run differs from the same step in the run that wrote `path`.

    An error, not a warning, because the losses of a run whose data or objective changed midway look like normal
    training. Another model, seed or global batch is never accepted: weights would not fit, images would change.
    Optimizer settings and software versions may change, and are only printed. `images`: `ImageSource.fingerprint`.
    """
    if shapes != state["shapes"]:
        names = sorted(set(shapes) ^ set(state["shapes"])) or [n for n in shapes if shapes[n] != state["shapes"][n]]
        raise CheckpointError(
            f"{path} holds a different model than the config describes: they differ in {len(names)} parameters, such "
            f"as {names[0]}: {state['shapes'].get(names[0])} in the checkpoint, {shapes.get(names[0])} in the config"
        )
    ranks = dist.get_world_size()
    fingerprint, recipe = config.fingerprint(ranks) | images, config.recipe()
    optimization = config.optimization.model_dump()
    try:
        before = parse_config(state["config"], source=str(path / "state.json"))
        old_recipe, old_optimization = before.recipe(), before.optimization.model_dump()
    except ConfigError as error:
        old_recipe = {"config": f"that this version cannot read ({error.problems[0]})"}
        old_optimization = optimization
    if dist.get_rank() == 0:
        for line in _differences(old_optimization, optimization).values():
            print(f"changed since {path.name}: optimization, {line}", flush=True)
        for line in _differences(state["versions"], versions()).values():
            print(f"changed since {path.name}: versions, {line}", flush=True)
    changed = _differences(state["fingerprint"] | old_recipe, fingerprint | recipe)
    if not changed:
        return
    message = f"{path} was trained with {', '.join(changed.values())} (on {ranks} ranks)"
    if {"engine.seed", "global batch"} & set(changed):
        raise CheckpointError(
            f"{message}: the same steps would use other images. Restore the old value "
            "(engine.global_batch_size, engine.seed)"
        )
    if not accept:
        moved = {"mask.cut", "data.batch_size", "accumulation"} & set(changed)
        hint = (
            " Only a run with mask.cut=global from its first step can move to another number of ranks, and one whose "
            "loss has statistics over images only if data.batch_size x ranks stays the same."
        )
        raise CheckpointError(
            f"{message}: the same steps would compute a different loss. Restore the old settings or add "
            "--accept-changes." + (hint if moved else "")
        )
    if dist.get_rank() == 0:
        print(f"accepted: {message}", flush=True)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """Descriptions of the differences, by key."""
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return {key: f"{key} {there.get(key, 'unknown')}, this run has {here.get(key, 'none')}" for key in keys}


@cache
def versions() -> dict[str, str]:
    """Versions of what computes a step, for the record; with the commit if the engine is in a git checkout."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for package in importlib.metadata.distributions():
        name = str(package.name)  # None: the remains of a failed installation
        if name in ("deepspeed", "numpy", "triton") or name.startswith("nvidia-dali-"):
            found[name] = package.version
    root = Path(__file__).resolve().parents[3]
    if (root / ".git").exists():
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found["commit"] = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    return found


def shapes_of(model: torch.nn.Module) -> dict[str, list[int]]:
    """The parameters' shapes by name; ZeRO-3 empties the parameters themselves."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def on_first(folder: Path, work: Callable[[], Any]) -> Any:
    """What `work` returns on the first rank, whose view of the folder counts. Raises CheckpointError on all ranks."""
    return on_all(folder, lambda: work() if dist.get_rank() == 0 else None)[0]


def on_all(folder: Path, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each rank. Raises CheckpointError on all ranks if it fails on any."""
    try:
        return together(work)
    except OSError as error:
        raise CheckpointError(f"logging.folder {folder} cannot be used: {error}") from error


def together(work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each rank. Raises OSError on all ranks if it fails on any, so that none waits forever."""
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

    Raises CheckpointError if a file cannot be read or lacks what state.json says it has.
    """

    def __init__(self, path: Path, state: dict[str, Any]) -> None:
        self.files: dict[str, Any] = {}
        self.pieces: dict[str, list[tuple[str, manifest.Piece]]] = {}  # by parameter: its pieces and their files
        kinds = kinds_in(state)
        for file in state["files"]:
            where = path / file["name"]
            try:
                opened = self.files[file["name"]] = safetensors.safe_open(where, framework="pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{where} cannot be read: {str(error)[:300]}") from error
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            found = {key: (s.get_dtype(), s.get_shape()) for key, s in slices.items()}
            for piece in itertools.starmap(manifest.Piece, file["pieces"]):
                for kind in [k for k in kinds if k != "ema" or piece.name.partition(".")[0] in state["averaged"]]:
                    key = f"{kind}.{piece.flat}"
                    dtype, shape = found.get(key, (None, []))
                    if dtype != "F32" or len(shape) != 1 or shape[0] < piece.offset + piece.length:
                        raise CheckpointError(
                            f"{where}: {key} is not a flat fp32 tensor large enough for its piece of {piece.name}"
                        )
                self.pieces.setdefault(piece.name, []).append((file["name"], piece))

    def read(self, kind: str, name: str, start: int, length: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (first element, fp32 values) until elements [start, start + length) of the parameter are covered."""
        missing = length
        for file, piece in self.pieces.get(name, []):
            begin, end = max(start, piece.start), min(start + length, piece.start + piece.length)
            if begin < end:
                shift = piece.offset - piece.start
                yield begin, self.files[file].get_slice(f"{kind}.{piece.flat}")[begin + shift : end + shift]
                missing -= end - begin
        if missing:
            raise CheckpointError(f"{missing} elements of {kind} of {name} are in none of the checkpoint's files")

    def tensor(self, kind: str, name: str, shape: list[int]) -> Tensor:
        """One whole parameter, fp32."""
        values = torch.empty(shape)
        for start, part in self.read(kind, name, 0, values.numel()):
            values.view(-1)[start : start + len(part)] = part
        return values


def kinds_in(state: dict[str, Any]) -> tuple[str, ...]:
    """What a checkpoint holds of each parameter: moments and average only if the run had any."""
    return KINDS if state["applied"] or state["moments"] else KINDS[:1]


def refuse_run(path: Path) -> None:
    """Raises CheckpointError if it is the folder of a run instead of one of its checkpoints."""
    inside = sorted(path.glob("*/state.json"))
    if inside and not (path / "state.json").exists():
        raise CheckpointError(f"{path} is a folder of checkpoints; wanted one of them, such as {inside[-1].parent}")


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises CheckpointError for anything that `manifest.State` rejects."""
    file = path / "state.json"
    if not path.is_dir():
        found = "is a file; meta.init_from starts from other programs' weights" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {found}; wanted a checkpoint's folder")
    refuse_run(path)
    try:
        # Opening a named pipe would otherwise wait for a writer.
        with open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise OSError(f"{file} is not a regular file")
            text = opened.read(manifest.MAX_BYTES)
        if not manifest.is_sealed(text):
            raise CheckpointError(f"{file} is damaged or from another version: it does not end with its own SHA-256")
        return manifest.State.model_validate_json(text).model_dump()
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_input=False)
        place = ".".join(map(str, first["loc"])) or "its JSON"
        reason = f"{place}: {first['msg']}" + (f"; {len(more)} more problems" if more else "")
        raise CheckpointError(f"{file} is not a state that this version can read: {reason}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error


def verify(path: Path, files: list[dict[str, Any]]) -> None:
    """Compares rank files with their sizes and SHA-256 in state.json. Raises OSError on a mismatch."""
    for file in files:
        part = path / file["name"]
        if not part.is_file() or part.stat().st_size != file["bytes"]:
            found = f"{part.stat().st_size} bytes" if part.is_file() else "missing"
            raise OSError(f"{part} is damaged: wanted {file['bytes']} bytes, found {found}")
        if sha256_of(part) != file["sha256"]:
            raise OSError(f"{part} is damaged: its contents do not match the SHA-256 in state.json")


def candidates(folder: Path, tag: str, steps_per_epoch: int) -> list[tuple[int, Path]]:
    """The checkpoints of a run with their steps, newest first, including damaged ones, so that they can be reported.

    Raises OSError if the folder cannot be listed; one that does not exist has no checkpoints.
    """
    found = [
        (step_of(Path(entry), steps_per_epoch), Path(entry))
        for entry in entries(folder)
        if entry.name.startswith(f"{tag}-") and re.fullmatch(NAMES, entry.name[len(tag) + 1 :])
        if entry.is_dir(follow_symlinks=False)
    ]
    return sorted(found, reverse=True)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder. (Path.glob treats a folder that cannot be listed as empty.)"""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []


def step_of(path: Path, steps_per_epoch: int) -> int:
    """The step of a checkpoint, from its name; for an epoch from its state, as the epoch length may have changed."""
    kind, number = re.fullmatch(r".*-(step|ep)(\d+)", path.name).groups()  # type: ignore[union-attr]
    if kind == "ep":
        try:
            return read_state(path)["step"]
        except CheckpointError:
            return int(number) * steps_per_epoch
    return int(number)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
