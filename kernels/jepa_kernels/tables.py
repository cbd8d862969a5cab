"""Many tensors, one launch: the addresses that a kernel works on, as tables in the device's memory.

A list of tensors is cut into blocks of `BLOCK` elements. Program b of a launch reads `blocks[b] = (row, k)`, then
`rows[row] = (elements, address, ...)`, and works on elements k * BLOCK and up of those addresses. Both tables are
cached by what they hold and by the stream that they were copied on: tensors that stay in place cost a look-up, and new
ones (gradients, mostly) a small copy that the host does not wait for. In a CUDA graph that copy is a node. Ops that use
them are `CACHES`: Inductor would give the cached tables memory of a graph of its own (mode="reduce-overhead").
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # per program of four warps: two 16-byte loads of each float32 tensor in flight per thread

CACHES = (torch.Tag.cudagraph_unsafe,)  # of an op that keeps device memory from one call to the next

Row = tuple[int, ...]

# What CUDA graphs copy from, each time that they are replayed: kept for as long as the process lives, because no graph
# says when it ends. A capture adds a few dozen bytes per tensor.
_captured: list[Tensor] = []


def tables(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """`blocks` int32 [total, 2] and `rows` int64 [R, columns], of which the first counts elements."""
    elements = tuple(row[0] for row in rows)
    stream = _stream(device)
    make = _blocks if stream is not None else _blocks.__wrapped__
    return make(elements, device, stream), table(tuple(rows), torch.int64, device)


def table(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers, or rows of them, on the device."""
    stream = _stream(device)
    make = _table if stream is not None else _table.__wrapped__
    return make(values, dtype, device, stream)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being made of what is launched on the device now. Never while torch.compile traces."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int | None:
    """What the caches tell streams apart by. None in a capture: what is copied into the memory of a graph, which holds
    nothing before a replay, is not for them."""
    if is_capturing(device):
        return None
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@triton.jit
def at(address, dtype: tl.constexpr, start, WIDE: tl.constexpr):
    """Element `start` behind an address of the table, as a pointer; WIDE: the address is a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(dtype))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def lerp(a, b, weight):
    """a + weight * (b - a) from the nearer end, as torch.lerp: exact at both."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (1 - weight) * (b - a))


def upload(table: Tensor, device: torch.device) -> Tensor:
    """Copies to the device without waiting for it."""
    if device.type != "cuda":
        return table
    pinned = table.pin_memory()
    if is_capturing(device):
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _blocks(elements: tuple[int, ...], device: torch.device, stream: int | None) -> Tensor:
    count = torch.tensor([-(-n // BLOCK) for n in elements])
    row = torch.repeat_interleave(count)
    first = count.cumsum(0) - count
    return upload(torch.stack([row, torch.arange(len(row)) - first[row]], 1).int(), device)


@lru_cache(maxsize=64)
def _table(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device, stream: int | None) -> Tensor:
    return upload(torch.tensor(values, dtype=dtype), device)
