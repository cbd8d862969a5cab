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


# --- triton: a program copies BLOCK_K x BLOCK_D of one sample; adjacent programs access adjacent memory


@triton.jit(do_not_specialize=["K"])  # K changes from step to step
def _gather_kernel(
    x_ptr,  # [B, N, D]
    index_ptr,  # [B, K]
    y_ptr,  # [B, K, D]
    N,
    K,
    D,
    stride_xb,
    stride_xn,
    stride_xd,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(D, BLOCK_D)
    tiles_k = tl.cdiv(K, BLOCK_K)
    b = (pid // tiles_d // tiles_k).to(tl.int64)
    offs_k = (pid // tiles_d % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = (pid % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.load(index_ptr + b * K + offs_k, mask=offs_k < K, other=0)
    tl.device_assert((n >= 0) & (n < N), "gather_tokens: index out of range")
    mask = (offs_k < K)[:, None] & (offs_d < D)[None, :]
    x_ptrs = x_ptr + b * stride_xb + n[:, None] * stride_xn + offs_d.to(tl.int64)[None, :] * stride_xd
    x = tl.load(x_ptrs, mask=mask)
    tl.store(y_ptr + (b * K + offs_k)[:, None] * D + offs_d[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["K"])
def _gather_backward_kernel(
    dy_ptr,  # [B, K, D]
    index_ptr,  # [B, K]
    dx_ptr,  # [B, N, D]
    N,
    K,
    D,
    stride_dyb,
    stride_dyk,
    stride_dyd,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Each row of dx searches the index for its terms, once: no atomics, no zeroing first, repeats in the order of k.
    wide: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // tiles_n).to(tl.int64)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.full((BLOCK_N,), K, tl.int32)
    last = tl.full((BLOCK_N,), -1, tl.int32)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        n = tl.load(index_ptr + b * K + offs_k, mask=offs_k < K, other=-1).to(tl.int32)
        found = n[None, :] == offs_n[:, None]
        first = tl.minimum(first, tl.min(tl.where(found, offs_k[None, :], K), 1))
        last = tl.maximum(last, tl.max(tl.where(found, offs_k[None, :], -1), 1))
    after = tl.min(tl.where(last > first, first, K), 0) + 1  # all repeats are in [after, stop),
    stop = tl.max(tl.where(last > first, last, -1), 0) + 1  # which is usually empty
    dy_ptr += b * stride_dyb
    dx_ptr += b * N * D
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        columns = offs_d.to(tl.int64)[None, :] * stride_dyd
        dy_ptrs = dy_ptr + first.to(tl.int64)[:, None] * stride_dyk + columns
        total = tl.load(dy_ptrs, mask=(first < K)[:, None] & (offs_d < D)[None, :], other=0).to(wide)
        for k in range(after, stop):
            again = (offs_n == tl.load(index_ptr + b * K + k)) & (first < k)
            again_ptrs = dy_ptr + tl.full((1, 1), k, tl.int64) * stride_dyk + columns
            total += tl.load(again_ptrs, mask=again[:, None] & (offs_d < D)[None, :], other=0).to(wide)
        mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
        dx_ptrs = dx_ptr + offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
        tl.store(dx_ptrs, total.to(dx_ptr.dtype.element_ty), mask=mask)


def gather_triton(x: Tensor, index: Tensor) -> Tensor:
    (B, N, D), K = x.shape, index.shape[1]
    y = x.new_empty(B, K, D)
    if y.numel():
        block_k, block_d = tile(K, D, x.element_size())
        grid = (B * triton.cdiv(K, block_k) * triton.cdiv(D, block_d),)
        with torch.cuda.device_of(x):
            _gather_kernel[grid](
                x_ptr=x,
                index_ptr=index.contiguous(),
                y_ptr=y,
                N=N,
                K=K,
                D=D,
                stride_xb=x.stride(0),
                stride_xn=x.stride(1),
                stride_xd=x.stride(2),
                BLOCK_K=block_k,
                BLOCK_D=block_d,
                **ASSERTING,
            )
    return y


def gather_backward_triton(dy: Tensor, index: Tensor, N: int) -> Tensor:
    B, K, D = dy.shape
    dx = dy.new_empty(B, N, D)
    if dx.numel():
        block_n, block_d = tile(N, D, max(4, dy.element_size()))  # the sums are at least float32
        grid = (B * triton.cdiv(N, block_n),)
        with torch.cuda.device_of(dy):
            _gather_backward_kernel[grid](
                dy_ptr=dy,
                index_ptr=index.contiguous(),
                dx_ptr=dx,
                N=N,
                K=K,
                D=D,
                stride_dyb=dy.stride(0),
                stride_dyk=dy.stride(1),
                stride_dyd=dy.stride(2),
                BLOCK_N=block_n,
                BLOCK_K=128,
                BLOCK_D=block_d,
            )
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
