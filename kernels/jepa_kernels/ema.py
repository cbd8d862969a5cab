"""Exponential moving average of many tensors in one launch: t <- momentum * t + (1 - momentum) * s.

Computed like torch.lerp, t + (1 - momentum) * (s - t): the difference is scaled down before it is added, so only the
final rounding matters. Any mix of float32, bfloat16 and float16, computed in float32. Pairs with float64, which are
rare, go through torch.lerp in float64, one at a time.
Minimum traffic: read t and s, write t. The CPU kernel is in csrc/ema.cpp.
"""

from collections.abc import Iterable
from itertools import compress

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import BLOCK, CACHES, lerp, pointer, tables

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NARROW = set(_CODES)


@torch.no_grad()
def ema_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor) -> None:
    """Moves every target towards its source, in place.

    A bfloat16 target changes only where the update exceeds half of its last bit: from a momentum of about .996, most of
    its values never change. Keep it in float32.

    Args:
        targets, sources: as many of each, with pairwise equal shapes, all on one device; float64, float32, bfloat16 or
            float16 in any mix. Targets may have any dense layout (channels_last, transposed) and must not share memory
            with each other or with another target's source.
        momentum: in [0, 1]. A 0-d tensor on the device is read there, without synchronisation, and a CUDA graph uses
            its current value. Best in float64: rounding .9999 to float32 changes 1 - momentum by 2e-4, relatively.

    Raises:
        ValueError: for any other argument, before anything is written. (Targets that overlap partially are not
            detected, and a momentum on a GPU is not read back.)
    """
    targets, sources = list(targets), list(sources)
    if len(targets) != len(sources):
        raise ValueError(f"ema_: every target needs one source, got {len(targets)} targets, {len(sources)} sources")
    if not targets:
        return
    if not torch.compiler.is_compiling() and len({t.data_ptr() or id(t) for t in targets}) < len(targets):
        raise ValueError("ema_: targets must not share memory, got two that do")
    device = targets[0].device
    double: list[bool] = []
    if not _plain(targets, sources, device):
        for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
            _check(i, target, source, device)
            if source.stride() != target.stride():
                sources[i] = torch.empty_like(target, dtype=source.dtype).copy_(source)
            double.append(torch.float64 in (target.dtype, source.dtype))
    weight = _weight(momentum, device)
    for target, source in compress(zip(targets, sources, strict=True), double):
        # A Python number is a kernel argument; a CPU tensor would need a synchronous copy.
        number = weight.is_cpu and type(weight) is Tensor and not torch.compiler.is_compiling()
        share = weight.item() if number else weight.double().to(device)
        target.copy_(torch.lerp(target.double(), source.double(), share))
    if not any(double):
        torch.ops.jepa_kernels.ema_(targets, sources, weight.float())
    elif not all(double):
        narrow = [[x for x, wide in zip(tensors, double, strict=True) if not wide] for tensors in (targets, sources)]
        torch.ops.jepa_kernels.ema_(*narrow, weight.float())
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in targets if not t.is_inference()])


def _plain(targets: list[Tensor], sources: list[Tensor], device: torch.device) -> bool:
    """Whether this is the common case. Checks whole lists: checking pair by pair could cost a fifth of the pass."""
    return (
        {t.dtype for t in targets} <= _NARROW
        and {s.dtype for s in sources} <= _NARROW
        and all([t.is_contiguous() for t in targets])
        and all([s.is_contiguous() for s in sources])
        and [t.shape for t in targets] == [s.shape for s in sources]
        and {t.device for t in targets} == {device} == {s.device for s in sources}
    )


def _weight(momentum: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or momentum.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"ema_: momentum must be a number or a 0-d tensor on {device} or the CPU, "
                f"got shape {tuple(momentum.shape)} on {momentum.device}"
            )
        weight = 1 - momentum
        if torch.compiler.is_compiling() or not momentum.is_cpu or type(momentum) is not Tensor:
            return weight  # a subclass is a placeholder used in tracing: it has no value
        momentum = momentum.item()
    else:
        weight = torch.tensor(1 - momentum, dtype=torch.float64)
    if not 0 <= momentum <= 1:
        raise ValueError(f"ema_: momentum must be in [0, 1], got {momentum}")
    return weight


def _check(i: int, target: Tensor, source: Tensor, device: torch.device) -> None:
    if target.shape != source.shape:
        raise ValueError(
            f"ema_: sources[{i}] must have the shape of targets[{i}], {tuple(target.shape)}, got {tuple(source.shape)}"
        )
    if not {target.dtype, source.dtype} <= {torch.float64, *_CODES}:
        raise ValueError(
            f"ema_: tensors must be float64, float32, bfloat16 or float16, "
            f"got {target.dtype} for targets[{i}] and {source.dtype} for sources[{i}]"
        )
    if target.device != device or source.device != device:
        raise ValueError(
            f"ema_: every tensor must be on {device} like targets[0], "
            f"got targets[{i}] on {target.device} and sources[{i}] on {source.device}"
        )
    if not target.is_contiguous() and torch.empty_like(target, device="meta").stride() != target.stride():
        raise ValueError(
            f"ema_: targets[{i}] must be non-overlapping and dense, got shape {tuple(target.shape)} "
            f"with strides {target.stride()}: average a contiguous() copy and copy_() it back"
        )


# --- reference: the definition, and the fallback for devices without a kernel


def ema_ref(targets: list[Tensor], sources: list[Tensor], weight: Tensor) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(torch.lerp(target.float(), source.float(), weight.to(target.device)))


# --- triton


@triton.jit
def _load(address, code, start, offs, mask, WIDE: tl.constexpr):
    if code == 0:
        x = tl.load(pointer(address, tl.float32, start, WIDE) + offs, mask=mask)
    elif code == 1:
        x = tl.load(pointer(address, tl.bfloat16, start, WIDE) + offs, mask=mask).to(tl.float32)
    else:
        x = tl.load(pointer(address, tl.float16, start, WIDE) + offs, mask=mask).to(tl.float32)
    return x


@triton.jit
def _store(address, code, start, offs, x, mask, WIDE: tl.constexpr):
    if code == 0:
        tl.store(pointer(address, tl.float32, start, WIDE) + offs, x, mask=mask)
    elif code == 1:
        tl.store(pointer(address, tl.bfloat16, start, WIDE) + offs, x.to(tl.bfloat16), mask=mask)
    else:
        tl.store(pointer(address, tl.float16, start, WIDE) + offs, x.to(tl.float16), mask=mask)


@triton.jit
def _ema_kernel(
    blocks_ptr,  # int32 [total, 2]: row, block within the row
    rows_ptr,  # int64 [R, 5]: element count, addresses of target and source, their dtype codes
    weight,  # float32: 1 - momentum, or a pointer to it
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + tl.load(blocks_ptr + 2 * pid).to(tl.int64) * 5
    start = tl.load(blocks_ptr + 2 * pid + 1).to(tl.int64) * BLOCK
    left = tl.load(row_ptr) - start
    target = tl.load(row_ptr + 1)
    source = tl.load(row_ptr + 2)
    target_code = tl.load(row_ptr + 3)
    source_code = tl.load(row_ptr + 4)
    if ON_DEVICE:
        weight = tl.load(weight)
    offs = tl.arange(0, BLOCK)
    wide = (left >= BLOCK) & ((target | source) % 16 == 0)
    for WIDE in tl.static_range(2):  # a mask would split the wide loads of a full block into single elements
        if wide == WIDE:
            mask = None if WIDE else offs < left
            t = _load(target, target_code, start, offs, mask, WIDE)
            s = _load(source, source_code, start, offs, mask, WIDE)
            _store(target, target_code, start, offs, lerp(t, s, weight), mask, WIDE)


def ema_triton(targets: list[Tensor], sources: list[Tensor], weight: Tensor) -> None:
    rows = [
        (t.numel(), t.data_ptr(), s.data_ptr(), _CODES[t.dtype], _CODES[s.dtype])
        for t, s in zip(targets, sources, strict=True)
    ]
    blocks, table = tables(rows, targets[0].device)
    on_device = weight.device.type != "cpu"
    if len(blocks):
        with torch.cuda.device_of(targets[0]):
            _ema_kernel[(len(blocks),)](
                blocks_ptr=blocks,
                rows_ptr=table,
                weight=weight if on_device else weight.item(),
                ON_DEVICE=on_device,
                BLOCK=BLOCK,
            )


# --- registration; csrc registers the CPU kernel

torch.library.define("jepa_kernels::ema_", "(Tensor(a!)[] targets, Tensor[] sources, Tensor weight) -> ()", tags=CACHES)
torch.library.impl("jepa_kernels::ema_", "default", ema_ref)
torch.library.impl("jepa_kernels::ema_", "cuda", ema_triton)
torch.library.register_fake("jepa_kernels::ema_", lambda targets, sources, weight: None)
