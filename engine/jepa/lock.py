"""One run a folder: two in one would take each other's half-written checkpoints for litter.

`.{tag}.lock` in the folder says which process holds it, and its time is renewed every few seconds. A run that was
killed leaves it behind, and the next one takes it over where it is sure of that: the process is gone from this machine,
the Slurm job has been started again, or the time stood still for long.
"""

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from .config import Config
from .restore import CheckpointError

RENEWAL = 10.0  # seconds
SILENT = 300.0  # a lock that was not renewed for so long, or for the watchdog's time if that is less, belongs to no run
NETWORK_DELAYS = (0, 1, 2, 4, 8)  # seconds until what another machine wrote into a shared folder is seen


class Lock:
    """The right to write a run's checkpoints. The first rank takes it; leaving the `with` block gives it back."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.logging.folder) / f".{config.logging.write_tag}.lock"
        self.patience = min(SILENT, 60 * config.engine.timeout_minutes)
        self.mine = ""
        self.over = threading.Event()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        self.over.set()
        try:
            if self.mine and self.path.read_text() == self.mine:
                self.path.unlink()
        except OSError:
            pass  # it will be found to belong to nobody

    def take(self) -> str:
        """Takes it, and returns what stands in it now. Raises CheckpointError where another run holds it."""
        mine = json.dumps({"token": secrets.token_hex(8), **_me()})
        try:
            with self.path.open("x") as file:
                file.write(mine)
        except FileExistsError:
            fresh = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
            try:
                fresh.write_text(mine)
                self._judge(fresh.stat().st_mtime - self.path.stat().st_mtime)  # both by the file system's clock
                os.replace(fresh, self.path)
            finally:
                fresh.unlink(missing_ok=True)
        self.mine = mine
        threading.Thread(target=self._renew, name="jepa-lock", daemon=True).start()
        return mine

    def see(self, text: str) -> None:
        """Raises CheckpointError where this rank does not see what the first one wrote, or somebody else took it."""
        found = None
        for delay in NETWORK_DELAYS:
            time.sleep(delay)
            try:
                found = self.path.read_text()
                break
            except OSError as error:
                reason = error
        if found is None:
            raise CheckpointError(
                f"on {socket.gethostname()} {self.path}, which rank 0 wrote, cannot be read ({reason}): all machines "
                "must share logging.folder, and nobody may delete it while the run goes on"
            )
        if found != text:
            raise CheckpointError(f"on {socket.gethostname()} {self.path} says that it is {_who(found)}'s")

    def _judge(self, silence: float) -> None:
        """Raises CheckpointError unless whoever holds it is gone; `silence`: seconds since it was renewed."""
        text = self.path.read_text()
        try:
            other: dict[str, Any] = {**json.loads(text)}
        except (ValueError, TypeError):
            other = {}  # half-written
        me = _me()
        if other.get("machine") == me["machine"] and other.get("process") == me["process"]:
            return  # this one's, taken before
        gone = ""
        if other.get("machine") == me["machine"] and _began(other.get("process")) != other.get("began"):
            gone = "which is gone from this machine"
        elif me["job"] and other.get("job") == me["job"] and other.get("start") != me["start"]:
            gone = "an earlier start of this job"
        elif silence > self.patience:
            gone = f"silent for {silence:.0f} s"
        if not gone:
            raise CheckpointError(
                f"another run writes there, {_who(text)}, renewed {silence:.0f} s ago. Choose another logging.folder "
                f"or logging.write_tag. If it is dead, its lock is void {self.patience:.0f} s after it was last "
                f"renewed, or when you delete {self.path}"
            )
        print(f"{self.path.name} of {_who(text)}, {gone}: taken over", flush=True)

    def _renew(self) -> None:
        while not self.over.wait(min(RENEWAL, self.patience / 4)):
            try:
                if self.path.read_text() != self.mine:
                    return  # `see` says so at the next checkpoint
                os.utime(self.path)
            except OSError:
                pass  # the disk may come back


def _me() -> dict[str, Any]:
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        machine = socket.gethostname()
    return {
        "host": socket.gethostname(),
        "machine": machine,
        "process": os.getpid(),
        "began": _began(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "start": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _began(process: object) -> str | None:
    """When a process of this machine began, in ticks since the machine did; None where there is no such process."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else rest[18]


def _who(text: str) -> str:
    try:
        note = json.loads(text)
        job = f", job {note['job']}" if note["job"] else ""
        return f"process {note['process']} on {note['host']}{job}"
    except (ValueError, TypeError, KeyError):
        return "an unknown process"
