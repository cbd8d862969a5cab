"""Takes a single step again after the run: which of its values are not finite, and which files they come from.

A step is a pure function of its number and the weights, so one that went wrong can be examined later: `--replay-step`
starts from an earlier checkpoint, takes the steps in between and then the step itself as training did, and watches it.
Nothing is written.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jepa.config.schema import Config
from jepa.data.loader import Loader
from jepa.methods.base import Method, Output
from jepa.ranks.distributed import Ranks
from jepa.state import checkpoint
from jepa.state.restore import CheckpointError, candidates, find_whole, on_first, refuse_change, shapes_of

from . import zero
from .schedules import Schedules, ScheduleTable
from .step import start_model, take_step


def replay(
    config: Config,
    ranks: Ranks,
    loader: Loader,
    step: int,
    which: str | None,
    accept_changes: bool,
    at: Callable[[int, str], None],
) -> None:
    """Prints what `step` does, starting from the checkpoint named by `which`, or by default from the newest intact one
    that is not of a later step. Every rank calls it. Raises ValueError for a step that the run does not have, and
    CheckpointError like `Saver.resume`."""
    if not 0 <= step < (steps := config.optimization.epochs * loader.steps_per_epoch):
        raise ValueError(f"--replay-step: given {step}; wanted one of the run's steps, 0 to {steps - 1}")
    paths = _paths(config, loader, step, which)
    path, state = find_whole(paths)
    model_engine, teacher = start_model(config, ranks.device)
    refuse_change(path, state, config, shapes_of(model_engine.module), loader.source.fingerprint, accept_changes)
    progress = checkpoint.load(path, state, model_engine)
    if teacher is not None and model_engine.basic_optimizer.state:
        teacher.refresh()
    head, first = f"step {step} with the weights in {path}, of step {progress.step}", min(progress.step, step)
    if progress.step > step:
        head += ": not the weights that the run had at this step, so the numbers differ"
    elif progress.step < step:
        head += f", advanced by {step - progress.step} steps"

    table = ScheduleTable(
        Schedules(config, loader.steps_per_epoch),
        progress.applied,
        step + 1 - first,
        zero.schedule_device(model_engine),
    )
    batches, findings = loader.batches(first, step + 1), Findings(model_engine.module)
    for number in range(first, step + 1):
        zero.schedule(model_engine, table.next())
        watch = findings if number == step else None
        done = take_step(
            config, ranks, model_engine, teacher, batches, number, whole=watch is not None, at=at, watch=watch
        )
        table.count(done.applied)
    findings.tell(head)


def _paths(config: Config, loader: Loader, step: int, which: str | None) -> list[Path]:
    """The checkpoints to try, in this order."""
    if which not in (None, "latest", "auto"):
        return [Path(which)]
    folder, tag = Path(config.logging.folder), config.logging.write_tag
    found = on_first(folder, lambda: candidates(folder, tag, loader.steps_per_epoch))
    paths = [path for of, path in found if of <= step]
    if not paths:
        raise CheckpointError(f"--replay-step: no checkpoint of step {step} or before in {folder}")
    return paths


class Findings:
    """Watches a step (jepa.train.step.Watch)."""

    def __init__(self, method: Method) -> None:
        self.names = ("total", *method.terms)
        self.losses: list[Tensor] = []
        self.bad: dict[str, list[str]] = {"losses": []}  # what is not finite: of this rank, and where
        self.norms: dict[str, float] = {}  # of the gradient, by parameter

    def micro_batch(self, files: list[str], output: Output) -> None:
        self.losses.append(torch.stack([output.loss.detach(), *output.terms]).double())
        for name, rows in output.features.items():
            fine = rows.isfinite().flatten(1).all(1).view(-1, len(files)).all(0).tolist()
            found = self.bad.setdefault(f"features {name!r} of", [])
            found += [file for file, is_fine in zip(files, fine, strict=True) if not is_fine]

    def gradients(self, model_engine: Any) -> None:
        for name, parameter in model_engine.module.named_parameters():
            gradient = zero.gradient(parameter)
            if gradient is not None:
                self.norms[name] = float(gradient.float().norm())

    def tell(self, head: str) -> None:
        """Prints the findings of all ranks on the first one."""
        terms = dict(zip(self.names, torch.stack(self.losses).mean(0).tolist(), strict=True))
        self.bad["losses"] = [name for name, value in terms.items() if not math.isfinite(value)]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (terms, self.bad))
        if dist.get_rank() != 0:
            return
        print(head)
        for rank, (terms, _) in enumerate(everyone):
            print(f"rank {rank}: " + "  ".join(f"{name} {value:.8g}" for name, value in terms.items()))
        modules: dict[str, list[float]] = {}
        for name, norm in self.norms.items():
            modules.setdefault(name.partition(".")[0], []).append(norm)
        parts = "  ".join(f"{name} {math.hypot(*norms):.6g}" for name, norms in modules.items())
        print(f"gradient norm {math.hypot(*self.norms.values()):.6g}: {parts}")
        lines = [f"rank {r}, {k} {', '.join(v)}" for r, (_, bad) in enumerate(everyone) for k, v in bad.items() if v]
        if broken := [name for name, norm in self.norms.items() if not math.isfinite(norm)]:
            lines.append(f"gradients of {', '.join(broken)}")
        print("\n".join(["not finite:", *lines]) if lines else "everything is finite", flush=True)
