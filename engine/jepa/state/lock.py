"""One run per folder: two would mistake each other's half-written checkpoints for leftovers and delete them.

`.{tag}.lock` in the folder says which process holds it, and its mtime is renewed every few seconds. A killed run leaves
it behind, and the next one takes it over once it is sure: the process no longer exists on this machine, the Slurm job
was restarted, or the mtime has not changed for a long time.
"""

import json
import os
import secrets
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from jepa.config.schema import Config

from .restore import CheckpointError

RENEWAL = 10.0  # seconds
SILENT = 300.0  # seconds without renewal, or the watchdog's timeout if that is less, after which a lock is stale
NETWORK_DELAYS = (0, 1, 2, 4, 8)  # seconds to wait until what another machine wrote to a shared folder is visible


class Lock:
    """The right to write a run's checkpoints. The first rank takes it; leaving the `with` block releases it."""

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
            pass  # the next run will find it stale

    def take(self) -> str:
        """Takes the lock and returns its contents. Raises CheckpointError if another run holds it."""
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
        """Raises CheckpointError if this rank does not see what the first one wrote, or another run took the lock."""
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
                f"on {socket.gethostname()} {self.path}, written by rank 0, cannot be read ({reason}): all machines "
                "must share logging.folder, and it must not be deleted during the run"
            )
        if found != text:
            raise CheckpointError(f"on {socket.gethostname()} {self.path} now belongs to {_who(found)}")

    def _judge(self, silence: float) -> None:
        """Raises CheckpointError unless the holder is gone; `silence`: seconds since the lock was renewed."""
        text = self.path.read_text()
        try:
            other: dict[str, Any] = {**json.loads(text)}
        except (ValueError, TypeError):
            other = {}  # half-written
        me = _me()
        if other.get("machine") == me["machine"] and other.get("process") == me["process"]:
            return  # this process took it before
        gone = ""
        if other.get("machine") == me["machine"] and _began(other.get("process")) != other.get("began"):
            gone = "which no longer exists on this machine"
        elif me["job"] and other.get("job") == me["job"] and other.get("start") != me["start"]:
            gone = "an earlier start of this job"
        elif silence > self.patience:
            gone = f"not renewed for {silence:.0f} s"
        if not gone:
            raise CheckpointError(
                f"another run is using the folder: {_who(text)}, lock renewed {silence:.0f} s ago. Choose another "
                f"logging.folder or logging.write_tag. If that run is dead, its lock expires {self.patience:.0f} s "
                f"after its last renewal, or delete {self.path}"
            )
        print(f"took over {self.path.name} from {_who(text)}, {gone}", flush=True)

    def _renew(self) -> None:
        while not self.over.wait(min(RENEWAL, self.patience / 4)):
            try:
                if self.path.read_text() != self.mine:
                    return  # `see` reports it at the next checkpoint
                os.utime(self.path)
            except OSError:
                pass  # the disk may come back


def try_folder(folder: Path) -> None:
    """Raises OSError unless one can write into the folder, or into the one in which it would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))  # more than a full disk takes


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
    """When a process on this machine started, in clock ticks since boot; None if there is no such process."""
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
