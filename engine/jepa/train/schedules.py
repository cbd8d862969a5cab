"""Learning rate, weight decay and teacher momentum as functions of the step, so that resuming needs no fast-forward.

As in the published I-JEPA code (arXiv 2301.08243), the first step uses the second point of the learning rate and
weight decay curves, but the first point of the momentum curve.
"""

import math

import torch
from torch import Tensor

from jepa.config.schema import Config


class Schedules:
    """The curves of a run with `steps_per_epoch` optimizer steps per epoch. Steps count from 0.

    The curves span ipe_scale x epochs and then stay at the final value. `engine.max_steps` stops a run early without
    shortening them.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch is {steps_per_epoch}; it must be at least 1: fewer images than a step?")
        self._given = config.optimization
        self._length = self._given.ipe_scale * self._given.epochs * steps_per_epoch
        self._warmup = int(self._given.warmup * steps_per_epoch)

    def lr(self, step: int) -> float:
        """Linear from start_lr to lr over the warm-up, then half a cosine to final_lr."""
        o, i = self._given, step + 1
        if i < self._warmup:
            return o.start_lr + (o.lr - o.start_lr) * i / self._warmup
        return _cosine(o.lr, o.final_lr, i - self._warmup, int(self._length) - self._warmup)

    def weight_decay(self, step: int) -> float:
        """Half a cosine from weight_decay to final_weight_decay."""
        return _cosine(self._given.weight_decay, self._given.final_weight_decay, step + 1, int(self._length))

    def momentum(self, step: int) -> float:
        """Linear from ema[0] to ema[1]."""
        first, last = self._given.ema
        return first + (last - first) * min(1.0, step / self._length)


class ScheduleTable:
    """(learning rate, weight decay, momentum) of each step in turn.

    They depend on how many steps were applied, which only the device knows in time if the optimizer skips steps by
    itself. So the curves are a table on the device, which also does the counting: the host never waits for it.

    `applied`: steps applied before the run started; `steps`: the most that are still to be taken.
    """

    def __init__(self, schedules: Schedules, applied: int, steps: int, device: torch.device) -> None:
        rows = [
            (schedules.lr(step), schedules.weight_decay(step), schedules.momentum(step))
            for step in range(applied, applied + max(1, steps))
        ]
        self.table_S3 = torch.tensor(rows, dtype=torch.float64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)

    def next(self) -> Tensor:
        """The three values of the step about to be taken, float64 [3] on the device."""
        return self.table_S3.index_select(0, self.place)[0]

    def count(self, applied: Tensor) -> None:
        """Counts a step that was taken; `applied`, 0-d bool, says whether it updated the weights."""
        self.place += applied.to(self.place.device)


def _cosine(first: float, last: float, step: int, length: int) -> float:
    progress = min(1.0, step / max(1, length))
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))
