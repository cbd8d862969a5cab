"""Ends a run before its last step: on request, by a signal or a time limit, or because a rank is lost.

Exit codes of engine/train.py, besides 0 (finished), 1 (an error, with a message) and 2 (an invalid command line):

    75   stopped on request with everything saved: start it again with --resume. EX_TEMPFAIL of sysexits.h, "try again
         later", so that a job script can tell it from an error and requeue
    69   another rank was lost (EX_UNAVAILABLE): saved checkpoints are intact

`deepspeed` passes the code on; torchrun turns every nonzero code into 1.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from .distributed import Ranks, launchers

STOPPED, RANK_LOST = os.EX_TEMPFAIL, os.EX_UNAVAILABLE
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RELAYED = 2.0  # seconds within which a second signal counts as the first, relayed by a launcher
PULSE = 1.0  # seconds between two heartbeats, at most
SUSPICIOUS = 5  # missed heartbeats that prove a rank's death once a connection has broken


class StopRequest:
    """SIGTERM, SIGUSR1 or the time limit, on any rank, stops all ranks after the same step.

        with StopRequest(ranks, max_minutes) as stop:
            for step in ...:
                stop.ask()
                ...
                if stop.agreed():
                    save and leave

    `ask` starts an all-reduce of one number between the ranks' CPUs and `agreed` takes the result: it overlaps with the
    step and waits for no GPU. A second signal ends the process at once, even inside a collective: signals are read by a
    thread, not by Python's handlers, which wait for the main thread. A launcher that is gone counts as a signal too,
    because `deepspeed` relays none.
    """

    def __init__(self, ranks: Ranks, max_minutes: float | None = None) -> None:
        self.group, self.rank = ranks.cpu_group, ranks.rank
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self.reason, self.stopping = "", False
        self._signalled: float | None = None
        self._launchers = launchers()

    def __enter__(self) -> "StopRequest":
        self._inbox, outbox = socket.socketpair()
        self._inbox.settimeout(PULSE)
        outbox.setblocking(False)
        self._outbox = outbox
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
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
                    if self._signalled is None and launchers() != self._launchers:
                        self._hear("the launcher is gone", signal.SIGTERM)
                    continue
                if not numbers:
                    return
                for number in (signal.Signals(n) for n in numbers if n in SIGNALS):
                    self._hear(number.name, number)

    def _hear(self, what: str, number: int) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled, self.reason = now, what
            _say(self.rank, f"{what}: saving after the next step; a second signal ends at once")
        elif now - self._signalled > RELAYED:
            _say(self.rank, f"{what} again: ending without saving")
            os._exit(128 + number)


class Watchdog:
    """Ends this process, with a message and an exit code, if another rank is lost and waiting for it would never end.

    A thread on each rank writes regular heartbeats to the store, with the rank's step and what it is doing; rank 0's
    thread reads them all and writes a verdict, which the others read. A rank is lost if it sent no heartbeat for
    `minutes` (killed, stopped, its machine gone), if no rank made progress for `minutes` (one of them hangs; the one
    furthest behind is named), or if it reported its own failure. All of this works while the main thread is stuck in a
    collective. `at_end` is called before the process ends, with little time to finish.
    """

    def __init__(self, ranks: Ranks, minutes: float, at_end: Callable[[], None] = lambda: None) -> None:
        self.at_end = at_end
        self.rank, self.world_size = ranks.rank, ranks.world_size
        # A separate connection: a blocking call holds up everyone who shares its connection.
        self.store = ranks.store.clone()  # type: ignore[attr-defined]
        self.patience = 60 * minutes
        self.pulse = min(PULSE, self.patience / 10)
        self.over = threading.Event()
        self.me: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid(), "beat": 0, "moves": 0}
        self.me |= {"step": None, "doing": "starting", "failed": None, "suspects": False}
        self.heard = 0.0  # `clock` when the store last answered

    def __enter__(self) -> "Watchdog":
        self._publish()
        if self.rank == 0:
            self.store.set("verdict", "")
        try:
            dist.barrier()
        except RuntimeError as error:
            self._end(f"another rank was lost at startup: {error}")
        self.clock = 0.0  # stops while this process is suspended: suspending the whole run loses no rank
        for work in (self._keep_watch, self._keep_time):
            threading.Thread(target=work, name="jepa-watchdog", daemon=True).start()
        return self

    def at(self, step: int | None, doing: str) -> None:
        """Records what the main thread does next; all ranks pass the same points."""
        self.me |= {"step": step, "doing": doing, "moves": self.me["moves"] + 1}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            dist.barrier()  # no rank leaves, which ends its heartbeat, before all are done
        if isinstance(error, Exception) and self.world_size > 1:
            if _is_of_a_connection(error):
                self._wait_for_the_verdict(error)
            self.me["failed"] = f"{type(error).__name__}: {error}"
            self.over.set()
            self._publish()
            if self.rank == 0:  # the store ends with this process
                self.store.set("verdict", _failed(0, self.me))
                time.sleep(3 * self.pulse)
        self.over.set()

    def _wait_for_the_verdict(self, error: Exception) -> None:
        """A broken connection means that a rank is gone, but not which one: its missing heartbeat will tell."""
        self.me["suspects"] = True
        time.sleep((3 * SUSPICIOUS + 3) * self.pulse)
        self._end(f"the connection to another rank broke, though all of them send heartbeats: {error}")

    def _publish(self) -> None:
        self.me["beat"] += 1
        self.store.set(f"alive/{self.rank}", json.dumps(self.me))

    def _keep_time(self) -> None:
        """Ends the process if the store's machine is gone, because a request to the store then blocks forever."""
        before = time.monotonic()
        while not self.over.wait(self.pulse):
            now = time.monotonic()
            self.clock += min(now - before, 2 * self.pulse)
            before = now
            if self.clock - self.heard > self.patience + 3 * self.pulse:
                self._end(f"rank 0 has not answered for {self.patience:.0f} s")

    def _keep_watch(self) -> None:
        ranks = range(self.world_size) if self.rank == 0 else range(1)
        last_beat, last_move = {rank: (0, 0.0) for rank in ranks}, (-1, 0.0)
        while not self.over.wait(self.pulse):
            try:
                self._publish()
                verdict, *notes = self.store.multi_get(["verdict", *(f"alive/{rank}" for rank in ranks)])
            except dist.DistError as error:
                self._lost_the_store(error)
                return
            self.heard = self.clock
            if verdict:
                self._end(verdict.decode())
            alive = {rank: json.loads(note) for rank, note in zip(ranks, notes, strict=True)}
            for rank, note in alive.items():
                if note["beat"] != last_beat[rank][0]:
                    last_beat[rank] = note["beat"], self.clock
            moves = sum(note["moves"] for note in alive.values())
            if moves != last_move[0]:
                last_move = moves, self.clock
            silence = {rank: self.clock - heard for rank, (_, heard) in last_beat.items()}
            if found := self._judge(alive, silence, self.clock - last_move[1]):
                self._pronounce(found)

    def _judge(self, alive: dict[int, dict[str, Any]], silence: dict[int, float], still: float) -> str | None:
        for rank, note in alive.items():
            if note["failed"]:
                return _failed(rank, note)
        suspected = any(note["suspects"] for note in (*alive.values(), self.me))
        limit = min(self.patience, SUSPICIOUS * self.pulse) if suspected else self.patience
        silent = [rank for rank, seconds in silence.items() if seconds > limit]
        if silent:
            who = "; ".join(f"{_name(rank, alive[rank])} last seen {_place(alive[rank])}" for rank in silent)
            return f"no heartbeat for {max(silence[rank] for rank in silent):.0f} s: {who}"
        if self.rank == 0 and still > self.patience:
            behind = min(alive, key=lambda rank: alive[rank]["moves"])
            where = f"{_name(behind, alive[behind])}, {_place(alive[behind])}"
            if len({note["moves"] for note in alive.values()}) == 1:
                return f"no rank has made progress for {still:.0f} s; all are at the same point, for example {where}"
            return f"no rank has made progress for {still:.0f} s; the furthest behind is {where}"
        return None

    def _pronounce(self, verdict: str) -> None:
        time.sleep(self.pulse)  # if all ranks fail alike, each reports it itself
        if self.over.is_set():
            return
        if self.rank == 0:
            self.store.set("verdict", verdict)
            _say(self.rank, f"{verdict}; waiting for the others to end")
            time.sleep(3 * self.pulse)
        self._end(verdict)

    def _lost_the_store(self, error: Exception) -> None:
        time.sleep(SUSPICIOUS * self.pulse)  # a run that has just ended needs no verdict
        if not self.over.is_set():
            self._end(f"rank 0, or the launcher that hosts the store, is gone: {error}")

    def _end(self, verdict: str) -> None:
        here = f"this rank: {_place(self.me)}"
        _say(self.rank, f"{verdict}; {here}. Exit code {RANK_LOST}: --resume continues from the last checkpoint")
        sys.stdout.flush()
        last = threading.Thread(target=self.at_end, daemon=True)
        last.start()
        last.join(PULSE)  # the disk may be what is broken
        os._exit(RANK_LOST)


def _is_of_a_connection(error: Exception) -> bool:
    """gloo raises bare RuntimeErrors when a peer goes away."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and re.search(r"\bgloo/|\bNCCL|[Cc]onnection (closed|reset)", str(error)) is not None
    )


def _name(rank: int, note: dict[str, Any]) -> str:
    return f"rank {rank} (process {note['process']} on {note['host']})"


def _place(note: dict[str, Any]) -> str:
    return note["doing"] if note["step"] is None else f"in step {note['step']}, {note['doing']}"


def _failed(rank: int, note: dict[str, Any]) -> str:
    return f"{_name(rank, note)} failed {_place(note)}: {note['failed']}"


def _say(rank: int, message: str) -> None:
    print(f"engine/train.py, rank {rank}: {message}", file=sys.stderr, flush=True)
