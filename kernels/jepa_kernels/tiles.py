"""Tile sizes: how many rows and columns a program processes at a time."""

import triton


def tile(rows: int, D: int, element_size: int) -> tuple[int, int]:
    """Rows and columns of an 8 KiB tile: four 16-byte accesses per thread of 128. The columns divide D if possible."""
    block_d = min(max(D & -D, 64), 512)
    return min(triton.next_power_of_2(rows), max(1, 8192 // (block_d * element_size))), block_d


def chunk(D: int) -> int:
    """Columns per chunk of a kernel that keeps whole rows: few idle lanes, at most eleven chunks for any ViT's D."""
    return min(max(D & -D, 128), 256) if D <= 2048 else triton.next_power_of_2(triton.cdiv(D, 8))
