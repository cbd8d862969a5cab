"""Stopping on request, by signals and a time limit: on all ranks after the same step, and resumed bit for bit."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from deepspeed.launcher.runner import fetch_hostfile

from jepa.ranks.stop import minutes
from processes import ROOT, start, write_config, write_images
from soak import bytes_that_differ, log_of

pytestmark = pytest.mark.ranks

BIN = Path(sys.executable).parent
CLUSTER = ROOT / "engine/cluster"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    return write_config(folder / "config.yaml", write_images(folder / "images"))


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_time_limit_that_means_nothing_is_named(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text!r}: wanted a number of minutes above 0$"):
        minutes(text)
    assert minutes("0.5") == 0.5


def test_one_rank_s_signal_and_the_clock_stop_all_and_nothing_is_lost(config: Path, tmp_path: Path) -> None:
    """The run is much longer than its time allows, and in the end it takes five more steps."""
    words = ("--config", config, "optimization.epochs=4000", "engine.zero_stage=2")
    parts = tmp_path / "parts"
    run = start(2, parts, *words)
    run.wait_for("kill [0-9]+ saves and stops")
    run.signal(signal.SIGUSR1, 1)
    assert run.wait() == [75, 75]
    assert "SIGUSR1" in run.text(1) and "stopped on request after step" in run.text(0)
    run = start(2, parts, *words, "--resume", "--max-minutes", "0.0001")
    assert run.wait() == [75, 75]
    steps = int(re.findall(r"stopped on request after step (\d+)", run.text())[0]) + 1
    assert re.search(rf"saved \S+(step0*{steps}|ep\d+)\n", run.text())
    words = (*words, f"engine.max_steps={steps + 5}")
    whole, run = start(2, tmp_path / "whole", *words), start(2, parts, *words, "--resume")
    assert run.wait() == [0, 0] and f"at step {steps}\n" in run.text()
    assert whole.wait() == [0, 0]
    assert bytes_that_differ(tmp_path / "whole/jepa-latest", parts / "jepa-latest") == 0
    assert [row["loss"] for row in log_of(parts)[0]] == [row["loss"] for row in log_of(tmp_path / "whole")[0]]


def test_ctrl_c_saves_and_prints_no_traceback(config: Path, tmp_path: Path) -> None:
    run = start(2, tmp_path / "run", "--config", config, "optimization.epochs=4000")
    run.wait_for("step 1/")
    run.signal(signal.SIGINT)  # a terminal sends it to all
    assert run.wait() == [75, 75]
    assert "SIGINT: saving after the next step" in run.text() and "stopped on request after step" in run.text()
    assert not any("Traceback" in run.text(rank) for rank in (0, 1))


def test_a_second_signal_ends_at_once_even_in_a_collective(config: Path, tmp_path: Path) -> None:
    run = start(2, tmp_path / "run", "--config", config, "optimization.epochs=1000")
    run.wait_for("step 1/")
    run.signal(signal.SIGSTOP, 1)  # rank 0 now waits for it, in C++
    run.signal(signal.SIGTERM, 0)
    run.wait_for("a second signal ends at once")
    time.sleep(2.2)
    assert run.ranks[0].is_alive()
    run.signal(signal.SIGTERM, 0)
    assert run.wait(0, seconds=5) == [128 + signal.SIGTERM]
    run.kill()


@pytest.mark.parametrize(
    ("launcher", "signalled", "code"),
    [
        (("deepspeed", "--num_accelerators", "2", "--master_port", "29565"), "rank", 75),
        (("deepspeed", "--num_accelerators", "2", "--master_port", "29567"), "launcher", -signal.SIGTERM),
        (("torchrun", "--nproc_per_node", "2", "--master_port", "29566"), "launcher", 1),
    ],
)
def test_launchers(launcher: tuple[str, ...], signalled: str, code: int, config: Path, tmp_path: Path) -> None:
    """deepspeed passes on the ranks' exit code; torchrun passes SIGTERM on and turns every nonzero code into 1.

    deepspeed ends at a SIGTERM and passes nothing on: the ranks notice, save and end, as do the processes in between.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "PATH": f"{BIN}:{os.environ['PATH']}"}
    environment.pop("TRITON_INTERPRET", None)
    words = [BIN / launcher[0], *launcher[1:], ROOT / "engine/train.py", "--config", config]
    words += ["engine.device=cpu", "optimization.epochs=5000", f"logging.folder={tmp_path / 'run'}"]
    output = tmp_path / "output"
    with output.open("w") as file:
        launched = subprocess.Popen(
            [str(word) for word in words], env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            end = time.monotonic() + 120
            while "step 1/" not in output.read_text():
                assert launched.poll() is None and time.monotonic() < end, output.read_text()
                time.sleep(0.1)
            rank = int(re.findall(r"kill (\d+) saves and stops", output.read_text())[0])
            os.kill(rank if signalled == "rank" else launched.pid, signal.SIGTERM)
            assert launched.wait(60) == code, output.read_text()
            while subprocess.run(["pgrep", "-s", str(launched.pid)], capture_output=True, check=False).stdout:
                assert time.monotonic() < end + 60, f"orphans:\n{output.read_text()}"
                time.sleep(0.1)
        finally:
            subprocess.run(["pkill", "-9", "-s", str(launched.pid)], check=False)  # its session, nothing else
    assert "saved" in output.read_text() and "Exit code 75" in output.read_text()


def in_attempt(port: int, number: int, _: int) -> None:
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(number)}
    os.environ["MASTER_PORT"] = str(port)


def test_restarted_ranks_do_not_meet_the_dead_ones(config: Path, tmp_path: Path) -> None:
    """The store of torchrun's agent lives on, with all that the killed ranks wrote into it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = ("--config", config, "engine.max_steps=6", "logging.save_every=2", "--resume", "auto")
    for number in (0, 1):
        run = start(2, tmp_path / "run", *words, fault=partial(in_attempt, store.port, number))
        if number == 0:
            run.wait_for("saved .*step00000002")
            run.kill()
    assert run.wait() == [0, 0] and "resuming from" in run.text()


def test_the_sbatch_file_goes_on_and_requeues_on_75_alone(tmp_path: Path) -> None:
    """Under bash, with stand-ins for Slurm's commands that record how they were called."""
    for name in ("srun", "scontrol"):
        code = '\nexit "$CODE"' if name == "srun" else ""
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls{code}\n')
        (tmp_path / name).chmod(0o755)
    for code, requeued in ((0, False), (1, False), (69, False), (75, True)):
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": str(code), "SLURM_JOB_ID": "4711"}
        done = subprocess.run(
            ["bash", CLUSTER / "pretrain.sbatch", "--config", "a b.yaml"], env=environment, check=False
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        assert done.returncode == code
        assert calls[0].endswith("python engine/train.py --resume auto --config a b.yaml")
        assert calls[1:] == (["scontrol requeue 4711"] if requeued else [])


def test_deepspeed_reads_the_hostfile() -> None:
    assert set(fetch_hostfile(str(CLUSTER / "hostfile")).values()) == {8}
