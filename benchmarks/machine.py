"""The machine a figure belongs to: what it is, how fast it multiplies, and clocks that do not disturb it."""

import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]

# Dense bf16 TFLOP/s of NVIDIA's data sheets, by a part of the name that CUDA gives.
DATASHEET = {
    "A100": 312, "A800": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H200": 989,
    "GH200": 989, "B200": 2250, "L40S": 362, "L40": 181, "A40": 150, "A30": 165, "A10": 125, "L4": 121,
}  # fmt: skip


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} thread(s)"


def datasheet_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations/s, or None where the data sheet is not known here."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in DATASHEET.items() if part in name), None)


def provenance(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it to be believed and repeated."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "hardware": hardware(device),
        "driver": _first_line(driver) if device.type == "cuda" else None,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: installed(name) for name in ("torch", "triton", "deepspeed")},
        "commit": _first_line(commit),
        "command": " ".join(["python", *sys.argv]),
    }


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


class Clock:
    """Marks on the device's own time line. Taking one waits for nothing; reading a span waits for its end."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self.on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def drain(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations/s of a large square matrix product, the median of repetitions that take `seconds` in all."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    clock, times = Clock(device), []
    a @ b
    while len(times) < 5 or sum(times) < seconds:
        start = clock.mark()
        a @ b
        times.append(clock.seconds(start, clock.mark()))
    return 2 * side**3 / statistics.median(times)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What `work` returns, and the most tensor memory that lay there at once while it ran, above what lay there before.

    Both are the allocator's own count: on a GPU its peak counter; on a CPU the profiler's record of each allocation.
    (Resident memory of the process also counts what malloc keeps, and cannot be reset.) Freeing what lay there before
    is not seen on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    memory = [event["args"] for event in events if event.get("name") == "[memory]"]
    if not memory:
        return result, 0
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return result, max(m["Total Allocated"] for m in memory) - before
