"""The machine: its hardware and versions, its measured limits, and timers that do not disturb what they time."""

import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SHORT, GRAPHED = 0.1, 20  # a call below SHORT ms is timed as one of GRAPHED in a CUDA graph
Call = Callable[[], Any]

# Dense bf16 TFLOP/s from NVIDIA's data sheets, by a substring of CUDA's device name.
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
    """FLOP/s from the data sheet; None if it is not listed here."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in DATASHEET.items() if part in name), None)


def provenance(device: torch.device) -> dict[str, Any]:
    """What a figure needs to be credible and reproducible."""
    versions = {str(package.name): package.version for package in distributions()}
    dali = [name for name in versions if name.startswith("nvidia-dali-")]  # one per CUDA version
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "hardware": hardware(device),
        "driver": _first_line(driver) if device.type == "cuda" else None,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: versions.get(name) for name in ("torch", "triton", "deepspeed", *dali)},
        "commit": _first_line(described),
        "command": command(),
    }


def command() -> str:
    """This program's command line, without what holds on this machine only: where it writes, where a checkout lies."""
    words, kept = iter(sys.argv), ["python"]
    for word in words:
        if word == "--out":
            next(words)
        elif word in ("--checkout", "--folder"):
            kept += [word, next(words) and word[2:].upper()]
        else:
            kept.append("reference=CHECKOUT" if word.startswith("reference=") else word)
    return " ".join(kept)


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


class Clock:
    """Timestamps of the device. Taking one does not block; reading a span waits for its end."""

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
    """FLOP/s of a large square matrix product: the median of repetitions that take `seconds` in total."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    times: list[float] = []
    a @ b
    while len(times) < 5 or sum(times) < seconds:
        start = clock.mark()
        a @ b
        times.append(clock.seconds(start, clock.mark()))
    return 2 * side**3 / statistics.median(times)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What `work` returns, and the peak of the tensor memory that it adds, including what it leaves alive.

    On a GPU this is the allocator's peak counter above its value before. On a CPU it is counted from the profiler's
    record of each allocation, in this thread and in those that work for it (autograd's, gloo's). (The process's
    resident memory includes what malloc retains, and cannot be reset.) Not counted on a CPU: threads that `work` starts
    itself, memory that is not from torch's allocator, and frees of tensors that existed before: `work` gets no credit
    for them.
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
    memory = [event for event in events if event.get("name") == "[memory]"]
    alive: dict[int, int] = {}  # bytes by address
    total = most = 0
    for event in sorted(memory, key=lambda event: event["ts"]):  # the trace lists one thread after the other
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        total -= alive.pop(address, 0)  # also when it is allocated again: the free was in a thread that is not recorded
        if size > 0:
            alive[address] = size
            total += size
        most = max(most, total)
    return result, most


def milliseconds(
    calls: Mapping[str, Call], device: str, seconds: float, copies: Callable[[str, int], list[Call]] | None = None
) -> dict[str, float]:
    """The median time of each call, run in turns, for `seconds` each and at least five times.

    copies: makes calls of a contender, each on its own buffers, for those too short to be timed one by one.
    """
    if not calls:
        return {}
    once = on_gpu() if device == "cuda" else on_cpu
    for call in calls.values():
        call(), call()
    timed, counts = dict(calls), dict.fromkeys(calls, 1)
    if device == "cuda" and copies is not None:
        for name, call in calls.items():
            if min(once(call) for _ in range(3)) < SHORT:
                timed[name], counts[name] = graphed(copies(name, GRAPHED)), GRAPHED
    times: dict[str, list[float]] = {name: [] for name in timed}
    end = time.monotonic() + seconds * len(calls)
    while time.monotonic() < end or len(times[next(iter(calls))]) < 5:
        for name, call in timed.items():
            times[name].append(once(call) / counts[name])
    return {name: statistics.median(all_) for name, all_ in times.items()}


def on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def on_gpu() -> Callable[[Call], float]:
    """Times a call with events: caches full of unrelated clean lines, the host running ahead of the GPU."""
    cold = torch.zeros(2**26, device="cuda")  # 256 MB: more than any cache; read, as dirty lines slow the next call

    def once(call: Call) -> float:
        torch.cuda.synchronize()
        host = time.perf_counter()
        call()
        host = time.perf_counter() - host
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        cold.sum()
        torch.cuda._sleep(int(2e9 * (2 * host + 1e-4)))  # cycles at up to 2 GHz: twice what the host needs
        events[0].record()
        call()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1])

    return once


def graphed(calls: list[Call]) -> Call:
    """All calls as one CUDA graph, free of host overhead. Results are kept: none overwrites another's."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = [call() for call in calls]

    def replay() -> list[Any]:
        graph.replay()
        return kept

    return replay


def ceilings(device: str, seconds: float) -> tuple[float, float]:
    """Bytes/s of memory, FLOP/s of a float32 matrix product."""
    n, side = (2**30, 8192) if device == "cuda" else (2**27, 2048)
    source, target = torch.ones(n // 4, device=device), torch.empty(n // 4, device=device)
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "scale": lambda: target.mul_(1.0), "matmul": lambda: a @ b}
    times = milliseconds(calls, device, seconds)
    return 2 * n / min(times["copy"], times["scale"]) * 1e3, 2 * side**3 / times["matmul"] * 1e3
