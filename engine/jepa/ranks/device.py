"""Which device a program uses: one function decides, and never takes the CPU in place of a GPU that does not work."""

import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

DRIVERS = "builds for CUDA 12 need driver 525 or newer, builds for CUDA 13 need 580"
CPU = "ask for the CPU: engine.device=cpu, or --device cpu where a program has that option"


def choose(device: str = "auto", local: int = 0) -> torch.device:
    """The device of this machine's `local`-th process; `device`: "cuda", "cpu", or "auto", a GPU if there is one.

    With "auto", a machine without any NVIDIA GPU or driver gives the CPU, and a line on stderr says so.
    Raises ValueError if there is a GPU that torch cannot use, or none for this process.
    """
    if device == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings(action="ignore"):  # what torch warns of is in the error below
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local < gpus:
        return torch.device("cuda", local)
    if gpus:
        raise ValueError(
            f"engine.device: process {local} on this machine has no GPU ({gpus} found); "
            f"start fewer processes per machine, or {CPU}"
        )
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    if device == "auto" and not (torch.version.cuda and has_nvidia()):
        if local == 0:
            why = "no NVIDIA GPU found" if torch.version.cuda else f"torch {torch.__version__} is {built}"
            print(f"running on the CPU: {why}", file=sys.stderr)
        return torch.device("cpu")
    version = driver_version()
    driver = f"NVIDIA driver {version} is loaded" if version else "no NVIDIA driver found in /proc/driver"
    raise ValueError(
        f"device {device}: torch {torch.__version__}, {built}, can use no GPU; {driver}; torch says: {_reason()}.\n"
        f"Let this process use a GPU (containers need --gpus all), match torch and driver ({DRIVERS}), or {CPU}"
    )


def has_nvidia(root: Path = Path("/")) -> bool:
    """Whether this machine has an NVIDIA GPU or driver, working or not."""

    def is_gpu(card: Path) -> bool:
        try:
            vendor, kind = ((card / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            return False
        return vendor == "0x10de" and kind.startswith("0x03")  # NVIDIA; display controller

    cards = root.glob("sys/bus/pci/devices/*")
    driver = (root / "proc/driver/nvidia").exists() or any(root.glob("dev/nvidia*")) or shutil.which("nvidia-smi")
    return bool(driver) or any(is_gpu(card) for card in cards)


def driver_version(root: Path = Path("/")) -> str | None:
    """The version of the loaded NVIDIA kernel module, which a container shares with its host; None if there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", (root / "proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def _reason() -> str:
    """Torch's own words for why there is no GPU, and what hides them."""
    try:
        torch.cuda.init()
        said = "torch.cuda.device_count() is 0"
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split()).rstrip(".")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return said if hidden is None else f"{said} (CUDA_VISIBLE_DEVICES={hidden!r})"


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies through pinned memory, without waiting for a GPU. (`to` would first copy a strided tensor out of it.)"""
    if device.type != "cuda":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)
