"""A process's rank, device and process group, whichever launcher started it.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; `srun` and `mpirun` have their
own names; plain `python` sets none of them and runs a single rank.
"""

import atexit
import contextlib
import os
import re
import socket
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from .device import choose

RANK_LOST = os.EX_UNAVAILABLE  # the exit code of a run without one of its ranks (jepa.ranks.stop lists them)
MEETING = 10.0  # minutes within which all ranks must join; machines that start slowly need some
LAUNCHER = rb"deepspeed.launcher.launch|torchrun|torch.distributed.run"


SLURM_OWN_STEPS = 0xFFFFFFF0  # numbers of steps from here on are Slurm's: the batch script, an interactive shell


class Launcher(NamedTuple):
    """The variables by which an MPI launcher tells a process its place."""

    rank: str
    size: str
    local_rank: str
    local_size: str


MPI_LAUNCHERS = (
    Launcher(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    ),
    Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # Hydra: MPICH and Intel MPI
    Launcher("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


class NotMet(RuntimeError):
    """Ranks did not join or cannot be reached; the message names them."""

    exit_code = RANK_LOST


@dataclass(frozen=True)
class Ranks:
    """`store`: where the ranks exchange small messages; `cpu_group`: a gloo group besides the training group."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store
    cpu_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: "gpu[003-007,9],cpu1" -> "gpu003", "rack[1-2]n[3-4]" -> "rack1n3"."""
    match = re.match(r"(?:[^\[,]|\[\d[^\]]*\])+", nodelist)
    if match is None:
        raise ValueError(f"SLURM_JOB_NODELIST: given {nodelist!r}, wanted a host list; set MASTER_ADDR yourself")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The variable of this name, or `default` if it is not set. Raises ValueError if it is no integer."""
    if name not in given and default is not None:
        return default
    try:
        return int(given[name])
    except ValueError as error:
        raise ValueError(f"{name}={given[name]!r} in the environment: wanted a number, or {name} unset") from error


def launch_environment(given: dict[str, str], gpus: int = 0) -> dict[str, str]:
    """The five variables that torch.distributed and DeepSpeed read, from whatever the launcher set.

    `gpus`: how many this process sees. Slurm may show each task only its own (--gpus-per-task), as number 0.
    Raises ValueError for one process of a Slurm or MPI job that cannot find the others.
    """
    if "RANK" in given:
        names = {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        found = {"RANK": given["RANK"]} | {name: given.get(name, value) for name, value in names.items()}
        rank, size, *_ = (number(found, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        if not 0 <= rank < size:
            raise ValueError(
                f"RANK={rank} and WORLD_SIZE={size} in the environment: wanted 0 <= RANK < WORLD_SIZE, as a launcher "
                "sets them; unset RANK to run a single rank"
            )
        return found
    if (mpi := _mpi_environment(given, gpus)) is not None:
        return mpi
    if (tasks := int(given.get("SLURM_NTASKS", "1"))) > 1:
        if int(given.get("SLURM_STEP_ID", SLURM_OWN_STEPS)) >= SLURM_OWN_STEPS:
            raise ValueError(
                f"this Slurm job has {tasks} tasks (SLURM_NTASKS), but srun has not started this process: put srun "
                "before the command, or SLURM_NTASKS=1 to run a single rank"
            )
        return {
            "RANK": given["SLURM_PROCID"],
            "WORLD_SIZE": given["SLURM_NTASKS"],
            "LOCAL_RANK": "0" if gpus == 1 else given["SLURM_LOCALID"],
            "MASTER_ADDR": given.get("MASTER_ADDR") or first_host(given["SLURM_JOB_NODELIST"]),
            "MASTER_PORT": given.get("MASTER_PORT") or str(20000 + int(given["SLURM_JOB_ID"]) % 20000),
        }
    if lost := [m for m in MPI_LAUNCHERS if m.rank in given and number(given, m.size, 1) > 1]:
        raise ValueError(
            f"an MPI launcher started {given[lost[0].size]} ranks ({lost[0].size}), but does not say which of its "
            f"machine's this one is ({lost[0].local_rank}): set that for each, or use torchrun or srun"
        )
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


def _mpi_environment(given: dict[str, str], gpus: int) -> dict[str, str] | None:
    """The same from the variables of an MPI launcher, or None if there are none, or only one process.

    They go before Slurm's, which in a Slurm job describe what started mpirun's own daemons.
    """
    for launcher in MPI_LAUNCHERS:
        rank, size, local = (given.get(name) for name in launcher[:3])
        if rank is None or size is None or local is None or int(size) < 2:
            continue
        one_machine = given.get(launcher.local_size, size if rank == local else "") == size
        nodes = given.get("SLURM_JOB_NODELIST")
        address = given.get("MASTER_ADDR") or ("127.0.0.1" if one_machine else nodes and first_host(nodes))
        if not address:
            raise ValueError(
                f"mpirun started {size} ranks on several machines, and none says where rank 0 is: pass MASTER_ADDR, "
                "that machine's name, to all (mpirun -x MASTER_ADDR=... or -genv MASTER_ADDR ...), or use torchrun"
            )
        own = gpus == 1 and "CUDA_VISIBLE_DEVICES" in given  # as a wrapper sets it for each rank
        port = given.get("MASTER_PORT", "29500")
        rows = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": "0" if own else local}
        return rows | {"MASTER_ADDR": address, "MASTER_PORT": port}
    return None


def world_group() -> dist.ProcessGroup | None:
    """The group whose ranks share one batch, or None for a single process."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def require_alike(ranks: Ranks, value: str, hint: str) -> None:
    """Raises ValueError on every rank if the values differ, naming the ranks that deviate from the most common one."""
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, (value, socket.gethostname()), group=ranks.cpu_group)
    usual = Counter(found for found, _ in everyone).most_common(1)[0][0]
    others = [f"rank {r} on {host} has {found}" for r, (found, host) in enumerate(everyone) if found != usual]
    if others:
        raise ValueError(f"the ranks differ: {'; '.join(others[:8])}; most have {usual}; {hint}")


def start(device: str = "auto", timeout_minutes: float = 30, deterministic: bool = False) -> Ranks:
    """Joins the run's process group (NCCL on GPUs, gloo on CPUs) and selects this process's device.

    `device`: see jepa.ranks.device.choose. `deterministic`: torch, cuDNN and cuBLAS use only deterministic algorithms;
    if an operation has none, torch raises RuntimeError. (Where images are decoded is `Config.decoder`.)
    Raises ValueError like `choose`, NotMet if the ranks do not all join.
    """
    # The names that replace the deprecated collectives do not exist in torch 2.10.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    environment = launch_environment(dict(os.environ), torch.cuda.device_count())
    os.environ.update(environment)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # torchrun under mpirun: DeepSpeed wants the two to agree
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = environment["LOCAL_RANK"]
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is initialized
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    place = choose(device, int(environment["LOCAL_RANK"]))
    if place.type == "cuda":
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            # Masks of many lengths fragment blocks of fixed sizes. Read when the allocator is first used.
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        torch.cuda.set_device(place)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = _meet(environment, rank, world_size, min(MEETING, timeout_minutes))
    # Longer than the watchdog's timeout, because its message says more than that of a collective timing out.
    limit = timedelta(minutes=timeout_minutes + 5)
    store.set_timeout(limit)
    backend, bound = ("nccl", place) if place.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("training", store),
            rank=rank,
            world_size=world_size,
            timeout=limit,
            device_id=bound,
        )
        cpu_group = dist.new_group(backend="gloo", timeout=limit)
    except RuntimeError as error:
        raise NotMet(f"all ranks joined, but could not be connected: {_first_line(error)}") from error
    return Ranks(rank, world_size, place, store, cpu_group)


def _meet(environment: dict[str, str], rank: int, world_size: int, minutes: float) -> dist.Store:
    """The ranks' store, once all have joined. Raises NotMet."""
    where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    limit = timedelta(minutes=minutes)
    try:
        # With the real world size the rendezvous would wait for all ranks and not say which are missing.
        store, _, _ = next(dist.rendezvous("env://", rank=rank, world_size=1, timeout=limit))
        # torchrun's store outlives the ranks that it restarts, with all that they wrote.
        store = dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set(f"here/{rank}", socket.gethostname())
    except RuntimeError as error:
        what = "rank 0 cannot listen" if rank == 0 else "rank 0, or the launcher, cannot be reached"
        raise NotMet(f"{what} at {where}: {_first_line(error)}") from error
    keys = [f"here/{other}" for other in range(world_size)]
    try:
        store.wait(keys, limit)
        return store
    except RuntimeError as error:
        try:
            missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        except RuntimeError:
            raise NotMet(f"rank 0, or the launcher, is gone from {where}: {_first_line(error)}") from error
        if rank == 0:
            time.sleep(2)  # the store ends with this process, and the others are about to query it too
        raise NotMet(
            f"{world_size - len(missing)} of {world_size} ranks joined at {where} within {60 * minutes:.0f} s; "
            f"missing: rank {', '.join(missing)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def launchers() -> list[int]:
    """The launcher's processes above this one, nearest first, while they live.

    `deepspeed` is a parent and a child process; the parent ends at a SIGTERM without notifying the child.
    """
    if "LOCAL_RANK" not in os.environ:
        return []
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/cmdline", "rb") as line, open(f"/proc/{parent}/stat") as state:
            if re.search(LAUNCHER, name := line.read()) is None:
                return []
            above = int(state.read().rpartition(")")[2].split()[1])
        with open(f"/proc/{above}/cmdline", "rb") as line:
            return [parent, above] if b"deepspeed" in name and b"deepspeed" in line.read() else [parent]
    except OSError:
        return []


def leave(main: Callable[[], int]) -> NoReturn:
    """Ends a process that is in a process group with what `main` returns, as sys.exit does but without taking Python
    down. Raises what `main` raises.

    A thread of gloo drops its last tensors some time after a collective is over. If Python is being taken down then,
    torch 2.13 ends the thread in the middle of C++, which aborts the process ("terminate called without an active
    exception").
    """
    try:
        code = main()
    except SystemExit as asked:
        if not isinstance(asked.code, int):
            raise
        code = asked.code
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)
