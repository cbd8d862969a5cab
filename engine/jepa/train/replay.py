"""Replays a single step after the run: which of its values are not finite, and which files they come from.

A step is a pure function of its number and the weights, so one that went wrong can be examined later: `--replay-step`
takes the images, crops and masks of the step, and the weights of an earlier checkpoint, from which engine/train.py
repeats the steps in between. Nothing is written.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jepa.config.schema import Config
from jepa.data.loader import Loader
from jepa.methods.objective import JepaModel, Losses, poison
from jepa.model.fp8 import Encoder
from jepa.model.layout import masks_of, tokens
from jepa.model.vit import build_encoder
from jepa.ranks.distributed import Ranks
from jepa.state.restore import CheckpointError, candidates, find_whole, on_first, refuse_change, shapes_of


def start_of_replay(
    config: Config, loader: Loader, step: int, which: str | None, accept_changes: bool
) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to replay step `step` from, and its state: the one named, or the newest intact one that is not of
    a later step. Every rank calls it. Raises CheckpointError like `Saver.resume`."""
    folder, tag = Path(config.logging.folder), config.logging.write_tag
    if which:
        paths = [Path(which)]
    else:
        found = on_first(folder, lambda: candidates(folder, tag, loader.steps_per_epoch))
        paths = [path for at, path in found if at <= step]
    if not paths:
        raise CheckpointError(f"--replay-step: no checkpoint of step {step} or before in {folder}")
    path, state = find_whole(paths)
    refuse_change(path, state, config, shapes_of(JepaModel(config)), loader.source.fingerprint, accept_changes)
    return path, state


def replay(
    config: Config,
    ranks: Ranks,
    loader: Loader,
    step: int,
    read: Callable[[str, str, list[int]], Tensor],
    averaged: bool,
    head: str,
) -> None:
    """Runs forward and backward of `step`, prints what it finds under `head`, and saves nothing.

    `read` returns a kind ("weight", "ema") of a parameter by name and shape; `averaged`: whether there is an EMA yet.
    Every rank calls it and holds the whole model: nothing is sharded.
    """
    model, teacher = JepaModel(config), build_encoder(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(read("weight", name, list(weight.shape)))
        for name, weight in teacher.named_parameters():
            weight.copy_(read("ema" if averaged else "weight", f"encoder.{name}", list(weight.shape)))
    model.to(ranks.device)
    for weight in model.parameters():  # like DeepSpeed, which does not cast buffers
        weight.data = weight.data.to(config.dtype)
    teacher.to(ranks.device, config.dtype)
    targets: Any = teacher
    if config.engine.target_precision == "fp8":
        targets = Encoder(teacher)
        targets.refresh()

    found: dict[str, list[str]] = {"losses": [], "target features of": [], "predictions for": [], "gradients of": []}
    losses = []
    for micro in range(loader.accumulation):
        batch = loader.batch(step, micro)
        images, files = batch.images, batch.files
        masks = masks_of(config, ranks, step, micro)
        rows = tokens(masks, config, ranks.device)
        with torch.no_grad():
            features = targets(images, rows=rows.teacher)
        output = model(images, rows.context, rows.target_MBK, features, rows.places_MBK)
        poison(output.losses.total / loader.accumulation).backward()
        losses.append(torch.stack(output.losses).detach().double())
        predicted = output.predicted_RD.view(-1, len(files), output.predicted_RD.shape[-1]).transpose(0, 1)
        if not features.isfinite().all():  # of whole images, one per file, whichever rows the step uses
            with torch.no_grad():
                found["target features of"] += _not_finite(files, targets(images))
        found["predictions for"] += _not_finite(files, predicted)
    terms = dict(zip(Losses._fields, torch.stack(losses).mean(0).tolist(), strict=True))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found["losses"] = [name for name, value in terms.items() if not math.isfinite(value)]
    found["gradients of"] = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    _tell(head, terms, found, gradients)


def _not_finite(files: list[str], rows: Tensor) -> list[str]:
    return [name for name, row in zip(files, rows, strict=True) if not row.isfinite().all()]


def _tell(head: str, terms: dict[str, float], found: dict[str, list[str]], gradients: dict[str, Tensor]) -> None:
    """Prints the findings on the first rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (terms, found))
    norms = {name: float(norm) for name, norm in _norms(gradients)}
    if dist.get_rank() != 0:
        return
    print(head)
    for rank, (terms, _) in enumerate(everyone):
        print(f"rank {rank}: " + "  ".join(f"{name} {value:.8g}" for name, value in terms.items()))
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    print(f"gradient norm {whole:.6g}: " + "  ".join(f"{name} {norm:.6g}" for name, norm in norms.items()))
    lines = [f"rank {r}, {k} {', '.join(v)}" for r, (_, found) in enumerate(everyone) for k, v in found.items() if v]
    print("\n".join(["not finite:", *lines]) if lines else "everything is finite", flush=True)


def _norms(gradients: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The norm of the rank-averaged gradient, by top-level module."""
    for module in dict.fromkeys(name.partition(".")[0] for name in gradients):
        squares = []
        for name, gradient in gradients.items():
            if name.partition(".")[0] == module:
                mean = gradient.float()
                dist.all_reduce(mean)
                squares.append((mean / dist.get_world_size()).square().sum())
        yield module, torch.stack(squares).sum().sqrt()
