"""How many rows and columns a program of a kernel takes at a time."""

import triton


def tile(rows: int, D: int, element_size: int) -> tuple[int, int]:
    """ROWS, BLOCK_D of 8 KiB, four 16-byte accesses for each of 128 threads; BLOCK_D divides D if it can."""
    block_d = min(max(D & -D, 64), 512)
    return min(triton.next_power_of_2(rows), max(1, 8192 // (block_d * element_size))), block_d


def chunk(D: int) -> int:
    """Columns at a time of a kernel that keeps whole rows: few lanes idle, and eleven or fewer for any ViT's D."""
    return min(max(D & -D, 128), 256) if D <= 2048 else triton.next_power_of_2(triton.cdiv(D, 8))
