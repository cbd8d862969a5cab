"""Ends a run whose ranks would wait forever, because one of them is lost."""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

from .distributed import RANK_LOST, Ranks
from .stop import PULSE, say

SUSPICIOUS = 5  # missed heartbeats that prove a rank's death once a connection has broken


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
            say(self.rank, f"{verdict}; waiting for the others to end")
            time.sleep(3 * self.pulse)
        self._end(verdict)

    def _lost_the_store(self, error: Exception) -> None:
        if not self.over.wait(SUSPICIOUS * self.pulse):  # a run that has just ended needs no verdict
            self._end(f"rank 0, or the launcher that hosts the store, is gone: {error}")

    def _end(self, verdict: str) -> None:
        here = f"this rank: {_place(self.me)}"
        say(self.rank, f"{verdict}; {here}. Exit code {RANK_LOST}: --resume continues from the last checkpoint")
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
