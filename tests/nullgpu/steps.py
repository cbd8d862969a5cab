"""Takes real training steps of a config on the null GPU, and says what each asked of it.

    tests/nullgpu/run PYTHON tests/nullgpu/steps.py CONFIG [section.key=value ...] [--steps 0-7] [--out FOLDER]

CONFIG is a file of engine/configs. Every rank prints a line for each step, and the failures; `--out` gets them as JSON.
"""

import argparse
import gc
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import nullgpu
import torch
import torch._dynamo
import torch._inductor.config
from runners import NUMBERS, Synthetic
from torch._dynamo.utils import counters

from jepa.config.file import load_config
from jepa.config.schema import Config
from jepa.ranks import distributed
from jepa.train import zero
from jepa.train.step import start_model, take_step

CONFIGS = Path(__file__).resolve().parents[2] / "engine/configs"
WAITS = ("stream_sync", "device_sync", "event_sync", "memcpy_sync", "pageable")
SETTLED = 2  # steps: everything is compiled in the first, and allocated by the second
GIVEN = ("data.root_path=images", "logging.folder=runs", "engine.device=cuda", "engine.global_batch_size=null")


# DeepSpeed's ZeRO 3 formats its parameters, and numbers that no kernel wrote may take any time and memory to print.
torch._tensor_str._str = lambda tensor, **given: f"tensor of shape {list(tensor.shape)}"


@dataclass(frozen=True)
class Step:
    """`graphs`: compiled in this step. `calls`: counters of the null GPU. Bytes: the peaks of torch's allocator."""

    step: int
    kept: tuple[int, int]
    graphs: int
    calls: dict[str, int]
    allocated: int
    reserved: int

    @property
    def waits(self) -> dict[str, int]:
        """What made the host wait, or would, on a GPU."""
        return {name: self.calls[name] for name in WAITS if name in self.calls}


def load(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / name, [*GIVEN, *overrides])


def ranks_agree() -> None:
    """DeepSpeed's ZeRO 3 compares numbers across ranks. Here they do not hear each other, so none could be equal."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    coordinator.assert_ints_same_as_other_ranks = lambda ints: None


def take(config: Config, ranks: distributed.Ranks, steps: Iterable[int]) -> list[Step]:
    """The given steps of a run, whose masks depend on their numbers, one after another."""
    forget()
    ranks_agree()
    model_engine, teacher = start_model(config, ranks.device)
    images = Synthetic(config, ranks.device, config.batch(ranks.world_size).accumulation)
    numbers = torch.tensor(NUMBERS, dtype=torch.float64, device=zero.schedule_device(model_engine))
    taken = []
    for step in steps:
        before, graphs = nullgpu.counts(), counters["stats"]["unique_graphs"]
        torch.cuda.reset_peak_memory_stats()
        zero.schedule(model_engine, numbers)
        done = take_step(config, ranks, model_engine, teacher, images.batches(step), step)
        new = counters["stats"]["unique_graphs"] - graphs
        calls, memory = nullgpu.since(before), (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        taken.append(Step(step, done.kept, new, calls, *memory))
    model_engine.destroy()
    return taken


def forget() -> None:
    """Frees and resets what an earlier run in this process left behind."""
    torch._dynamo.reset()
    torch._inductor.config.triton.autotune_pointwise = False  # one kernel to compile in place of many to time
    counters.clear()
    gc.collect()
    torch.cuda.empty_cache()


def failures(taken: list[Step], waits: Counter[str] | None = None) -> list[str]:
    """What a run must not do: break a graph, or in a settled step compile one or make the host wait more often than
    `waits` allows (None: as often as it likes)."""
    found = [f"graph break: {reason} ({count} x)" for reason, count in counters["graph_break"].items()]
    for step in taken[SETTLED:]:
        if step.graphs:
            found.append(f"step {step.step}: {step.graphs} graph(s) compiled again, for {step.kept} tokens")
        if waits is not None and (over := Counter(step.waits) - waits):
            found.append(f"step {step.step}: waits for the GPU: {dict(over)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", default="0-7", help="first and last, or a list: 0,5,9 (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    first, to, last = args.steps.partition("-")
    steps = range(int(first), int(last) + 1) if to else [int(step) for step in args.steps.split(",")]
    config = load(args.config, *args.overrides)
    ranks = distributed.start("cuda", deterministic=config.engine.deterministic)
    taken = take(config, ranks, steps)
    for step in taken:
        memory = f"{step.allocated / 2**30:.2f} GiB allocated, {step.reserved / 2**30:.2f} reserved"
        print(f"rank {ranks.rank} step {step.step}: {step.kept} tokens, {step.graphs} graphs, {memory}, {step.calls}")
    found = failures(taken, Counter())
    print("\n".join(found) or "no graph break; settled steps compile nothing and do not wait", flush=True)
    if args.out:
        report = {"steps": [asdict(step) for step in taken], "failures": found}
        (args.out / f"rank{ranks.rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
