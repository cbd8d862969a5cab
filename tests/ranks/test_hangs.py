"""A rank that dies, stops, stalls or fails does not leave the others waiting: they name it and its step, and end."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from processes import Run, start, write_config, write_images

pytestmark = pytest.mark.ranks

LOST = 69


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs")
    return write_config(folder / "config.yaml", write_images(folder / "images"))


def check_the_survivor(number: signal.Signals, lost: int, run: Run) -> None:
    assert run.wait(1 - lost, seconds=90) == [LOST]
    run.kill()
    text = run.text(1 - lost)
    if lost == 1:
        who = rf"rank 1 \(process {run.ranks[1].pid} on \S+\) last seen in step \d+, \w+"
        assert re.search(rf"no heartbeat for \d+ s: {who}", text), text
    else:  # its process hosts the store
        how = "has not answered for" if number == signal.SIGSTOP else "or the launcher .* is gone"
        assert re.search(rf"rank 0,? {how}", text), text
    assert re.search(r"this rank: in step \d+, \w+. Exit code 69", text), text


def test_ranks_that_are_stopped_or_killed_are_named_by_the_others(config: Path, tmp_path: Path) -> None:
    """All cases at once, because they mostly wait."""
    cases = [(number, lost) for number in (signal.SIGSTOP, signal.SIGKILL) for lost in (0, 1)]
    words = ("--config", config, "optimization.epochs=9000", "engine.timeout_minutes=0.3", "logging.save_every=5")
    runs = [start(2, tmp_path / f"{number.name}-{lost}", *words) for number, lost in cases]
    for (number, lost), run in zip(cases, runs, strict=True):
        run.wait_for(r"saved \S+/jepa-")
        time.sleep(1.5)  # there is a heartbeat every second
        run.signal(number, lost)
    for (number, lost), run in zip(cases, runs, strict=True):
        check_the_survivor(number, lost, run)


def after_three_batches(rank: int, happens: Callable[[], None]) -> None:
    if rank == 1:
        import train

        batch, calls = train.Loader.batch, []

        def bad_batch(self: object, step: int, micro: int = 0) -> object:
            calls.append(step)
            if len(calls) > 3:
                happens()
            return batch(self, step, micro)

        train.Loader.batch = bad_batch


def stall(rank: int) -> None:
    after_three_batches(rank, lambda: time.sleep(3600))


def fail(rank: int) -> None:
    def happens() -> None:
        raise ValueError("the images are gone")

    after_three_batches(rank, happens)


def test_a_rank_that_stalls_is_the_one_furthest_behind(config: Path, tmp_path: Path) -> None:
    run = start(2, tmp_path / "run", "--config", config, "engine.timeout_minutes=0.2", fault=stall)
    assert run.wait(seconds=90) == [LOST, LOST]
    for rank in (0, 1):
        found = re.search(r"no rank has made progress for (\d+) s; the furthest behind is rank 1 .*\n", run.text(rank))
        assert found and "in step 3, waiting for images" in found[0] and int(found[1]) < 30
    assert not (tmp_path / "run/.jepa.lock").exists()  # so that it can restart on another machine at once


def test_a_rank_that_fails_is_quoted_by_the_others(config: Path, tmp_path: Path) -> None:
    run = start(2, tmp_path / "run", "--config", config, fault=fail)
    assert run.wait(seconds=60) == [LOST, 1]
    assert "the images are gone" in run.text(1)
    quoted = r"rank 1 \(.*\) failed in step 3, waiting for images: ValueError: the images are gone"
    assert re.search(quoted, run.text(0))


def test_what_all_ranks_find_wrong_is_an_error_and_no_lost_rank(config: Path, tmp_path: Path) -> None:
    run = start(2, tmp_path / "run", "--config", config, "--resume")
    assert run.wait(seconds=60) == [1, 1]
    assert all("no checkpoint of 'jepa'" in run.text(rank) for rank in (0, 1))


def never_come(rank: int) -> None:
    if rank == 1:
        os._exit(3)


def nobody_to_come_to(rank: int) -> None:
    if rank == 0:
        os._exit(3)


def test_ranks_that_never_come_are_named(config: Path, tmp_path: Path) -> None:
    words = ("--config", config, "engine.timeout_minutes=0.1")
    one = start(3, tmp_path / "one", *words, fault=never_come)
    other = start(2, tmp_path / "other", *words, fault=nobody_to_come_to)
    assert one.wait(seconds=60) == [LOST, 3, LOST] and other.wait(seconds=60) == [3, LOST]
    missing = r"rank \d: 2 of 3 ranks joined at \S+ within 6 s; missing: rank 1\n"
    for rank in (0, 2):
        assert re.search(missing, one.text(rank)), one.text(rank)
    assert "rank 0, or the launcher, cannot be reached at" in other.text(1)
    assert "Traceback" not in one.text(0) + one.text(2) + other.text(1)
