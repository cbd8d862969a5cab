"""Steps that moved nothing because their loss or gradient was not finite.

The device decides whether a step is applied, and the host reads that some steps later (`Outcomes`), so that it never
waits for the device in between. A skipped step is logged with the ranks and files that made it so.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint import Progress
from .objective import Losses


class Diverged(RuntimeError):
    """No step is finite any more; the message says what to do."""


class Outcomes:
    """Whether steps were applied, of those that the host has not read yet and of the last ones in a row."""

    def __init__(self, progress: Progress, global_batch: int) -> None:
        self.progress, self.global_batch = progress, global_batch
        self.unread: list[tuple[int, Tensor, list[Losses], list[str]]] = []
        self.skipped_in_a_row = self.longest = 0  # up to now; the most at any time

    def add(self, step: int, applied: Tensor, losses: list[Losses], files: list[str]) -> None:
        """Notes a step: `applied` (bool, 0-d) and the losses of its micro-batches on the device, its images' files."""
        self.unread.append((step, applied, losses, files))

    def read(self, say: Callable[[str], None]) -> tuple[dict[int, dict[str, Any]], bool]:
        """Waits for the device and brings the progress up to date. Every rank calls it.

        Returns what is known of the skipped steps, by their numbers, and whether the last step was applied.
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
                say(f"step {step} skipped: {what} is not finite; --replay-step {step} looks at it alone")
        self.unread = []
        return skipped, applied[-1]

    def check(self, step: int, most: int, checkpoint: Path | None) -> None:
        """Raises Diverged where `most` steps in a row or more were skipped; `checkpoint`: the newest one before."""
        if self.longest >= most:
            raise Diverged(
                f"{self.longest} steps in a row had a gradient that is not finite; stopped at step {step}. "
                "Lower optimization.lr or set optimization.clip_grad, and "
                + (f"--resume: {checkpoint} is from before these steps" if checkpoint else "begin again")
            )


def not_finite(losses: list[Losses], files: list[str]) -> dict[str, Any]:
    """For the log of a skipped step: the ranks whose losses are not finite, and the files of their images.

    Where all losses are, the gradient alone is not, and the files are those of all ranks. Every rank calls it.
    """
    mine = all(math.isfinite(value) for micro in losses for value in torch.stack(micro).tolist())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, files))
    bad = [rank for rank, (fine, _) in enumerate(everyone) if not fine]
    whose = bad or range(len(everyone))
    return {"skipped": True, "bad_ranks": bad, "files": [name for rank in whose for name in everyone[rank][1]]}
