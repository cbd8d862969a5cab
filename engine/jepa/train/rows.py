"""A file of rows that a run goes on without: what cannot be written waits."""

import contextlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

WAITING = 100_000  # rows; the oldest are dropped


class Rows:
    """Appends rows to a file. If it cannot be written (a full disk, a lost mount) they wait in memory, and are written
    once it can; a row is in the file as a whole or not at all. `say` is told when that begins and ends."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.file = path.open("ab", buffering=0)
        self.end = self.file.tell()  # of the last whole row
        self.waiting: deque[bytes] = deque(maxlen=WAITING)
        self.stuck = False

    def write(self, row: str) -> None:
        self.waiting.append(row.encode())
        try:
            while self.waiting:
                self._append(self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file.fileno(), self.end)
            if not self.stuck:
                self.say(f"{self.path} cannot be written ({error.strerror or error}): its rows wait, training goes on")
            self.stuck = True
            return
        if self.stuck:
            self.stuck = False
            self.say(f"{self.path} is written again")

    def _append(self, row: bytes) -> None:
        rest = memoryview(row)
        while rest:
            rest = rest[self.file.write(rest) or 0 :]
        self.end += len(row)

    def close(self) -> None:
        """Tries once more, and says what is lost."""
        if self.waiting:
            self.write("")
        if lost := sum(map(bool, self.waiting)):
            self.say(f"{self.path}: its last {lost} rows could not be written")
        with contextlib.suppress(OSError):
            self.file.close()
