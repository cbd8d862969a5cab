"""What this machine offers a run, apart from its GPUs: cores, memory, limits, a compiler. Needs no other package."""

import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

FEW_FILES, MANY_FILES = 256, 1024  # open at once: too few for a run; what systems usually allow
SMALL_SHM = 2**29  # bytes; NCCL takes some for every pair of GPUs, and containers are given 64 MiB


class Finding(NamedTuple):
    """A line of the doctor's report."""

    level: Literal["ok", "note", "wrong"]
    name: str
    says: str
    cure: str = ""
    details: tuple[str, ...] = ()


def contained(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What `check` finds; an exception of any kind is a finding too."""
    try:
        yield from check()
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        yield Finding(
            "wrong", name, f"the check itself failed: {type(error).__name__}: {said[:200]}", "--debug shows where"
        )


def system() -> Iterator[Finding]:
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "") if Path("/etc/os-release").exists() else ""
    yield Finding(
        "ok", "system", f"{release or platform.system()}, {cores} of {os.cpu_count()} cores, {memory / 2**30:.0f} GiB"
    )


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Iterator[Finding]:
    said = ".".join(map(str, version))
    if version < (3, 11):
        yield Finding("wrong", "Python", f"{said}: the engine needs 3.11 or newer", "make PYTHON=python3.12")
    else:
        yield Finding("ok", "Python", f"{said}, {sys.prefix}")


def processor(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str = platform.machine()) -> Iterator[Finding]:
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name, flags = fields.get("model name", machine), fields.get("flags", "").split()
    if machine not in ("x86_64", "AMD64"):
        yield Finding("ok", "processor", name)
    elif "avx2" not in flags:
        cure = "use a newer processor, or let the virtual machine pass the host's (QEMU: -cpu host)"
        yield Finding(
            "note", "processor", f"{name} without AVX2: the C++ kernels and torch are several times slower", cure
        )
    else:
        best = "AVX-512" if "avx512f" in flags else "AVX2"
        yield Finding("ok", "processor", f"{name}, {best}" + (", bf16" if "avx512_bf16" in flags else ""))


def open_files(limits: tuple[int, int] | None = None) -> Iterator[Finding]:
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    cure = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536} before the run"
    if 0 <= soft < FEW_FILES:
        yield Finding("wrong", "open files", f"at most {soft}: decoders, ranks and loggers need more", cure)
    elif 0 <= soft < MANY_FILES:
        yield Finding("note", "open files", f"at most {soft}, few for a run on several GPUs", cure)
    else:
        yield Finding("ok", "open files", f"at most {soft}")


def shared_memory(gpus: int = 0, folder: str = "/dev/shm") -> Iterator[Finding]:
    """`gpus`: how many ranks of this machine NCCL is to connect."""
    try:
        total, _, free = shutil.disk_usage(folder)
    except OSError as error:
        yield Finding("note", "shared memory", f"{folder}: {error.strerror}", "mount a tmpfs there")
        return
    said = f"{folder} has {free / 2**20:.0f} of {total / 2**20:.0f} MiB free"
    if free >= SMALL_SHM:
        yield Finding("ok", "shared memory", said)
    else:
        cure = "docker run --shm-size=8g or --ipc=host; else remove what lies there"
        needs = ": NCCL needs more between several GPUs" if gpus > 1 else ", enough for one GPU or none"
        yield Finding("wrong" if gpus > 1 else "note", "shared memory", said + needs, cure)


def compiler(needed: bool) -> Iterator[Finding]:
    """`needed`: there is a GPU, for which Triton and torch.compile call a C compiler."""
    found = next(
        (path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (path := shutil.which(name))), None
    )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    why = "Triton and torch.compile call one on a GPU" if needed else "only a build of the C++ kernels needs one here"
    level: Literal["note", "wrong"] = "wrong" if needed else "note"
    if found is None:
        yield Finding(level, "compiler", f"none: {why}", "install one: apt install g++ python3-dev")
    elif not header.is_file():
        yield Finding(level, "compiler", f"{found}, but no {header}: {why}", "install it: apt install python3-dev")
    else:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
        yield Finding("ok", "compiler", f"{found}, {said.partition(chr(10))[0] or 'version unknown'}")
