"""What the ops that take an index ask of it, before a launch and in a kernel; and the tiles that they copy rows in."""

import torch
import triton
from torch import Tensor

# Launch options: Triton drops tl.device_assert unless it compiles for debugging, which would check sums as well.
ASSERTING = {"debug": True, "sanitize_overflow": False}


def check_index(op: str, name: str, index: Tensor, sizes: tuple[int | None, ...], rows: int, like: Tensor) -> None:
    """Raises `ValueError` unless `index` is int64, of these sizes (None: any), beside `like`, in 0..rows-1.

    Values are read on a CPU only: on a GPU that would wait for it, so there the kernel asserts. A compiled
    call does not read them here either; the CPU kernels check again.
    """
    fits = index.ndim == len(sizes) and all(
        want is None or have == want for have, want in zip(index.shape, sizes, strict=True)
    )
    if index.dtype != torch.int64 or not fits or index.device != like.device:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(
            f"{op}: {name} must be int64 of shape [{wanted}] on {like.device}; "
            f"got {index.dtype} of shape {list(index.shape)} on {index.device}"
        )
    if torch.compiler.is_compiling() or index.device.type != "cpu" or type(index) is not Tensor:
        return  # a subclass is a tracer's stand-in: it has no values
    if index.numel():
        low, high = (int(extreme) for extreme in index.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{op}: {name} holds {low if low < 0 else high}; it must lie in 0..{rows - 1}")


def tile(rows: int, D: int, element_size: int) -> tuple[int, int]:
    """ROWS, BLOCK_D of 8 KiB, four 16-byte accesses for each of 128 threads; BLOCK_D divides D if it can."""
    block_d = min(max(D & -D, 64), 512)
    return min(triton.next_power_of_2(rows), max(1, 8192 // (block_d * element_size))), block_d


def chunk(D: int) -> int:
    """Columns at a time of a kernel that keeps whole rows: few lanes idle, and eleven or fewer for any ViT's D."""
    return min(max(D & -D, 128), 256) if D <= 2048 else triton.next_power_of_2(triton.cdiv(D, 8))
