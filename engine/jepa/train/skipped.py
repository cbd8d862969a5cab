"""Steps that were skipped because their loss or gradient was not finite.

The device decides whether a step is applied, and the host reads the decision some steps later (`SkippedSteps`), so that
it does not synchronize in between. A skipped step is logged with the ranks and files involved.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jepa.state.checkpoint import Progress


class Diverged(RuntimeError):
    """Steps are no longer finite; the message says what to do."""


class SkippedSteps:
    """Tracks which steps were applied: those the host has not read yet, and how many in a row were skipped."""

    def __init__(self, progress: Progress, global_batch: int) -> None:
        self.progress, self.global_batch = progress, global_batch
        self.unread: list[tuple[int, Tensor, list[Tensor], list[str]]] = []
        self.skipped_in_a_row = self.longest = 0  # currently; at most so far

    def add(self, step: int, applied: Tensor, losses: list[Tensor], files: list[str]) -> None:
        """Records a step: `applied` (bool, 0-d) and its micro-batches' losses, on the device, and its image files."""
        self.unread.append((step, applied, losses, files))

    def read(self, say: Callable[[str], None]) -> tuple[dict[int, dict[str, Any]], bool]:
        """Waits for the device and updates the progress. Every rank calls it.

        Returns the details of the skipped steps, by step number, and whether the last step was applied.
        """
        skipped: dict[int, dict[str, Any]] = {}
        applied = torch.stack([applied for _, applied, _, _ in self.unread]).tolist()
        for (step, _, losses, files), moved in zip(self.unread, applied, strict=True):
            self.progress.count(moved, self.global_batch)
            self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
            self.longest = max(self.longest, self.skipped_in_a_row)
            if not moved:
                found = skipped[step] = not_finite(losses, files)
                what = f"the loss of rank(s) {found['bad_ranks']}" if found["bad_ranks"] else "its gradient"
                say(f"step {step} skipped: {what} is not finite; --replay-step {step} examines it")
        self.unread = []
        return skipped, applied[-1]

    def check(self, step: int, most: int, checkpoint: Path | None) -> None:
        """Raises Diverged if `most` or more steps in a row were skipped; `checkpoint`: the newest one before them."""
        if self.longest >= most:
            raise Diverged(
                f"{self.longest} steps in a row had a non-finite gradient; stopped at step {step}. "
                "Lower optimization.lr or set optimization.clip_grad, and "
                + (f"--resume: {checkpoint} is from before these steps" if checkpoint else "start again")
            )


def not_finite(losses: list[Tensor], files: list[str]) -> dict[str, Any]:
    """For the log of a skipped step: the ranks whose losses are not finite, and the files of their images.

    If all losses are finite, only the gradient is not, and the files are those of all ranks. Every rank calls it.
    """
    mine = all(math.isfinite(value) for micro in losses for value in micro.tolist())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, files))
    bad = [rank for rank, (fine, _) in enumerate(everyone) if not fine]
    whose = bad or range(len(everyone))
    return {"skipped": True, "bad_ranks": bad, "files": [name for rank in whose for name in everyone[rank][1]]}
