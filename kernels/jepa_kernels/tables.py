"""Many tensors, one launch: the addresses that a kernel works on, as tables in the device's memory.

A list of tensors is cut into blocks of `BLOCK` elements. Program b of a launch reads `blocks[b] = (row, k)`, then
`rows[row] = (elements, address, ...)`, and works on elements k * BLOCK and up of those addresses. Both tables are
cached by what they hold: tensors that stay in place cost a look-up, and new ones (gradients, mostly) a small copy
that the host does not wait for.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # per program of four warps: two 16-byte loads of each float32 tensor in flight per thread

Row = tuple[int, ...]

_captured: list[tuple[Tensor, Tensor]] = []  # a CUDA graph holds addresses: what it reads must outlive the caches


def tables(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """`blocks` int32 [total, 2] and `rows` int64 [R, columns], of which the first counts elements."""
    pair = _blocks(tuple(row[0] for row in rows), device), _rows(tuple(rows), device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(pair)
    return pair


def is_aligned(addresses: Sequence[int]) -> bool:
    """Whether all allow 16-byte loads and stores."""
    return all(address % 16 == 0 for address in addresses)


@triton.jit
def at(address, dtype: tl.constexpr, start, ALIGNED: tl.constexpr):
    """Element `start` behind an address of the table, as a pointer."""
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
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
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "jepa_kernels: a CUDA graph under capture would replay addresses or numbers of this moment. Run the "
            "same step once before the capture, on the same tensors (zero_grad(set_to_none=False) keeps gradients "
            "in place); an optimizer needs capturable=True"
        )
    return table.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _blocks(elements: tuple[int, ...], device: torch.device) -> Tensor:
    count = torch.tensor([-(-n // BLOCK) for n in elements])
    row = torch.repeat_interleave(count)
    first = count.cumsum(0) - count
    return upload(torch.stack([row, torch.arange(len(row)) - first[row]], 1).int(), device)


@lru_cache(maxsize=64)
def _rows(rows: tuple[Row, ...], device: torch.device) -> Tensor:
    return upload(torch.tensor(rows, dtype=torch.int64), device)
