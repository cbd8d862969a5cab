"""What a protocol is given and what it gives back.

A protocol is a module of this room with two functions:

    arguments(parser)            adds its options to an argparse parser
    run(job, args) -> Result     does its work on all ranks; every rank returns the same

`job.subjects` are to be compared: the encoder in question first, then one of the same shape that nothing has trained.
Unfinished work lies in `job.out`, in a folder or file named after the protocol, and the same command goes on from it.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from jepa.config.file import load_config
from jepa.config.schema import Config
from jepa.model.vit import VisionTransformer, build_encoder
from jepa.ranks.distributed import Ranks
from jepa.state.encoder import open_encoder

Row = dict[str, str | float]
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """A row is {"features": name of an encoder, and figures in percent by name}; all rows have the same names.

    `task`: the data set, if it is one that papers report on (jepa.probes.papers), and if this is their protocol.
    """

    rows: list[Row]
    task: str | None = None


@dataclass(frozen=True)
class Subject:
    """An encoder to be judged: frozen, in eval mode, on the rank's device. `key` tells its weights, what they
    take of images and --precision from any others: 16 digits, and "-bf16"."""

    name: str
    encoder: VisionTransformer
    key: str


@dataclass(frozen=True)
class Job:
    """`config`: what the encoders were trained with. `out`: an existing folder for results and unfinished work.
    `epochs`: how long the first was trained, if its file says so."""

    weights: str
    subjects: list[Subject]
    config: Config
    ranks: Ranks
    out: Path
    epochs: int | None = None

    def say(self, line: str) -> None:
        """Progress, on stderr, once for all ranks."""
        if self.ranks.is_first:
            print(line, file=sys.stderr, flush=True)

    def first_only(self, work: Callable[[], None]) -> None:
        """Calls `work` on the first rank while the others wait. What it raises is raised on all of them."""
        self.of_first(work)

    def of_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, on all of them; what it raises there is raised on all."""
        found: list[Any] = [None, None]
        if self.ranks.is_first:
            try:
                found[0] = work()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, group=self.ranks.cpu_group)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def gather(self, value: object) -> list:
        """One object of every rank, in the order of ranks, on every rank."""
        values: list[object] = [None] * self.ranks.world_size
        dist.all_gather_object(values, value, group=self.ranks.cpu_group)
        return values


class Progress:
    """Says how far a long work is, every ten seconds: "what: done of total unit, 12.3/s"."""

    def __init__(self, say: Callable[[str], None], what: str, total: int, unit: str) -> None:
        self.say, self.what, self.total, self.unit = say, what, total, unit
        self.begin = self.said = time.monotonic()
        self.first: int | None = None

    def at(self, done: int) -> None:
        now, self.first = time.monotonic(), done if self.first is None else self.first
        if now - self.said > 10:
            self.said = now
            speed = (done - self.first) / (now - self.begin)
            self.say(f"{self.what}: {done} of {self.total} {self.unit}, {speed:.1f}/s")


def quiet(_: str) -> None:
    """Says nothing."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all protocols share."""
    parser.add_argument("weights", metavar="WEIGHTS", help="checkpoint, export, .pth.tar or Hugging Face folder")
    parser.add_argument("--config", metavar="YAML", help="the model of a .pth.tar of the published code")
    parser.add_argument("--part", default="target_encoder", choices=("target_encoder", "encoder"))
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for results and unfinished work (default: eval/NAME)"
    )
    parser.add_argument("--only", action="store_true", help="without the untrained encoder beside it")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the frozen encoder")


def open_job(args: argparse.Namespace, ranks: Ranks) -> Job:
    """Loads the encoders and makes the output folder. Raises ValueError, CheckpointError and OSError."""
    config = load_config(args.config) if args.config else None
    encoder, config, epochs = open_encoder(args.weights, args.part, config)
    name = "target encoder" if args.part == "target_encoder" and "encoder" in config.method.averaged else "encoder"
    encoders = {name: encoder}
    if not args.only:
        torch.manual_seed(config.engine.seed)
        encoders["untrained encoder"] = build_encoder(config).eval()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    subjects = []
    for name, module in encoders.items():
        key = digest(module, f"{config.data.mean} {config.data.std}") + ("-bf16" if args.precision == "bf16" else "")
        subjects.append(Subject(name, module.requires_grad_(False).to(ranks.device, dtype), key))
    job = Job(args.weights, subjects, config, ranks, args.out or Path("eval") / _stem(Path(args.weights)), epochs)
    job.first_only(lambda: _make(job.out))
    return job


def digest(module: torch.nn.Module, images: str = "") -> str:
    """16 hexadecimal digits that depend on the names, dtypes and values of all parameters and buffers, and on `images`,
    what it takes of them."""
    total = hashlib.sha256(images.encode())
    for name, value in sorted(module.state_dict().items()):
        total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def _stem(path: Path) -> str:
    """runs/demo/jepa-latest -> demo-jepa-latest: a name that tells runs apart."""
    path = path.absolute()
    return f"{path.parent.name}-{path.name}".strip("-")


def _make(folder: Path) -> None:
    if folder.suffix == ".json" or folder.is_file():
        raise ValueError(f"--out: given {folder}; wanted a folder, which is made if it is missing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--out: {folder} cannot be written ({error.strerror or error}); choose another folder"
        ) from error
