"""Where output goes must not matter: a run goes on without a terminal, a reader, a disk or an encoding for it."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from processes import rows, start, write_config, write_images

pytestmark = pytest.mark.ranks


def print_to(handle: int) -> None:
    for number in (1, 2):
        os.dup2(handle, number)


def closed_pipe(_: int) -> None:
    reader, writer = os.pipe()
    print_to(writer)
    os.close(reader)


def full_disk(_: int) -> None:
    print_to(os.open("/dev/full", os.O_WRONLY))


def lost_terminal(_: int) -> None:
    keyboard, screen = os.openpty()
    print_to(screen)
    os.close(keyboard)  # writes now fail with EIO


def closed(_: int) -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]  # what Python does for `>&- 2>&-`


def ascii_only(_: int) -> None:
    for name in ("stdout", "stderr"):
        getattr(sys, name).reconfigure(encoding="ascii", errors="strict")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    return write_config(folder / "config.yaml", write_images(folder / "images", 24))


@pytest.mark.parametrize("fault", [closed_pipe, full_disk, lost_terminal, closed, ascii_only])
def test_a_run_outlives_its_output(fault: Callable[[int], None], config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "läufe-実験"
    run = start(1, folder, "--config", config, "engine.max_steps=4", "logging.save_every=2", fault=fault)
    assert run.wait() == [0], run.text()
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3] and (folder / "jepa-step00000004").is_dir()
    if fault is ascii_only:
        assert "saved " in run.text() and "l\\xe4ufe-\\u5b9f\\u9a13" in run.text()


def test_a_mistake_is_told_by_the_exit_code_even_where_nobody_reads(config: Path, tmp_path: Path) -> None:
    run = start(1, tmp_path / "run", "--config", config, "data.bath_size=3", fault=closed_pipe)
    assert run.wait() == [1]


def test_a_run_goes_on_when_its_terminal_hangs_up(config: Path, tmp_path: Path) -> None:
    run = start(2, tmp_path / "run", "--config", config, "optimization.epochs=4000")
    run.wait_for("step 1/")
    run.signal(signal.SIGHUP)
    for rank in (0, 1):
        run.wait_for("the terminal is gone: training goes on", rank)
    last = rows(tmp_path / "run")[-1]["step"]
    while rows(tmp_path / "run")[-1]["step"] < last + 3:
        assert run.ranks[0].is_alive()
    run.signal(signal.SIGTERM, 1)
    assert run.wait() == [75, 75]


def under_torchrun(_: int) -> None:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"


def test_it_saves_where_the_launcher_would_kill_it(config: Path, tmp_path: Path) -> None:
    """torchrun passes SIGHUP on and kills what is left 30 seconds later."""
    run = start(1, tmp_path / "run", "--config", config, "optimization.epochs=4000", fault=under_torchrun)
    run.wait_for("step 1/")
    run.signal(signal.SIGHUP)
    assert run.wait() == [75] and "SIGHUP: saving after the next step" in run.text()
