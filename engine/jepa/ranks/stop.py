"""Ends a run before its last step, on request: by a signal or a time limit.

Exit codes of engine/train.py, besides 0 (finished), 1 (an error, with a message) and 2 (an invalid command line):

    75   stopped on request with everything saved: start it again with --resume. EX_TEMPFAIL of sysexits.h, "try again
         later", so that a job script can tell it from an error and requeue
    69   another rank was lost (EX_UNAVAILABLE): saved checkpoints are intact (jepa.ranks.watchdog)

`deepspeed` passes the code on; torchrun turns every nonzero code into 1.
"""

import argparse
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from .distributed import Ranks, launchers

STOPPED = os.EX_TEMPFAIL
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

RELAYED = 2.0  # seconds within which a second signal counts as the first, relayed by a launcher
PULSE = 1.0  # seconds between two heartbeats, at most


def minutes(text: str) -> float:
    """The value of an option --max-minutes, for argparse."""
    try:
        if 0 < (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: wanted a number of minutes above 0")


def minutes_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--max-minutes",
        type=minutes,
        metavar="M",
        help=f"stop after M minutes with everything saved, exit code {STOPPED}",
    )


class StopRequest:
    """SIGTERM, SIGUSR1, Ctrl-C or the time limit, on any rank, stops all ranks after the same step.

        with StopRequest(ranks, max_minutes) as stop:
            for step in ...:
                stop.ask()
                ...
                if stop.agreed():
                    save and leave

    `ask` starts an all-reduce of one number between the ranks' CPUs and `agreed` takes the result: it overlaps with the
    step and waits for no GPU. A second signal ends the process at once, even inside a collective: signals are read by a
    thread, not by Python's handlers, which wait for the main thread. A launcher that is gone counts as a signal too,
    because `deepspeed` relays none. A lost terminal (SIGHUP) does not, nor a launcher that it takes along; but torchrun
    ends its ranks then, soon.
    """

    def __init__(self, ranks: Ranks, max_minutes: float | None = None) -> None:
        self.group, self.rank = ranks.cpu_group, ranks.rank
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self.reason, self.stopping = "", False
        self._signalled: float | None = None
        self._launchers: list[int] | None = launchers()

    def __enter__(self) -> "StopRequest":
        self._inbox, outbox = socket.socketpair()
        self._inbox.settimeout(PULSE)
        outbox.setblocking(False)
        self._outbox = outbox
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in (*SIGNALS, signal.SIGHUP)}
        self._wakeup = signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="jepa-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():  # a launcher may relay a request late
            signal.signal(number, signal.SIG_IGN if self.stopping else handler)
        self._outbox.close()  # ends the thread

    def ask(self) -> None:
        if not self.reason and time.monotonic() > self.deadline:
            self.reason = "--max-minutes"
        self._flag = torch.tensor([bool(self.reason)], dtype=torch.uint8)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def agreed(self) -> bool:
        """Whether any rank had been asked to stop when the step began; the same on all ranks."""
        self._work.wait()
        self.stopping = bool(self._flag)
        return self.stopping

    def _listen(self) -> None:
        with self._inbox:
            while True:
                try:
                    numbers = self._inbox.recv(64)
                except TimeoutError:
                    if self._signalled is None and self._launchers not in (None, launchers()):
                        self._hear("the launcher is gone", signal.SIGTERM)
                    continue
                if not numbers:
                    return
                if signal.SIGHUP in numbers:
                    self._lose_the_terminal()
                for number in (signal.Signals(n) for n in numbers if n in SIGNALS):
                    self._hear(number.name, number)

    def _lose_the_terminal(self) -> None:
        if "TORCHELASTIC_RESTART_COUNT" in os.environ:
            self._hear("SIGHUP", signal.SIGHUP)
        elif self._launchers is not None:
            self._launchers = None
            say(self.rank, f"the terminal is gone: training goes on; kill {os.getpid()} saves and stops")

    def _hear(self, what: str, number: int) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled, self.reason = now, what
            say(self.rank, f"{what}: saving after the next step; a second signal ends at once")
        elif now - self._signalled > RELAYED:
            say(self.rank, f"{what} again: ending without saving")
            os._exit(128 + number)


def say(rank: int, message: str) -> None:
    print(f"engine/{Path(sys.argv[0]).name}, rank {rank}: {message}", file=sys.stderr, flush=True)
