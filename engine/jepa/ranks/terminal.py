"""What a process prints is for people: where it can no longer be shown is no reason to stop."""

import contextlib
import io
import os
import signal
import sys
from typing import TextIO, cast


class _Shown:
    """A text stream whose writes never fail: what cannot be written (EIO, EPIPE, ENOSPC) is lost. `lost`: why."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self.lost = error
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.lost = error

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def outlive_the_terminal() -> None:
    """From now on this process goes on when its terminal is closed, a pipe's reader ends, or the disk under its output
    is full, and escapes characters that its output cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if isinstance(stream, _Shown):
            continue
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # it is lost already
                stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, _Shown(stream)))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def require_shown() -> None:
    """Raises OSError if something that was printed could not be written; that a reader has seen enough is fine."""
    sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    if lost is not None and not isinstance(lost, BrokenPipeError):
        raise lost
