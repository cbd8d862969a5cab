"""Exponential moving average of many tensors in one launch: t <- momentum * t + (1 - momentum) * s.

Written t + (1 - momentum) * (s - t): the difference is scaled down before it is added, so one rounding is left, that
of the result. Any mixture of float32, bfloat16 and float16 (float32 inside). Floor: read t and s, write t.
The CPU kernel is in csrc/ema.cpp.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import BLOCK, aligned, tables

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@torch.no_grad()
def ema_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor) -> None:
    """Moves every target towards its source, in place.

    targets, sources: as many of each, pairwise of one shape, float32, bfloat16 or float16 in any mixture, all on one
        device. Targets may have any dense layout (channels_last included) and must not share memory.
    momentum: a number in [0, 1], or a 0-d tensor that is read on the device: a CUDA graph follows it, and nothing
        waits. Prefer float64 for it: in float32, 1 - .9999 is off by 6e-4 of itself.

    A bfloat16 target stands still once its steps are below half of its last bit (from a momentum of about .996):
    keep averages in float32.
    """
    targets, sources = list(targets), list(sources)
    if not isinstance(momentum, Tensor) and not 0 <= momentum <= 1:
        raise ValueError(f"ema_: momentum must lie in [0, 1], got {momentum}")
    if isinstance(momentum, Tensor) and momentum.dim() != 0:
        raise ValueError(f"ema_: momentum must be a number or a 0-d tensor, got shape {tuple(momentum.shape)}")
    if len(targets) != len(sources):
        raise ValueError(f"ema_: one source per target, got {len(targets)} targets and {len(sources)} sources")
    if not targets:
        return
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        _check(i, target, source, targets[0].device)
        if source.stride() != target.stride():
            sources[i] = torch.empty_like(target, dtype=source.dtype).copy_(source)
    weight = 1 - momentum
    weight = weight.float() if isinstance(weight, Tensor) else torch.tensor(weight, dtype=torch.float32)
    torch.ops.jepa_kernels.ema_(targets, sources, weight)


def _check(i: int, target: Tensor, source: Tensor, device: torch.device) -> None:
    if target.shape != source.shape:
        raise ValueError(
            f"ema_: sources[{i}] must have the shape of targets[{i}], {tuple(target.shape)}, got {tuple(source.shape)}"
        )
    if target.dtype not in _CODES or source.dtype not in _CODES:
        raise ValueError(
            f"ema_: float32, bfloat16 or float16 wanted, got targets[{i}] {target.dtype} and sources[{i}] {source.dtype}"
        )
    if target.device != device or source.device != device:
        raise ValueError(
            f"ema_: all tensors must be on {device} as targets[0] is, got targets[{i}] on {target.device} and "
            f"sources[{i}] on {source.device}"
        )
    if not target.is_contiguous() and torch.empty_like(target, device="meta").stride() != target.stride():
        raise ValueError(
            f"ema_: targets[{i}] must fill its memory without gaps or overlaps, got shape {tuple(target.shape)} with "
            f"strides {target.stride()}: average a contiguous() copy and copy_() it back"
        )


# --- reference: the definition, the fallback for devices without a kernel, the oracle of the tests


def ema_ref(targets: list[Tensor], sources: list[Tensor], weight: Tensor) -> None:
    for target, source in zip(targets, sources, strict=True):
        t = target.float()
        target.copy_(t + weight * (source.float() - t))


# --- registration; csrc adds the CPU

torch.library.define("jepa_kernels::ema_", "(Tensor(a!)[] targets, Tensor[] sources, Tensor weight) -> ()")
torch.library.impl("jepa_kernels::ema_", "default", ema_ref)
torch.library.register_fake("jepa_kernels::ema_", lambda targets, sources, weight: None)
