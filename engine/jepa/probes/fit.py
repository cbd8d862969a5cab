"""The loop that trains a model for a task, on all ranks, and goes on from where it stopped.

What a step reads, how that is augmented, and what the step draws at random are functions of (seed, step): a run that is
started again ends as if it had never stopped, on one CPU rank bit for bit.

Batch norm is of all ranks' images on GPUs. On CPUs it is of each rank's own, because torch has none of several; the
first rank's statistics are those that are saved and judged.
"""

import argparse
import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from jepa.ranks.distributed import require_alike
from jepa.ranks.stop import STOPPED, StopRequest, minutes_argument

from .job import Job

# Options that do not change what is trained; the weights are named by the subject's key.
ASIDE = {
    "protocol",
    "weights",
    "config",
    "part",
    "out",
    "only",
    "device",
    "data",
    "workers",
    "save_every",
    "max_minutes",
    "checkpointing",
}

POSITIVE = ("lr", "epochs", "scale")
# Of the other numbers, by their options' names: the least, and the most.
RANGES = {
    "batch": (1, math.inf),
    "steps": (1, math.inf),
    "size": (1, math.inf),
    "channels": (1, math.inf),
    "classes": (1, 255),  # in annotations of 8 bits, where 0 is none
    "warmup": (0, math.inf),
    "weight_decay": (0, math.inf),
    "drop_path": (0, 0.99),
    "seed": (0, math.inf),
    "workers": (0, math.inf),
    "save_every": (1, math.inf),
}


def arguments(parser: argparse.ArgumentParser, weight_decay: float, warmup: int) -> None:
    """Options of the loop; defaults are the protocol's, which calls `check` and `warmup` for what they mean."""
    parser.add_argument("--batch", type=int, default=16, help="images a step, of all ranks together (default: 16)")
    parser.add_argument("--weight-decay", type=float, default=weight_decay, help="of matrices (default: %(default)s)")
    parser.add_argument(
        "--warmup", type=int, metavar="STEPS", help=f"default: {warmup}, or a tenth of all if these are fewer"
    )
    parser.add_argument("--drop-path", type=float, default=0.1, help="of the last block (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute blocks in the backward: less memory, one more forward"
    )
    parser.add_argument("--workers", type=int, default=4, help="processes a rank that read images (default: 4)")
    parser.add_argument(
        "--save-every",
        type=int,
        default=1000,
        metavar="STEPS",
        help="between states of unfinished training (default: 1000)",
    )
    minutes_argument(parser)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a number that means nothing."""
    for name, given in vars(args).items():
        flag = "--" + name.replace("_", "-")
        for value in given if isinstance(given, list) else [given]:
            if value is None:
                continue
            if name in POSITIVE and not 0 < value < math.inf:
                raise ValueError(f"{flag} {value:g}: wanted more than 0")
            low, high = RANGES.get(name, (-math.inf, math.inf))
            if name in RANGES and not (low <= value <= high and math.isfinite(value)):
                raise ValueError(
                    f"{flag} {value:g}: wanted {low:g}" + (f" to {high:g}" if high < math.inf else " or more")
                )


def warmup(given: int | None, usual: int, steps: int) -> int:
    """The steps of warm-up of so many in all. Raises ValueError if `given` leaves none to train at the full rate."""
    if given is not None and given >= steps:
        raise ValueError(f"--warmup {given}: wanted fewer than the {steps} steps of the training")
    return min(usual, steps // 10) if given is None else given


class Samples(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Any: ...


def fit(
    job: Job,
    path: Path,
    name: str,
    model: nn.Module,
    data: Samples,
    loss: Callable[[nn.Module, list[Any]], Tensor],
    curve: Callable[[float], float],
    args: argparse.Namespace,
    files: str,
    stop: StopRequest | None = None,
) -> None:
    """Trains the parameters of `model` that require gradients by AdamW, for args.steps steps of args.batch samples.

    `data[i]` is sample i, augmented with torch's random numbers. `loss(model, samples)` is the mean over a rank's
    samples. `curve`: the learning rate after the warm-up, as a factor of args.lr, by the fraction of the training that
    is done. `path` holds the state, also of finished training: another call does nothing. `name`: for the progress.
    `files`: the fingerprint of those that `data` reads. Raises ValueError if the batch cannot be shared, the loss is
    not finite, or `path` holds a run of other settings or files; SystemExit(75), after saving, if `stop` asks for it.
    """
    ranks = job.ranks
    if args.batch % ranks.world_size:
        raise ValueError(f"--batch: {args.batch} images cannot be shared equally by {ranks.world_size} ranks")
    settings = {key: value for key, value in vars(args).items() if key not in ASIDE}
    settings |= {"images": len(data), "files": files}
    model.to(ranks.device)
    optimizer = torch.optim.AdamW(_groups(model, args.weight_decay), lr=args.lr)
    job.first_only(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    first = _restore(path, settings, model, optimizer)
    require_alike(ranks, f"step {first}", f"all of them must see {path.parent}")
    if first == args.steps:
        return
    shared = _share(model, ranks.device) if ranks.world_size > 1 else model
    shared.train()
    if shared is not model and ranks.device.type == "cpu" and any(isinstance(m, _BatchNorm) for m in model.modules()):
        job.say(f"{name}: batch norm is of each rank's images; the first rank's statistics are saved and judged")
    each = args.batch // ranks.world_size
    starts = [step * args.batch + ranks.rank * each for step in range(first, args.steps)]
    batches = stream(Shuffled(data, args.seed), [range(start, start + each) for start in starts], args.workers)
    report, begun = max(1, min(50, args.steps // 20)), time.monotonic()
    for step, samples in enumerate(batches, first):
        if stop:
            stop.ask()
        torch.manual_seed(_mixed(args.seed, step, ranks.rank))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup)) * curve(step / args.steps)
        value = loss(shared, samples)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        done = step + 1
        if done % report == 0 or done == args.steps:
            mean = float(np.mean(job.gather(value.item())))
            if not np.isfinite(mean):
                raise ValueError(
                    f"{name}: the loss is {mean} after {done} steps; a lower --lr or more --warmup may help"
                )
            pace = (time.monotonic() - begun) / (done - first)
            left = timedelta(seconds=round(pace * (args.steps - done)))
            speed = f"{args.batch / pace:.1f} images/s, {left} left"
            job.say(f"{name}: step {done} of {args.steps}, loss {mean:.4f}, {speed}")
        stopped = stop is not None and stop.agreed() and done < args.steps
        if done % args.save_every == 0 or done == args.steps or stopped:
            job.first_only(lambda: _save(path, settings, done, model, optimizer))  # noqa: B023 - called at once
        if stopped:
            job.say(f"{name}: stopped after step {done} of {args.steps}; the same command goes on")
            raise SystemExit(STOPPED)
    if ranks.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def stream(data: Any, batches: Sequence[Sequence[int]], workers: int) -> Iterator[list[Any]]:
    """The samples of each batch in turn, read ahead by processes. What reading one raises is raised here, as it was."""
    for samples in DataLoader(_Caught(data), batch_sampler=batches, num_workers=workers, collate_fn=list):  # type: ignore[arg-type]
        for sample in samples:
            if isinstance(sample, Exception):
                raise sample
        yield samples


def shared_out(
    job: Job, name: str, data: Any, keys: Sequence[int], workers: int, stop: StopRequest | None = None
) -> Iterator[tuple[int, Any]]:
    """This rank's share of `keys`, each with its sample `data[key]`. Ranks go through their shares side by side.

    Raises SystemExit(75) on all of them if `stop` asks for it.
    """
    mine = keys[job.ranks.rank :: job.ranks.world_size]
    samples = stream(data, [[key] for key in mine], workers)
    for place in range(-(-len(keys) // job.ranks.world_size)):
        if stop:
            stop.ask()
        if place < len(mine):
            yield mine[place], next(samples)[0]
        if stop and stop.agreed():
            job.say(f"{name}: stopped in validation; the same command goes on")
            raise SystemExit(STOPPED)
        if (place + 1) % 100 == 0:
            job.say(f"{name}: {place + 1} of {len(mine)} validation images")


class _Caught(Dataset):
    """Errors as samples: DataLoader would raise them with a page of its own."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, i: int) -> Any:
        try:
            return self.data[i]
        except (ValueError, OSError) as error:
            return error


class Shuffled(Dataset):
    """Sample n of an endless row of passes over `data`, each in its own order; a function of (seed, n)."""

    def __init__(self, data: Samples, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, n: int) -> Any:
        turn, place = divmod(n, len(self.data))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mixed(self.seed, n))
            return self.data[_order(self.seed, turn, len(self.data))[place]]


@lru_cache(2)  # that of the pass before, whose last batch ends in this one, too
def _order(seed: int, turn: int, total: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(total)


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _share(model: nn.Module, device: torch.device) -> nn.Module:
    if device.type != "cuda":  # torch has no synchronised batch norm for CPUs
        return DistributedDataParallel(model)
    return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model), device_ids=[device.index])


def _trained(model: nn.Module) -> dict[str, Tensor]:
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def _save(path: Path, settings: dict[str, Any], step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    part = path.with_name(f".{path.name}.partial")
    state = {"settings": settings, "step": step, "model": _trained(model), "optimizer": optimizer.state_dict()}
    torch.save(state, part)
    part.replace(path)


def _restore(path: Path, settings: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The number of steps that were done, 0 without a file."""
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}); delete it to start over") from error
    if state["settings"] != settings:
        known = state["settings"]
        other = [f"{key} {known.get(key)}, now {value}" for key, value in settings.items() if known.get(key) != value]
        raise ValueError(f"{path} is of other settings ({'; '.join(other)}); delete it, or choose another --out")
    model.load_state_dict(model.state_dict() | state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
