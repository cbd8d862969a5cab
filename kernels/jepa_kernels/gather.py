"""Gather the visible tokens of every sample: y[b, k, :] = x[b, index[b, k], :].

Shapes: B samples, N tokens, K kept tokens, D channels. A pure copy, so the floor is memory traffic: K rows
read and K rows written per sample. The CPU kernel is in csrc/gather.cpp.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_index


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of every sample of `x`.

    Args:
        x: [B, N, D], any floating dtype, any strides.
        index: [B, K] int64, values in 0..N-1, in any order; repeats are allowed.

    Returns:
        [B, K, D], contiguous, dtype of `x`. The gradient of a row sums over its repeats in float32, in the
        order of k: the same bits every time.

    Raises:
        ValueError: wrong rank, dtype or device, batches that differ, an index out of range (read on a CPU
            only; on a GPU the kernel asserts).
    """
    if x.ndim != 3 or not x.dtype.is_floating_point:
        raise ValueError(f"gather_tokens: x must be floating-point [B, N, D]; got {x.dtype} {list(x.shape)}")
    check_index("gather_tokens", "index", index, (x.shape[0], None), x.shape[1], x)
    return _Gather.apply(x, index)


# --- reference


def gather_ref(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    return x_BND.gather(1, index_BK[:, :, None].expand(-1, -1, x_BND.shape[2])).contiguous()


def gather_backward_ref(dy_BKD: Tensor, index_BK: Tensor, N: int) -> Tensor:
    B, _, D = dy_BKD.shape
    total = dy_BKD.new_zeros(B, N, D, dtype=torch.promote_types(dy_BKD.dtype, torch.float32))
    total.scatter_add_(1, index_BK[:, :, None].expand(-1, -1, D), dy_BKD.to(total.dtype))
    return total.to(dy_BKD.dtype)


# --- registration

torch.library.define("jepa_kernels::gather", "(Tensor x, Tensor index) -> Tensor")
torch.library.impl("jepa_kernels::gather", "default", gather_ref)
torch.library.define("jepa_kernels::gather_backward", "(Tensor dy, Tensor index, SymInt N) -> Tensor")
torch.library.impl("jepa_kernels::gather_backward", "default", gather_backward_ref)


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
