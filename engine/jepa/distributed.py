"""Who am I among the processes of a run, whichever launcher started them.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; `srun` sets names of its own;
plain `python` sets nothing and is a run of one.
"""

import os
import re
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """`store`: where the ranks leave one another notes; `cpu_group`: their gloo group beside the one that trains."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store
    cpu_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def first_host(nodelist: str) -> str:
    """The first host of Slurm's short form: "gpu[003-007,9],cpu1" -> "gpu003"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise ValueError(f"SLURM_JOB_NODELIST: given {nodelist!r}, wanted a host list; set MASTER_ADDR yourself")
    return "".join(part or "" for part in match.groups())


def launch_environment(given: dict[str, str]) -> dict[str, str]:
    """The five variables that torch.distributed and DeepSpeed read, from whatever the launcher set."""
    if "RANK" in given:
        names = {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        return {"RANK": given["RANK"]} | {name: given.get(name, value) for name, value in names.items()}
    if int(given.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in given:
        return {
            "RANK": given["SLURM_PROCID"],
            "WORLD_SIZE": given["SLURM_NTASKS"],
            "LOCAL_RANK": given["SLURM_LOCALID"],
            "MASTER_ADDR": given.get("MASTER_ADDR") or first_host(given["SLURM_JOB_NODELIST"]),
            "MASTER_PORT": given.get("MASTER_PORT") or str(20000 + int(given["SLURM_JOB_ID"]) % 20000),
        }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start(device: str = "auto", timeout_minutes: float = 30, deterministic: bool = False) -> Ranks:
    """Joins the run's process group (NCCL on GPUs, gloo on CPUs) and takes this process's device.

    `device`: "auto" (the GPU where there is one), "cuda" or "cpu". `deterministic`: torch, cuDNN and cuBLAS choose
    only algorithms that give the same bits every time; where there is none, torch raises RuntimeError. DALI needs no
    switch: its CPU decoding is exact, and all JPEGs of a GPU go through the one engine (jepa.data.Decoder).
    Raises ValueError when a GPU is asked for and there is none for this process, and when the ranks do not meet.
    """
    # The collectives' newer names are unknown to torch 2.10.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    environment = launch_environment(dict(os.environ))
    os.environ.update(environment)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    local, gpus = int(environment["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus == 1 and "SLURM_PROCID" in os.environ:
        local = 0  # Slurm shows each task its own GPU alone (--gpus-per-task)
    if device == "cuda" or (device == "auto" and gpus > 0):
        if local >= gpus:
            raise ValueError(
                f"engine.device: process {local} of this machine has no GPU ({gpus} found); "
                "start fewer processes a machine, or set engine.device=cpu"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    else:
        place = torch.device("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Longer than the watchdog's, which says more than a collective that gives up.
    limit = timedelta(minutes=timeout_minutes + 5)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        backend = "nccl" if place.type == "cuda" else "gloo"
        training = dist.PrefixStore("training", store)
        bound = place if place.type == "cuda" else None
        dist.init_process_group(
            backend, store=training, rank=rank, world_size=world_size, timeout=limit, device_id=bound
        )
    except dist.DistError as error:
        where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        raise ValueError(f"the {environment['WORLD_SIZE']} ranks did not meet at {where}: {error}") from error
    return Ranks(rank, world_size, place, store, dist.new_group(backend="gloo", timeout=limit))
