"""Gather the visible tokens of every sample: y[b, k, :] = x[b, index[b, k], :].

Shapes: B samples, N tokens, K kept tokens, D channels. A pure copy, bound by memory traffic: K rows
read and K rows written per sample. The CPU kernel is in csrc/gather.cpp.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import ASSERTING, check_floats, check_index
from .tiles import tile


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gathers rows `index` of every sample of `x`.

    Args:
        x: [B, N, D], float32, float64, bfloat16 or float16, any strides.
        index: [B, K] int64, values in 0..N-1, in any order; repeats are allowed.

    Returns:
        [B, K, D], contiguous, dtype of `x`. Gradients of repeated rows are summed in float32 (float64 for float64) in
        the order of k, so they are bitwise reproducible.

    Raises:
        ValueError: wrong rank, dtype or device, different batch sizes, an index out of range (checked on a CPU only;
            on a GPU the kernel asserts).
    """
    check_floats("gather_tokens", "x", x, "[B, N, D]")
    check_index("gather_tokens", "index", index, (x.shape[0], None), x.shape[1], x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gather.apply(x, index)
    return torch.ops.jepa_kernels.gather(x, index)


# --- reference


def gather_ref(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    return x_BND.gather(1, index_BK[:, :, None].expand(-1, -1, x_BND.shape[2])).contiguous()


def gather_backward_ref(dy_BKD: Tensor, index_BK: Tensor, N: int) -> Tensor:
    B, _, D = dy_BKD.shape
    total = dy_BKD.new_zeros(B, N, D, dtype=torch.promote_types(dy_BKD.dtype, torch.float32))
    total.scatter_add_(1, index_BK[:, :, None].expand(-1, -1, D), dy_BKD.to(total.dtype))
    return total.to(dy_BKD.dtype)


# --- triton: a program copies ROWS x BLOCK_D of one sample; adjacent programs access adjacent memory


@triton.jit(do_not_specialize=["K"])  # K changes from step to step
def _gather_kernel(
    x,  # [B, N, D]
    index,  # [B, K]
    y,  # [B, K, D]
    N,
    K,
    D,
    x_b,  # strides of x
    x_n,
    x_d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    columns, tiles = tl.cdiv(D, BLOCK_D), tl.cdiv(K, ROWS)
    b = (program // columns // tiles).to(tl.int64)
    k = (program // columns % tiles) * ROWS + tl.arange(0, ROWS)
    d = (program % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.load(index + b * K + k, mask=k < K, other=0)
    tl.device_assert((n >= 0) & (n < N), "gather_tokens: index out of range")
    inside = (k < K)[:, None] & (d < D)[None, :]
    rows = tl.load(x + b * x_b + n[:, None] * x_n + d.to(tl.int64)[None, :] * x_d, mask=inside)
    tl.store(y + (b * K + k)[:, None] * D + d[None, :], rows, mask=inside)


@triton.jit(do_not_specialize=["K"])
def _gather_backward_kernel(
    dy,  # [B, K, D]
    index,  # [B, K]
    dx,  # [B, N, D]
    N,
    K,
    D,
    dy_b,  # strides of dy
    dy_k,
    dy_d,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Each row of dx searches the index for its terms, once: no atomics, no zeroing first, repeats in the order of k.
    wide: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    first, last = tl.full((ROWS,), K, tl.int32), tl.full((ROWS,), -1, tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        found = tl.load(index + b * K + k, mask=k < K, other=-1).to(tl.int32)[None, :] == n[:, None]
        first = tl.minimum(first, tl.min(tl.where(found, k[None, :], K), 1))
        last = tl.maximum(last, tl.max(tl.where(found, k[None, :], -1), 1))
    after = tl.min(tl.where(last > first, first, K), 0) + 1  # all repeats are in [after, stop),
    stop = tl.max(tl.where(last > first, last, -1), 0) + 1  # which is usually empty
    dy += b * dy_b
    dx += b * N * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        columns = d.to(tl.int64)[None, :] * dy_d
        at = dy + first.to(tl.int64)[:, None] * dy_k + columns
        total = tl.load(at, mask=(first < K)[:, None] & (d < D)[None, :], other=0).to(wide)
        for k in range(after, stop):
            again = (n == tl.load(index + b * K + k)) & (first < k)
            term = dy + tl.full((1, 1), k, tl.int64) * dy_k + columns
            total += tl.load(term, mask=again[:, None] & (d < D)[None, :], other=0).to(wide)
        inside = (n < N)[:, None] & (d < D)[None, :]
        tl.store(dx + n.to(tl.int64)[:, None] * D + d[None, :], total.to(dx.dtype.element_ty), mask=inside)


def gather_triton(x: Tensor, index: Tensor) -> Tensor:
    (B, N, D), K = x.shape, index.shape[1]
    y = x.new_empty(B, K, D)
    if y.numel():
        rows, block_d = tile(K, D, x.element_size())
        grid = (B * triton.cdiv(K, rows) * triton.cdiv(D, block_d),)
        with torch.cuda.device_of(x):
            _gather_kernel[grid](x, index.contiguous(), y, N, K, D, *x.stride(), rows, block_d, **ASSERTING)
    return y


def gather_backward_triton(dy: Tensor, index: Tensor, N: int) -> Tensor:
    B, K, D = dy.shape
    dx = dy.new_empty(B, N, D)
    if dx.numel():
        rows, block_d = tile(N, D, max(4, dy.element_size()))  # the sums are at least float32
        grid = (B * triton.cdiv(N, rows),)
        with torch.cuda.device_of(dy):
            _gather_backward_kernel[grid](dy, index.contiguous(), dx, N, K, D, *dy.stride(), rows, 128, block_d)
    return dx


# --- registration

torch.library.define("jepa_kernels::gather", "(Tensor x, Tensor index) -> Tensor")
torch.library.impl("jepa_kernels::gather", "default", gather_ref)
torch.library.impl("jepa_kernels::gather", "cuda", gather_triton)
torch.library.define("jepa_kernels::gather_backward", "(Tensor dy, Tensor index, SymInt N) -> Tensor")
torch.library.impl("jepa_kernels::gather_backward", "default", gather_backward_ref)
torch.library.impl("jepa_kernels::gather_backward", "cuda", gather_backward_triton)


@torch.library.register_fake("jepa_kernels::gather")
def _gather_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(*index.shape, x.shape[2])


@torch.library.register_fake("jepa_kernels::gather_backward")
def _gather_backward_fake(dy: Tensor, index: Tensor, N: int) -> Tensor:
    return dy.new_empty(dy.shape[0], N, dy.shape[2])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.N = x.shape[1]
        return torch.ops.jepa_kernels.gather(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return torch.ops.jepa_kernels.gather_backward(dy, index, ctx.N), None
