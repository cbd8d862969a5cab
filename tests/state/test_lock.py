"""One run per folder: the holder is named, and a holder that is surely gone loses it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jepa.state import lock
from jepa.state.lock import Lock
from jepa.state.restore import CheckpointError
from small import small_config


def lock_of(folder: Path, *words: str) -> Lock:
    return Lock(small_config(f"logging.folder={folder}", *words))


def hold(folder: Path, seconds_ago: float = 0.0, **note: Any) -> Path:
    """A lock left there by another process."""
    path = folder / ".jepa.lock"
    path.write_text(json.dumps({"token": "x", **lock._me(), **note}))
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


@pytest.fixture
def other() -> Iterator[subprocess.Popen]:
    """Another process on this machine."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_a_lock_is_refused_while_its_process_lives_and_taken_over_when_it_is_gone(
    other: subprocess.Popen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = hold(tmp_path, process=other.pid, began=lock._began(other.pid))
    text = held.read_text()
    with lock_of(tmp_path) as ours:
        with pytest.raises(CheckpointError, match=f"another run is using the folder: process {other.pid} on "):
            ours.take()
        assert held.read_text() == text
        other.kill()
        while lock._began(other.pid):  # it may be a zombie, which counts as gone
            time.sleep(0.01)
        assert held.read_text() != ours.take() == held.read_text()
        assert f"process {other.pid} on" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("note", "seconds", "gone"),
    [
        ({"began": "1"}, 0, True),  # its number has been reused
        ({"machine": "another", "host": "far"}, 20, False),
        ({"machine": "another", "host": "far"}, 400, True),
        ({"machine": "another", "host": "far", "job": "4711", "start": "0"}, 0, True),
        ({"machine": "another", "host": "far", "job": "4711", "start": "1"}, 0, False),
        ({"machine": "another", "host": "far", "job": "4712", "start": "0"}, 0, False),
    ],
)
def test_who_is_gone(
    note: dict[str, str], seconds: float, gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held = hold(tmp_path, seconds, **({"process": 2**22 + 1} | note))
    with lock_of(tmp_path) as ours:
        if gone:
            assert ours.take() == held.read_text()
        else:
            with pytest.raises(CheckpointError, match=rf"on far.* renewed \d+ s ago.*delete {held}"):
                ours.take()


def test_half_a_lock_is_somebody_s(tmp_path: Path) -> None:
    (tmp_path / ".jepa.lock").write_text('{"token": ')
    with lock_of(tmp_path) as ours, pytest.raises(CheckpointError, match="an unknown process"):
        ours.take()
    assert [path.name for path in tmp_path.iterdir()] == [".jepa.lock"]


def test_a_lock_is_renewed_and_one_that_was_taken_over_is_noticed_and_left(tmp_path: Path) -> None:
    with lock_of(tmp_path, "engine.timeout_minutes=0.01") as ours:
        text = ours.take()
        os.utime(ours.path, (0, 0))
        end = time.monotonic() + 10
        while ours.path.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)
        ours.see(text)
        held = hold(tmp_path, host="far")
        with pytest.raises(CheckpointError, match=r"now belongs to process .* on far"):
            ours.see(text)
    assert held.exists()


def test_a_folder_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "NETWORK_DELAYS", (0, 0.01))
    with pytest.raises(CheckpointError, match=r"must share logging\.folder"):
        lock_of(tmp_path / "elsewhere").see("what rank 0 wrote")
