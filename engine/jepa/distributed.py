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
    rank: int
    world_size: int
    device: torch.device

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


def start(device: str = "auto", timeout_minutes: float = 30) -> Ranks:
    """Joins the run's process group (NCCL on GPUs, gloo on CPUs) and takes this process's device.

    `device`: "auto" (the GPU where there is one), "cuda" or "cpu".
    Raises ValueError when a GPU is asked for and there is none for this process.
    """
    # The collectives' newer names are unknown to torch 2.10.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    environment = launch_environment(dict(os.environ))
    os.environ.update(environment)
    local, gpus = int(environment["LOCAL_RANK"]), torch.cuda.device_count()
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
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes))
    return Ranks(dist.get_rank(), dist.get_world_size(), place)
