"""Runs of engine/train.py as real processes that start quickly: they are forked from one that has imported everything.

Tests that kill, stop or signal ranks, or inject a fault, use `start`. Launchers and the command line itself are tested
with `subprocess` in test_train.py.
"""

import json
import multiprocessing as mp
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from small import MAPPING

ROOT = Path(__file__).resolve().parents[2]
_server = mp.get_context("forkserver")
LAZILY = [f"deepspeed.runtime.zero.{name}" for name in ("muon.muon_optimizer", "stage3", "stage_1_and_2")]
LAZILY += ["nvidia.dali.experimental.dynamic"]
_server.set_forkserver_preload(["processes", "train", *LAZILY])


@dataclass
class Run:
    """The processes of a run, one a rank, and what they print."""

    ranks: list[Any]
    output: list[Path]

    def text(self, rank: int = 0) -> str:
        return self.output[rank].read_text(errors="replace")

    def wait_for(self, pattern: str, rank: int = 0, seconds: float = 120) -> re.Match[str]:
        """Waits until a rank has printed `pattern`; if it never does, kills all and raises."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive = self.ranks[rank].is_alive()
            if match := re.search(pattern, self.text(rank)):
                return match
            if not alive:
                break
            time.sleep(0.01)
        self.kill()
        raise AssertionError(f"rank {rank} did not print {pattern!r}:\n{self.text(rank)}")

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.ranks)):
            os.kill(self.ranks[rank].pid, number)

    def wait(self, *ranks: int, seconds: float = 120) -> list[int]:
        """The exit codes; if any rank is still running after `seconds`, kills all and raises."""
        end = time.monotonic() + seconds
        codes = []
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].join(max(0.0, end - time.monotonic()))
            codes.append(self.ranks[rank].exitcode)
        if None in codes:
            texts = "\n".join(self.text(rank) for rank in range(len(self.ranks)))
            self.kill()
            raise AssertionError(f"after {seconds} s the exit codes are {codes}:\n{texts}")
        return codes

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()


def start(world_size: int, folder: Path, *words: object, fault: Callable[[int], None] | None = None) -> Run:
    """Starts engine/train.py with `words` on `world_size` ranks. `fault(rank)` is called first in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    given = [f"logging.folder={folder}", *map(str, words)]
    run = Run([], [])
    for rank in range(world_size):
        environment = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        output = folder.parent / f"{folder.name}.rank{rank}.out"
        output.unlink(missing_ok=True)
        work = (rank, {k: str(v) for k, v in environment.items()}, given, output, fault)
        process = _server.Process(target=_be_a_rank, args=work)
        process.start()
        run.ranks.append(process)
        run.output.append(output)
        output.touch()
    return run


def _be_a_rank(
    rank: int, environment: dict[str, str], words: list[str], output: Path, fault: Callable[[int], None] | None
) -> None:
    import train

    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= environment | {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    sys.argv = ["train.py", *words]
    if fault:
        fault(rank)
    sys.exit(train.main())


def rows(folder: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (folder / "jepa.jsonl").read_text().splitlines()]


def write_images(folder: Path, number: int = 40) -> Path:
    """JPEGs of coarse noise in two classes."""
    rng = np.random.default_rng()
    for i in range(number):
        path = folder / f"class{i % 2}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60, 50), Image.Resampling.BICUBIC).save(path)
    return folder


def write_config(path: Path, images: Path) -> Path:
    path.write_text(yaml.safe_dump(MAPPING | {"data": MAPPING["data"] | {"root_path": str(images)}}))
    return path
