"""The JEPA loss: smooth L1 between predictions and layer-normed targets, its gradient from the same pass.

Shapes: M target blocks, B images, N patches, K patches per block, D channels. Rows of `pred` are block-major
(m*B + b). Per element one prediction and one target are read, and the slope of the loss is written only when
a gradient is wanted; the chosen target rows are gathered and normalised in registers. The CPU kernel is in
csrc/prediction_loss.cpp.
"""

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_index

EPS = 1e-5  # of the layer norm on the targets


@overload
def prediction_loss(pred: Tensor, target: Tensor, index: Tensor, *, per_block: Literal[False] = False) -> Tensor: ...
@overload
def prediction_loss(
    pred: Tensor, target: Tensor, index: Tensor, *, per_block: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def prediction_loss(
    pred: Tensor, target: Tensor, index: Tensor, *, per_block: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean smooth L1 (beta 1) of predictions against layer-normed target rows.

        loss = mean over m, b, k, d of smooth_l1(pred[m*B + b, k, d] - norm(target[b, index[m, b, k]])[d])

    The norm has no weights and eps 1e-5. I-JEPA, arXiv 2301.08243, section 3 (its code takes the smooth L1
    where the paper's equation 1 has the squared norm); C-JEPA keeps it.

    Args:
        pred: [M*B, K, D], any floating dtype, any strides; block-major rows.
        target: [B, N, D], any floating dtype, any strides. Only read, and it gets no gradient.
        index: [M, B, K] int64, the target row of each prediction, 0..N-1.
        per_block: also return the loss of each block.

    Returns:
        A float32 scalar (float64 for float64 predictions); with `per_block` (scalar, [M] losses), the scalar
        being their mean. Both carry gradients to `pred`. Sums are in float32 and in a fixed order. A mean
        over nothing is NaN, as torch's is.

    Raises:
        ValueError: wrong rank, dtype or device, sizes that differ, an index out of range (read on a CPU only;
            on a GPU the kernel asserts).
    """
    for name, x, shape in (("pred", pred, "[M*B, K, D]"), ("target", target, "[B, N, D]")):
        if x.ndim != 3 or not x.dtype.is_floating_point:
            raise ValueError(f"prediction_loss: {name} must be floating-point {shape}; got {x.dtype} {list(x.shape)}")
    (rows, K, D), (B, N, _) = pred.shape, target.shape
    if target.shape[2] != D or target.device != pred.device:
        raise ValueError(
            f"prediction_loss: target must be [B, N, {D}] on {pred.device}, as pred is; "
            f"got {list(target.shape)} on {target.device}"
        )
    check_index("prediction_loss", "index", index, (None, B, K), N, pred)
    if rows != index.shape[0] * B:
        raise ValueError(
            f"prediction_loss: pred must have M*B = {index.shape[0]}*{B} rows for index {list(index.shape)} "
            f"and target {list(target.shape)}; got {list(pred.shape)}"
        )
    if torch.is_grad_enabled() and pred.requires_grad:
        losses = _PredictionLoss.apply(pred, target, index)
    else:
        losses, _ = torch.ops.jepa_kernels.prediction_loss(pred, target, index, False)
    return (losses.mean(), losses) if per_block else losses.mean()


# --- reference


def prediction_loss_ref(pred: Tensor, target_BND: Tensor, index_MBK: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    """The [M] block losses; if wanted, the slope d(mean loss)/d(pred) in units of `_unit`, dtype of pred."""
    (M, B, K), D = index_MBK.shape, pred.shape[2]
    wide = torch.promote_types(pred.dtype, torch.float32)
    index = index_MBK.transpose(0, 1).reshape(B, M * K, 1).expand(-1, -1, D)
    rows_MBKD = target_BND.gather(1, index).reshape(B, M, K, D).transpose(0, 1)
    goal = F.layer_norm(rows_MBKD.to(wide), (D,), eps=EPS)
    error = pred.reshape(goal.shape).to(wide) - goal
    losses = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").mean((1, 2, 3))
    if not with_slope:
        return losses, pred.new_empty(0)
    fraction, _ = _unit(pred)
    return losses, (error.clamp(-1, 1) * fraction).to(pred.dtype).reshape(pred.shape).contiguous()


def prediction_loss_backward_ref(slope: Tensor, grad_losses_M: Tensor) -> Tensor:
    weight_M = _weight(slope, grad_losses_M)
    weight_Q = weight_M.repeat_interleave(slope.shape[0] // max(weight_M.numel(), 1))
    return (slope * weight_Q[:, None, None]).to(slope.dtype)


def _unit(pred: Tensor) -> tuple[float, float]:
    """1 / pred.numel() as (fraction, power of two); the slope is stored times the fraction only.

    So a half-precision slope keeps clear of float16's subnormals, and the backward, which multiplies by the
    power of two and the incoming gradient (1, mostly), rounds nothing a second time.
    """
    mean = 1 / max(pred.numel(), 1)
    if pred.dtype.itemsize > 2:
        return 1.0, mean
    fraction, exponent = math.frexp(mean)
    return fraction, 2.0**exponent


def _weight(slope: Tensor, grad_losses_M: Tensor) -> Tensor:
    return grad_losses_M * (grad_losses_M.shape[0] * _unit(slope)[1])


# --- triton


@triton.jit(do_not_specialize=["R", "K"])  # both change from step to step
def _prediction_loss_kernel(
    pred,  # [R, D], R = M*B*K rows
    target,  # [B, N, D]
    index,  # [R]
    losses,  # [R] float32 (float64): mean over D
    slope,  # [R, D], written if WITH_SLOPE
    fraction,
    R,
    B,
    N,
    K,
    D,
    EPS: tl.constexpr,
    WITH_SLOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide = losses.dtype.element_ty
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    chosen = tl.load(index + row, row < R, other=0)
    tl.device_assert((chosen >= 0) & (chosen < N), "prediction_loss: index out of range")
    mask = (row < R)[:, None] & (column < D)[None, :]
    source = (row // K % B * N + chosen) * D
    y = tl.load(target + source[:, None] + column[None, :], mask, other=0).to(wide)
    at = row[:, None] * D + column[None, :]
    p = tl.load(pred + at, mask, other=0).to(wide)

    y = tl.where(mask, y - tl.sum(y, 1)[:, None] / D, 0)
    error = p - y * tl.rsqrt(tl.sum(y * y, 1) / D + EPS)[:, None]  # NaN stays NaN in both branches below
    size = tl.abs(error)
    loss = tl.where(size < 1, 0.5 * error * error, size - 0.5)
    tl.store(losses + row, tl.sum(tl.where(mask, loss, 0), 1) / D, row < R)
    if WITH_SLOPE:
        clamped = tl.where(error > 1, 1.0, tl.where(error < -1, -1.0, error))
        tl.store(slope + at, (clamped * fraction).to(slope.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["R"])
def _prediction_loss_backward_kernel(
    slope,  # [M, R, D], R = B*K rows
    weight,  # [M]
    grad,  # [M, R, D]
    R,
    D,
    BLOCK: tl.constexpr,
):
    size = R.to(tl.int64) * D
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(1) * size + place
    y = tl.load(slope + at, place < size, other=0) * tl.load(weight + tl.program_id(1))
    tl.store(grad + at, y.to(grad.dtype.element_ty), place < size)


def prediction_loss_triton(pred: Tensor, target: Tensor, index: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    M, B, K = index.shape
    (_, N, D), R = target.shape, M * B * K
    pred, target, index = pred.contiguous(), target.contiguous(), index.contiguous()
    losses = pred.new_empty(M, B * K, dtype=torch.promote_types(pred.dtype, torch.float32))
    slope = pred.new_empty(pred.shape if with_slope else 0)
    if pred.numel():
        block_d = triton.next_power_of_2(D)
        block_r = max(1, 4096 // block_d)
        _prediction_loss_kernel[triton.cdiv(R, block_r),](
            pred, target, index, losses, slope, _unit(pred)[0], R, B, N, K, D,
            EPS, with_slope, block_r, block_d, num_warps=max(4, min(block_d // 1024, 16)),
            debug=True, sanitize_overflow=False,  # debug: keep the assertion, and only that
        )  # fmt: skip
    return losses.mean(1), slope


def prediction_loss_backward_triton(slope: Tensor, grad_losses: Tensor) -> Tensor:
    weight, grad = _weight(slope, grad_losses), torch.empty_like(slope)
    if slope.numel():
        (Q, K, D), M = slope.shape, weight.numel()
        _prediction_loss_backward_kernel[triton.cdiv(Q // M * K * D, 4096), M](
            slope, weight, grad, Q // M * K, D, BLOCK=4096, num_warps=4
        )
    return grad


# --- registration

torch.library.define(
    "jepa_kernels::prediction_loss",
    "(Tensor pred, Tensor target, Tensor index, bool with_slope) -> (Tensor losses, Tensor slope)",
)
torch.library.impl("jepa_kernels::prediction_loss", "default", prediction_loss_ref)
torch.library.impl("jepa_kernels::prediction_loss", "cuda", prediction_loss_triton)
torch.library.define("jepa_kernels::prediction_loss_backward", "(Tensor slope, Tensor grad_losses) -> Tensor")
torch.library.impl("jepa_kernels::prediction_loss_backward", "default", prediction_loss_backward_ref)
torch.library.impl("jepa_kernels::prediction_loss_backward", "cuda", prediction_loss_backward_triton)


@torch.library.register_fake("jepa_kernels::prediction_loss")
def _prediction_loss_fake(pred: Tensor, target: Tensor, index: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(pred.dtype, torch.float32)
    return pred.new_empty(index.shape[0], dtype=wide), pred.new_empty(pred.shape if with_slope else 0)


@torch.library.register_fake("jepa_kernels::prediction_loss_backward")
def _prediction_loss_backward_fake(slope: Tensor, grad_losses: Tensor) -> Tensor:
    return torch.empty_like(slope)


class _PredictionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, index: Tensor) -> Tensor:
        losses, slope = torch.ops.jepa_kernels.prediction_loss(pred, target, index, True)
        ctx.save_for_backward(slope)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return torch.ops.jepa_kernels.prediction_loss_backward(slope, grad_losses), None, None
