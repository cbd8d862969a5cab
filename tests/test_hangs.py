"""A rank that dies, stops, stalls or fails does not leave the others waiting: they say which, and where, and end."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from processes import start, write_config, write_images

LOST = 69


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs")
    return write_config(folder / "config.yaml", write_images(folder / "images"))


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_gone(number: signal.Signals, rank: int, config: Path, tmp_path: Path) -> None:
    """Rank 0 is special: the ranks' notes lie in its process."""
    run = start(
        2, tmp_path / "run", "--config", config, "optimization.epochs=9000", "engine.timeout_minutes=0.2",
        "logging.save_every=5",
    )  # fmt: skip
    run.wait_for("saved")
    run.signal(number, rank)
    began = time.monotonic()
    assert run.wait(1 - rank, seconds=60) == [LOST]
    assert time.monotonic() - began < (45 if number == signal.SIGSTOP else 30)
    run.kill()
    text = run.text(1 - rank)
    if rank == 1:
        pid = run.ranks[1].pid
        who = rf"rank 1 \(process {pid} on \S+\) last seen in step \d+, \w+"
        assert re.search(rf"no sign of life for \d+ s: {who}", text)
    else:
        assert re.search(r"rank 0(, or the launcher that keeps the ranks' notes, is gone| has not answered for)", text)
    assert re.search(r"here: in step \d+, computing. Exit code 69", text)


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
        found = re.search(r"no rank has moved on for (\d+) s; the furthest behind is rank 1 .*\n", run.text(rank))
        assert found and "in step 3, waiting for images" in found[0] and int(found[1]) < 30


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
