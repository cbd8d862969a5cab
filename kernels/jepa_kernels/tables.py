"""Many tensors, one launch: which addresses a kernel works on, as tables in the device's memory.

A list of tensors is cut into blocks of `BLOCK` elements. Program b of the launch reads `blocks[b] = (row, k)`, then
`rows[row] = (elements, address, ...)`, and works on elements k * BLOCK and up of those addresses. Both tables are
cached by their contents: tensors that stay where they are cost one look-up, and new gradients one small copy that
the host does not wait for.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 1024  # elements per program: eight per thread in four warps, two 16-byte loads of each fp32 tensor in flight

Row = tuple[int, ...]


def tables(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """`blocks` int32 [total, 2] and `rows` int64 [R, columns]; the first column counts the row's elements."""
    pair = _blocks(tuple(row[0] for row in rows), device), _rows(tuple(rows), device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(pair)
    return pair


def aligned(rows: Sequence[Row], addresses: slice) -> bool:
    """Whether every address allows 16-byte loads and stores (absent tensors are zero, and do)."""
    return all(address % 16 == 0 for row in rows for address in row[addresses])


_captured: list[tuple[Tensor, Tensor]] = []  # a CUDA graph keeps addresses, not tensors: these must outlive the cache


@lru_cache(maxsize=64)
def _blocks(elements: tuple[int, ...], device: torch.device) -> Tensor:
    count = torch.tensor([-(-n // BLOCK) for n in elements])
    row = torch.repeat_interleave(count)
    first = count.cumsum(0) - count
    return _upload(torch.stack([row, torch.arange(len(row)) - first[row]], 1).int(), device)


@lru_cache(maxsize=64)
def _rows(rows: tuple[Row, ...], device: torch.device) -> Tensor:
    return _upload(torch.tensor(rows, dtype=torch.int64), device)


def _upload(table: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return table
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "jepa_kernels: a CUDA graph is being captured with tensors not seen before. Run the step once before the "
            "capture, on the same tensors (gradients included: zero_grad(set_to_none=False) keeps them in place)"
        )
    return table.pin_memory().to(device, non_blocking=True)
