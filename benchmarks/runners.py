"""A training step as a contender: the engine's or the published code's, on the same images and masks.

The parts of throughput.py: contenders, which `run` a step between two timestamps of the device, their synthetic images,
and how they are timed in turns and their memory measured.
"""

import contextlib
import itertools
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from levers import Lever, changed
from machine import Clock, peak_bytes
from published import Published, as_floats
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from jepa.config.schema import Config
from jepa.data.loader import Batch
from jepa.data.synthetic import noise
from jepa.model.cost import Kept
from jepa.model.layout import Place, masks_of, target_rows
from jepa.ranks import distributed
from jepa.train import zero
from jepa.train.budget import mean_tokens
from jepa.train.step import start_model, take_step

NUMBERS = (1e-4, 0.04, 0.996)  # lr, weight decay and momentum of every step
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMalloc",
    "cudaFree",
)
Batches = Iterator[tuple[int, int, Batch]]


class Synthetic:
    """Noise on the device, the same for every contender: micro-batch k of step s never changes."""

    def __init__(self, config: Config, device: torch.device, accumulation: int, number: int = 4) -> None:
        B, seed = config.data.batch_size, config.engine.seed
        sizes = [view.size for view in config.method.views(config)]
        views = [noise(number * B, S, seed + v).reshape(number, B, S, S, 3) for v, S in enumerate(sizes)]
        self.accumulation = accumulation
        self.pool = [[torch.from_numpy(view[i]).to(device) for view in views] for i in range(number)]

    def batches(self, step: int) -> Batches:
        for micro in range(self.accumulation):
            yield step, micro, Batch(self.pool[(step * self.accumulation + micro) % len(self.pool)], [])


class Step(NamedTuple):
    """A timed step: its seconds, the tokens that its masks kept, and the graphs that were compiled in it."""

    seconds: float
    kept: Kept
    graphs: int


@dataclass
class Times:
    """One contender's timed steps, and seconds by part; its memory between steps and at the peak."""

    resident: int = 0
    peak: int = 0
    steps: list[Step] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0


def graph_count() -> int:
    """Graphs that torch.compile has made in this process."""
    return counters["stats"]["unique_graphs"]


class Engine:
    """A contender: the engine as engine/train.py runs it, with some levers switched."""

    def __init__(self, name: str, config: Config, ranks: distributed.Ranks, levers: list[Lever]) -> None:
        self.name, self.ranks, self.clock, self.times = name, ranks, Clock(ranks.device), Times()
        self.config = changed(config, levers)
        self.contexts = [lever.context for lever in levers if lever.context]
        # Weights drawn on the device: a CPU takes ten seconds for a ViT-H/14's.
        self.engine, self.teacher = start_model(self.config, ranks.device, drawn_on=ranks.device)
        self.numbers = torch.tensor(NUMBERS, dtype=torch.float64, device=zero.schedule_device(self.engine))

    def run(self, step: int, batches: Batches) -> tuple[Any, Any, Any]:
        """Marks before and after the step, and its loss on the device: `float(loss)` waits for it."""
        with contextlib.ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context(self.ranks.device))
            start = self.clock.mark()
            zero.schedule(self.engine, self.numbers)
            done = take_step(self.config, self.ranks, self.engine, self.teacher, batches, step)
            return start, self.clock.mark(), done.losses[-1][0]

    @contextlib.contextmanager
    def timing_parts(self) -> Iterator[None]:
        """While open, times the end of a step, from the end of its backward, and the optimizer's part of it; these
        steps are not counted."""
        marks: dict[str, list[tuple[Any, Any]]] = {"backward": [], "optimizer and average": [], "step": []}
        wrapped = [
            (self.engine, "backward", "backward"),
            (self.engine.basic_optimizer, "step", "optimizer and average"),
            (self, "run", "step"),
        ]

        def timed(call: Callable[..., Any], into: list[tuple[Any, Any]]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                start = self.clock.mark()
                result = call(*args, **kwargs)
                into.append((start, self.clock.mark()))
                return result

            return run

        for owner, name, part in wrapped:
            setattr(owner, name, timed(getattr(owner, name), marks[part]))
        before = len(self.times.steps)
        yield
        for owner, name, _ in wrapped:
            delattr(owner, name)
        steps = len(marks["step"])
        micro_batches = self.config.batch(self.ranks.world_size).accumulation
        backwards = marks["backward"][micro_batches - 1 :: micro_batches]  # the last one of each step
        optimizer = sum(self.clock.seconds(*span) for span in marks["optimizer and average"])
        end = sum(self.clock.seconds(a[1], b[1]) for a, b in zip(backwards, marks["step"], strict=True))
        self.times.parts["optimizer and average"] = optimizer / max(1, steps)
        self.times.parts["whole end of step"] = end / max(1, steps)
        del self.times.steps[before:]

    def close(self) -> None:
        self.engine.destroy()
        del self.engine, self.teacher


class Reference:
    """A contender: the published code on the same images and masks."""

    def __init__(
        self, name: str, path: Path, config: Config, ranks: distributed.Ranks, sdpa: bool, compiled: bool
    ) -> None:
        self.name, self.config, self.ranks, self.times = name, config, ranks, Times()
        self.clock = Clock(ranks.device)
        self.code = Published(path, config, ranks.device, sdpa, compiled)
        self.ends: list[tuple[Any, Any]] = []  # per step: the span after the backward

    def run(self, step: int, batches: Batches) -> tuple[Any, Any, Any]:
        _, micro, batch = next(batches)
        device, masks = (
            self.ranks.device,
            masks_of(self.config, Place(step, micro, self.ranks.rank, self.ranks.world_size)),
        )
        context, target = ([*blocks.to(device)] for blocks in (masks.context, masks.target))
        pixels = as_floats(batch.images, self.config)
        start = self.clock.mark()
        loss, middle = self.code.step(pixels, context, target, NUMBERS, self.clock)
        end = self.clock.mark()
        self.ends.append((middle, end))
        return start, end, loss

    @contextlib.contextmanager
    def timing_parts(self) -> Iterator[None]:
        before, self.ends = len(self.times.steps), []
        yield
        ends = [self.clock.seconds(*span) for span in self.ends]
        self.times.parts["whole end of step"] = sum(ends) / max(1, len(ends))
        del self.times.steps[before:]

    def close(self) -> None:
        del self.code


Contender = Engine | Reference


def start(make: Callable[[], Contender], images: Synthetic, warmup: int, device: torch.device) -> Contender:
    """Creates a contender and warms it up. On a CPU its peak memory is measured here, over the first two steps."""

    def begin() -> Contender:
        contender = make()
        for step in range(2):
            contender.run(step, images.batches(step))
        return contender

    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    contender, peak = peak_bytes(begin, device)
    for step in range(2, warmup):
        contender.run(step, images.batches(step))
    contender.clock.drain()
    if device.type == "cuda":
        contender.times.resident = torch.cuda.memory_allocated() - before
    else:
        contender.times.peak = peak
    return contender


@contextlib.contextmanager
def counting(contender: Contender) -> Iterator[None]:
    """While open, records the contender's own peak memory on a GPU in its times."""
    on_gpu, before = contender.ranks.device.type == "cuda", 0
    contender.clock.drain()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - contender.times.resident
    yield
    contender.clock.drain()
    if on_gpu:
        contender.times.peak = max(contender.times.peak, torch.cuda.max_memory_allocated() - before)


def measure(contenders: list[Contender], images: Synthetic, first: int, steps: int, block: int, bar: tqdm) -> None:
    """Times `steps` steps of each contender, the same ones for all, in turns of `block` steps."""
    for round_ in range(0, steps, block):
        turn = contenders if round_ // block % 2 == 0 else contenders[::-1]
        steps_now = range(first + round_, first + min(steps, round_ + block))
        for contender in turn:
            spans, graphs = [], [graph_count()]
            with counting(contender):
                for step in steps_now:
                    spans.append(contender.run(step, images.batches(step))[:2])
                    graphs.append(graph_count())
                    bar.update()
            record(contender, steps_now, spans, graphs)


def record(contender: Contender, steps: range, spans: Iterable[tuple[Any, Any]], graphs: list[int]) -> None:
    """Adds steps to a contender's times, from marks before and after each, and how many graphs there were by then."""
    for step, span, (before, after) in zip(steps, spans, itertools.pairwise(graphs), strict=True):
        tokens = kept(contender.config, contender.ranks, step)
        contender.times.steps.append(Step(contender.clock.seconds(*span), tokens, after - before))


def kept(config: Config, ranks: distributed.Ranks, step: int) -> Kept:
    """Mean patches per image in a context, in a target and in the rows that the targets need, in this rank's step."""
    if not config.method.masked:
        return mean_tokens(config)
    found = []
    for micro in range(config.batch(ranks.world_size).accumulation):
        masks = masks_of(config, Place(step, micro, ranks.rank, ranks.world_size))
        contexts = config.mask.num_enc_masks * config.data.batch_size
        rows = target_rows(masks.target, config.grid**2)[2]
        found.append((masks.context.numel() / contexts, masks.target.shape[-1], rows))
    return Kept(*(statistics.mean(column) for column in zip(*found, strict=True)))


def host_waits(
    contender: Contender, images: Synthetic, first: int, steps: int = 5
) -> dict[str, dict[str, float]] | None:
    """What makes the host wait for the GPU, per step: the CUDA `calls` that the profiler sees and, independently, the
    `places` in the code that torch's sync debug mode reports. None on a CPU."""
    if contender.ranks.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    calls: dict[str, float] = {}
    places: dict[str, float] = {}
    with (
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for step in range(first, first + steps):
            with record_function("a whole step"):
                contender.run(step, images.batches(step))
        torch.cuda.set_sync_debug_mode("default")
    events = list(profiler.events())
    spans = [event.time_range for event in events if event.name == "a whole step" and event.device_type.name == "CPU"]
    for event in events:
        at = event.time_range.start
        if event.name in WAITS and any(span.start <= at <= span.end for span in spans):
            calls[event.name] = calls.get(event.name, 0) + 1 / steps
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = "/".join(Path(warning.filename).parts[-3:]) + f":{warning.lineno}"
            places[place] = places.get(place, 0) + 1 / steps
    return {"calls": calls, "places": places}
