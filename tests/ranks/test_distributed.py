"""A process's rank and addresses, from the variables that each launcher sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa.ranks.distributed import first_host, launch_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu[003-007,9],cpu1", "gpu003"),
        ("node7", "node7"),
        ("a-1,b-2", "a-1"),
        ("rack[12,14]", "rack12"),
        ("c[1-2]-ib", "c1-ib"),
        ("rack[1-2]n[03-04,7],x", "rack1n03"),
    ],
)
def test_first_host_of_slurm_s_short_form(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_plain_python_is_a_run_of_one() -> None:
    found = launch_environment({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("0", "1", "0")
    assert found["MASTER_ADDR"] == "127.0.0.1" and int(found["MASTER_PORT"]) > 1023


def test_torchrun_and_deepspeed_are_taken_as_they_are() -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1234"}
    assert launch_environment(given | {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) == given


def test_srun_s_names_are_translated_alike_on_all_ranks() -> None:
    job = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "n[08-09]", "SLURM_JOB_ID": "4711007"}
    ranks = [launch_environment(job | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r % 2)}) for r in range(4)]
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"]) for r in ranks] == [
        ("0", "0", "4"), ("1", "1", "4"), ("2", "0", "4"), ("3", "1", "4"),
    ]  # fmt: skip
    assert {(r["MASTER_ADDR"], r["MASTER_PORT"]) for r in ranks} == {("n08", ranks[0]["MASTER_PORT"])}
    assert 1024 < int(ranks[0]["MASTER_PORT"]) < 65536
    alone = launch_environment(job | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, gpus=1)
    assert (alone["RANK"], alone["LOCAL_RANK"]) == ("3", "0")  # the task sees only this GPU


@pytest.mark.slow
def test_determinism_is_asked_of_torch_and_cublas_before_anything_runs() -> None:
    """In its own process. Tests only that the flags are set; what they do is for torch to test."""
    code = (
        "import os, torch; from jepa.ranks import distributed; torch.backends.cudnn.benchmark = True;"
        "torch.utils.deterministic.fill_uninitialized_memory = True;"
        "distributed.start('cpu', deterministic={});"
        "print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),"
        "torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory,"
        "os.environ.get('CUBLAS_WORKSPACE_CONFIG'))"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "engine")}
    for asked, wanted in ((True, "True False False False :4096:8"), (False, "False False True True None")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(asked)], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == wanted.split(), done.stdout
