"""A process's rank and addresses, from the variables that each launcher sets."""

import os
import random
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


@pytest.mark.parametrize(
    "wrong",
    [{"RANK": "2"}, {"RANK": "-1"}, {"RANK": ""}, {"WORLD_SIZE": "two"}, {"LOCAL_RANK": "x"}, {"MASTER_PORT": "http"}],
)
def test_what_no_launcher_sets_is_told(wrong: dict[str, str]) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1234"}
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* in the environment.*wanted"):
        launch_environment(given | wrong)
    with pytest.raises(ValueError, match="RANK=3 and WORLD_SIZE=1 in the environment"):
        launch_environment({"RANK": "3"})


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


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}])
def test_a_slurm_job_without_srun_is_told_so(step: dict[str, str]) -> None:
    """In the batch script and in an interactive shell, whose steps have Slurm's own numbers."""
    job = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"} | step
    with pytest.raises(ValueError, match="put srun before the command, or SLURM_NTASKS=1"):
        launch_environment(job)
    assert launch_environment(job | {"SLURM_NTASKS": "1"})["WORLD_SIZE"] == "1"
    assert launch_environment(job | {"RANK": "1", "WORLD_SIZE": "2"})["WORLD_SIZE"] == "2"  # torchrun in the script


WORLD = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
MPI = {
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{name}" for name in WORLD),
    "MPICH, Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "MVAPICH": tuple(f"MV2_COMM_WORLD_{name}" for name in WORLD),
}


@pytest.mark.parametrize("names", MPI.values(), ids=MPI)
def test_mpirun_s_ranks_meet(names: tuple[str, ...]) -> None:
    """Slurm's variables, if there are any, are those of mpirun's daemons."""

    def rank(*values: int, gpus: int = 0, **more: str) -> dict[str, str]:
        return launch_environment(dict(zip(names, map(str, values), strict=True)) | more, gpus)

    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n[3-4]"}
    here = [rank(r, 4, r, 4) for r in range(4)]
    assert [(r["RANK"], r["WORLD_SIZE"], r["LOCAL_RANK"]) for r in here] == [(str(r), "4", str(r)) for r in range(4)]
    assert {(r["MASTER_ADDR"], r["MASTER_PORT"]) for r in here} == {("127.0.0.1", "29500")}
    there = [rank(r, 4, r % 2, 2, **slurm) for r in range(4)]
    assert [(r["RANK"], r["LOCAL_RANK"], r["MASTER_ADDR"]) for r in there] == [
        ("0", "0", "n3"), ("1", "1", "n3"), ("2", "0", "n3"), ("3", "1", "n3"),
    ]  # fmt: skip
    given = rank(3, 4, 1, 2, MASTER_ADDR="h", MASTER_PORT="1234")
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("h", "1234")
    with pytest.raises(ValueError, match="several machines, and none says where rank 0 is: pass MASTER_ADDR"):
        rank(3, 4, 1, 2)
    assert rank(3, 4, 3, 4, gpus=1, CUDA_VISIBLE_DEVICES="3")["LOCAL_RANK"] == "0"  # a wrapper shows it this one
    assert rank(0, 1, 0, 1)["WORLD_SIZE"] == "1"
    bare = dict(zip(names[:2], ("1", "2"), strict=True))
    with pytest.raises(ValueError, match=rf"2 ranks \({names[1]}\).*{names[2]}"):
        launch_environment(bare)  # not two runs of one rank
    task = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
    assert launch_environment(bare | task | {"SLURM_JOB_NODELIST": "n"})["RANK"] == "1"  # srun --mpi=pmi2


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


def in_a_process(code: str) -> tuple[int, str]:
    words = [sys.executable, "-c", f"import atexit, sys\nfrom jepa.ranks.distributed import leave\n{code}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/engine:{ROOT}/kernels"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_a_process_leaves_with_its_code_its_output_and_its_exit_handlers_but_does_not_take_python_down() -> None:
    code = random.randint(1, 99)
    taken_down = (
        "class Last:\n def __del__(self): print('taken down')\nsys.last = Last()\natexit.register(print, 'bye')\n"
    )
    for main in (f"lambda: {code}", f"lambda: sys.exit({code})"):
        assert in_a_process(f"{taken_down}print('said', end='')\nleave({main})") == (code, "saidbye\n")
    assert in_a_process("leave(lambda: sys.exit('why'))") == (1, "why\n")
    ended, said = in_a_process("leave(lambda: 1 // 0)")
    assert ended == 1 and said.rstrip().endswith("ZeroDivisionError: integer division or modulo by zero")
