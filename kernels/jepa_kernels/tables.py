"""One launch for many tensors: the addresses that a kernel works on, as tables in device memory.

A list of tensors is cut into blocks of `BLOCK` elements. Program b of a launch reads `blocks[b] = (row, k)`, then
`rows[row] = (elements, address, ...)`, and processes the block that starts at element k * BLOCK of each address. Both
tables are cached by content and by the stream that they were copied on: tensors that stay in place cost a lookup, new
ones (mostly gradients) a small asynchronous copy, which a CUDA graph captures as a node. Ops that use the tables are
tagged `CACHES`: otherwise Inductor would put the cached tables in a graph's private memory (mode="reduce-overhead").
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # per program of four warps: two 16-byte loads per thread and float32 tensor in flight

CACHES = (torch.Tag.cudagraph_unsafe,)  # tags of an op that keeps device memory between calls

Row = tuple[int, ...]

# Pinned memory that CUDA graphs copy from on every replay: kept for the life of the process, because nothing tells when
# a graph is destroyed. A capture adds a few dozen bytes per tensor.
_captured: list[Tensor] = []


def tables(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """`blocks` int32 [total, 2] and `rows` int64 [R, columns], whose first column is the element count."""
    elements = tuple(row[0] for row in rows)
    stream = _stream(device)
    make = _blocks if stream is not None else _blocks.__wrapped__
    return make(elements, device, stream), table(tuple(rows), torch.int64, device)


def table(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the numbers, or rows of numbers, on the device."""
    stream = _stream(device)
    make = _table if stream is not None else _table.__wrapped__
    return make(values, dtype, device, stream)


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured into a CUDA graph. False while torch.compile traces."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int | None:
    """The stream, as a cache key. None during a capture: a graph's memory is undefined before a replay, so copies into
    it must not be cached."""
    if is_capturing(device):
        return None
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@triton.jit
def pointer(address, dtype: tl.constexpr, start, WIDE: tl.constexpr):
    """Pointer to element `start` from an address in the table; WIDE: the address is a multiple of 16 bytes."""
    ptr = address.to(tl.pointer_type(dtype))
    if WIDE:
        ptr = tl.multiple_of(ptr, 16)
    return ptr + start


@triton.jit
def lerp(a, b, weight):
    """a + weight * (b - a), computed from the nearer end like torch.lerp: exact at both ends."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (1 - weight) * (b - a))


def upload(table: Tensor, device: torch.device) -> Tensor:
    """Copies to the device asynchronously."""
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
