"""Starts a new run from trained weights (`meta.init_from`) in any format that jepa.state.foreign opens.

The encoder starts from the file's encoder, the target encoder (the average in the optimizer's state) from the file's
target encoder; a file with one of the two serves for both. The predictor is taken if there is one. All else is fresh:
projector, moments, schedules, step 0.

Only the first rank reads the file, one tensor at a time, and broadcasts it, so all ranks start from the same weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jepa.config.schema import Config

from .foreign import Initial, open_initial
from .interop import ENCODERS, PARTS
from .partitions import Flat, Fragment, flats, refresh_training_weights
from .restore import CheckpointError, shapes_of, together


def start_from(config: Config, model_engine: Any) -> None:
    """Gives a new run's DeepSpeed engine the weights in `meta.init_from`, and its optimizer the average and moments of
    zero. Every rank calls it, and then refreshes the teacher. Raises CheckpointError on all ranks, like `open_initial`.
    """
    path, first, model = Path(config.meta.init_from or ""), dist.get_rank() == 0, shapes_of(model_engine.module)
    parts = PARTS if "predictor.predictor_embed.weight" in model else ENCODERS
    opened: list[Initial] = []  # on the first rank

    def names() -> dict[str, list[str]]:
        if first:
            opened.append(open_initial(path, config, parts))
        return {part: list(tensors) for initial in opened for part, tensors in initial.parts.items()}

    try:
        found = together(names)[0]
    except OSError as error:
        raise CheckpointError(f"meta.init_from: {error}") from error

    mine, state = flats(model_engine), model_engine.basic_optimizer.state
    places: dict[str, list[tuple[Flat, Fragment]]] = {}
    for flat in mine:
        for fragment in flat.fragments:
            places.setdefault(fragment.name, []).append((flat, fragment))

    def take(part: str, module: str, target: Callable[[Flat], Tensor]) -> None:
        for name in found[part]:
            parameter = f"{module}.{name}"
            values = torch.empty(model[parameter], dtype=torch.float32, device=mine[0].weight.device)
            if first:
                values.copy_(opened[0].parts[part][name].read())
            dist.broadcast(values, 0)
            for flat, fragment in places.get(parameter, []):
                line = target(flat).view(-1)[fragment.offset : fragment.offset + fragment.length]
                line.copy_(values.view(-1)[fragment.start : fragment.start + fragment.length])

    with torch.no_grad():
        take("encoder" if "encoder" in found else "target_encoder", "encoder", lambda flat: flat.weight)
        if "predictor" in found:
            take("predictor", "predictor", lambda flat: flat.weight)
        for flat in mine:
            moments = {kind: torch.zeros_like(flat.weight) for kind in ("exp_avg", "exp_avg_sq")}
            state[flat.weight] = {"step": torch.zeros((), device=flat.weight.device), **moments}
            if flat.group["ema"]:
                state[flat.weight]["ema"] = flat.weight.detach().clone()
        if found.keys() >= set(ENCODERS) and any(flat.group["ema"] for flat in mine):
            take("target_encoder", "encoder", lambda flat: state[flat.weight]["ema"])
    refresh_training_weights(model_engine)
    if first:
        print(f"starting from {path}, {_summary(opened[0], config, model)}", flush=True)


def _summary(initial: Initial, config: Config, model: dict[str, list[int]]) -> str:
    """What is from where, for the log."""
    both, taken = initial.parts.keys() >= set(ENCODERS), {"encoder", *initial.parts}
    lines = [f"{initial.kind}: encoder and target encoder {'each from its own' if both else 'from its only encoder'}"]
    lines += ["predictor from its predictor"] if "predictor" in taken else []
    fresh = sorted({name.partition(".")[0] for name in model} - taken)
    lines += [f"fresh {', '.join(fresh)}"] if fresh else []
    if initial.side not in (None, config.grid):
        here, there = (f"{side} x {side}" for side in (config.grid, initial.side))
        lines.append(f"positions computed for {here} patches, it was trained on {there}")
    if unread := initial.unread:
        lines.append(f"not read: {', '.join(name[:80] for name in unread[:4])}" + (" ..." if len(unread) > 4 else ""))
    return "; ".join(lines)
