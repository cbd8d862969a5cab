"""The JEPA loss: smooth L1 between predictions and layer-normed targets, with its gradient from the same pass.

Shapes: M target blocks, B images, N patches, K patches per block, D channels. Rows of `pred` are block-major
(m*B + b). One prediction and one target are read per element, and the gradient of the mean loss is written only
if needed; the selected target rows are gathered and normalised in registers. The backward returns that gradient
unchanged if the incoming gradient is 1, and scales it otherwise. The CPU kernel is in csrc/prediction_loss.cpp.
"""

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import ASSERTING, check_floats, check_index
from .tiles import chunk

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

    The norm has no affine parameters and eps 1e-5. I-JEPA, arXiv 2301.08243, section 3 (its code uses the smooth L1
    where the paper's equation 1 has the squared norm); C-JEPA does the same.

    Args:
        pred: [M*B, K, D], float32, float64, bfloat16 or float16, any strides; block-major rows.
        target: [B, N, D], one of these dtypes, any strides. It gets no gradient and may not require one.
        index: [M, B, K] int64, the target row of each prediction, 0..N-1.
        per_block: also return the loss of each block.

    Returns:
        A float32 scalar (float64 for float64 predictions); with `per_block` (scalar, [M] losses), the scalar
        being their mean. Both are differentiable in `pred`, whose gradient is rounded once, and a second time if the
        loss is multiplied by anything but a power of two. Sums are in float32 or wider, in a fixed order. The mean of
        an empty input is NaN, as in torch.

    Raises:
        ValueError: wrong rank, dtype or device, sizes that differ, an index out of range (checked on a CPU only;
            on a GPU the kernel asserts), a target that requires a gradient.
    """
    check_floats("prediction_loss", "pred", pred, "[M*B, K, D]")
    check_floats("prediction_loss", "target", target, "[B, N, D]")
    (rows, K, D), (B, N, _) = pred.shape, target.shape
    if target.shape[2] != D or target.device != pred.device:
        raise ValueError(
            f"prediction_loss: target must be [B, N, {D}] on {pred.device}, as pred is; "
            f"got {list(target.shape)} on {target.device}"
        )
    if torch.is_grad_enabled() and target.requires_grad:
        raise ValueError("prediction_loss: target requires a gradient, but receives none; pass target.detach()")
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


def prediction_loss_ref(pred: Tensor, target_BND: Tensor, index_MBK: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    """The [M] block losses and, if wanted, d(their mean)/d(pred) divided by `_unit`'s power of two, in pred's dtype."""
    (M, B, K), D = index_MBK.shape, pred.shape[2]
    wide = torch.promote_types(pred.dtype, torch.float32)
    index = index_MBK.transpose(0, 1).reshape(B, M * K, 1).expand(-1, -1, D)
    rows_MBKD = target_BND.gather(1, index).reshape(B, M, K, D).transpose(0, 1)
    goal = F.layer_norm(rows_MBKD.to(wide), (D,), eps=EPS)
    error = pred.reshape(goal.shape).to(wide) - goal
    losses = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").mean((1, 2, 3))
    if not with_grad:
        return losses, pred.new_empty(0)
    fraction, _ = _unit(pred)
    return losses, (error.clamp(-1, 1) * fraction).to(pred.dtype).reshape(pred.shape).contiguous()


def prediction_loss_scale_ref(grad: Tensor, grad_losses_M: Tensor) -> None:
    """Multiplies the gradient that the forward stored by grad_losses, in place."""
    if grad.numel():
        M, (fraction, power) = grad_losses_M.numel(), _unit(grad)
        rows = grad.view(M, -1)
        rows.copy_(_unrounded(rows, grad_losses_M.new_tensor(fraction)) * (grad_losses_M * (M * power))[:, None])


def _unrounded(grad: Tensor, fraction: Tensor) -> Tensor:
    """Widens grad. Where the loss is linear all elements are +-fraction, rounded: restores those to full precision."""
    wide = grad.to(fraction.dtype)
    if grad.dtype == fraction.dtype:
        return wide
    # Compares bits: a compiler that fuses would drop a rounding to 16 bits and back.
    bits, sign = fraction.to(grad.dtype).view(torch.int16), 1 << 15
    return torch.where((grad.view(torch.int16) & (sign - 1)) == bits, wide.sign() * fraction, wide)


def _unit(pred: Tensor) -> tuple[float, float]:
    """1 / pred.numel() as (fraction, power of two); the stored gradient is multiplied by the fraction only.

    The power is 1 except for float16, in which the mean's gradient could be subnormal: there the incoming
    gradient, which contains the loss scale, is multiplied by it first.
    """
    mean = 1 / max(pred.numel(), 1)
    if pred.dtype != torch.float16:
        return mean, 1.0
    fraction, exponent = math.frexp(mean)
    return fraction, 2.0**exponent


# --- triton: a warp reads a row, in chunks that fit D, and keeps it in registers


@triton.jit(do_not_specialize=["R", "B", "K"])  # R and K change from step to step
def _prediction_loss_kernel(
    pred_ptr,  # [M*B, K, D]
    target_ptr,  # [B, N, D]
    index_ptr,  # [R], R = M*B*K rows
    losses_ptr,  # [R] float32 (float64): mean over D
    grad_ptr,  # [R, D], written if WITH_GRAD
    power,  # of two, by which the stored gradient is divided; exact in float32, as kernel arguments are
    R,
    B,
    N,
    K,
    stride_pq,  # of pred
    stride_pk,
    stride_pd,
    stride_tb,  # of target
    stride_tn,
    stride_td,
    D: tl.constexpr,
    EPS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide = losses_ptr.dtype.element_ty
    fraction = (1 / (R.to(tl.float64) * D * power)).to(wide)
    pid = tl.program_id(0)
    offs_r = tl.minimum(pid * BLOCK_R + tl.arange(0, BLOCK_R), R - 1)  # surplus rows repeat the last one
    q = offs_r // K
    k = offs_r - q * K
    offs_chunk = tl.arange(0, BLOCK_D)
    pred_ptrs = pred_ptr + (q.to(tl.int64) * stride_pq + k.to(tl.int64) * stride_pk)[:, None]
    p = tl.tuple([])  # by chunk, like y
    for start_d in tl.static_range(0, D, BLOCK_D):
        offs_d = (start_d + offs_chunk)[None, :]
        p += (tl.load(pred_ptrs + offs_d.to(tl.int64) * stride_pd, mask=offs_d < D, other=0),)
    n = tl.load(index_ptr + offs_r)
    tl.device_assert((n >= 0) & (n < N), "prediction_loss: index out of range")
    target_ptrs = target_ptr + ((q % B).to(tl.int64) * stride_tb + n * stride_tn)[:, None]
    y = tl.tuple([])
    for start_d in tl.static_range(0, D, BLOCK_D):
        offs_d = (start_d + offs_chunk)[None, :]
        y += (tl.load(target_ptrs + offs_d.to(tl.int64) * stride_td, mask=offs_d < D, other=0).to(wide),)
    total = tl.zeros((BLOCK_R, BLOCK_D), wide)
    for c in tl.static_range(len(y)):
        total += y[c]
    mean = tl.sum(total, 1)[:, None] / D
    total = tl.zeros((BLOCK_R, BLOCK_D), wide)
    for c in tl.static_range(len(y)):
        centred = tl.where((c * BLOCK_D + offs_chunk)[None, :] < D, y[c] - mean, 0)
        total += centred * centred
    rstd = tl.rsqrt(tl.sum(total, 1)[:, None] / D + EPS)
    total = tl.zeros((BLOCK_R, BLOCK_D), wide)
    for c in tl.static_range(len(y)):
        offs_d = (c * BLOCK_D + offs_chunk)[None, :]
        mask_d = offs_d < D
        error = tl.where(mask_d, p[c].to(wide) - (y[c] - mean) * rstd, 0)
        if wide == tl.float64:
            clamped = tl.where(error > 1, 1.0, tl.where(error < -1, -1.0, error))
        else:  # one instruction; both branches propagate NaN
            clamped = tl.clamp(error, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        total += clamped * (error - 0.5 * clamped)  # smooth L1
        if WITH_GRAD:
            grad_ptrs = grad_ptr + offs_r.to(tl.int64)[:, None] * D + offs_d
            tl.store(grad_ptrs, (clamped * fraction).to(grad_ptr.dtype.element_ty), mask=mask_d)
    tl.store(losses_ptr + offs_r, tl.sum(total, 1) / D)


@triton.jit(do_not_specialize=["R"])
def _prediction_loss_scale_kernel(
    grad_ptr,  # [M, R, D], R = B*K rows
    grad_losses_ptr,  # [M]
    power,
    R,
    D,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # per program
):
    wide = grad_losses_ptr.dtype.element_ty
    M = tl.num_programs(1)
    m = tl.program_id(1)
    weight = tl.load(grad_losses_ptr + m) * (M * power)
    fraction = (1 / (R.to(tl.float64) * M * D * power)).to(wide)
    stored = fraction.to(grad_ptr.dtype.element_ty).to(wide)
    if weight != 1:
        size = R.to(tl.int64) * D
        grad_ptr += m * size
        for block in range(BLOCKS):
            offs = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < size
            y = tl.load(grad_ptr + offs, mask=mask, other=0).to(wide)
            y = tl.where(y == stored, fraction, tl.where(y == -stored, -fraction, y))  # as in _unrounded
            tl.store(grad_ptr + offs, (y * weight).to(grad_ptr.dtype.element_ty), mask=mask)


def prediction_loss_triton(pred: Tensor, target: Tensor, index: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    M, B, K = index.shape
    (_, N, D), R = target.shape, M * B * K
    losses = pred.new_empty(M, B * K, dtype=torch.promote_types(pred.dtype, torch.float32))
    grad = pred.new_empty(pred.shape if with_grad else 0)
    if not pred.numel():
        losses.fill_(torch.nan)  # D may be 0: the mean of nothing, and no kernel runs
    else:
        block_d = chunk(D)
        block_r = max(1, min(4, 1024 // block_d))
        _, power = _unit(pred)
        grid = (triton.cdiv(R, block_r),)
        with torch.cuda.device_of(pred):
            _prediction_loss_kernel[grid](
                pred_ptr=pred,
                target_ptr=target,
                index_ptr=index.contiguous(),
                losses_ptr=losses,
                grad_ptr=grad,
                power=power,
                R=R,
                B=B,
                N=N,
                K=K,
                stride_pq=pred.stride(0),
                stride_pk=pred.stride(1),
                stride_pd=pred.stride(2),
                stride_tb=target.stride(0),
                stride_tn=target.stride(1),
                stride_td=target.stride(2),
                D=D,
                EPS=EPS,
                WITH_GRAD=with_grad,
                BLOCK_R=block_r,
                BLOCK_D=block_d,
                num_warps=max(4, min(block_d // 256, 16)),
                **ASSERTING,
            )
    return losses.mean(1), grad


def prediction_loss_scale_triton(grad: Tensor, grad_losses: Tensor) -> None:
    if grad.numel():
        M = grad_losses.numel()
        Q, K, D = grad.shape
        R = Q // M * K
        _, power = _unit(grad)
        block, blocks = 4096, 4
        grid = (triton.cdiv(R * D, blocks * block), M)
        with torch.cuda.device_of(grad):
            _prediction_loss_scale_kernel[grid](
                grad_ptr=grad,
                grad_losses_ptr=grad_losses.contiguous(),
                power=power,
                R=R,
                D=D,
                BLOCK=block,
                BLOCKS=blocks,
            )


# --- registration

torch.library.define(
    "jepa_kernels::prediction_loss",
    "(Tensor pred, Tensor target, Tensor index, bool with_grad) -> (Tensor losses, Tensor grad)",
)
torch.library.impl("jepa_kernels::prediction_loss", "default", prediction_loss_ref)
torch.library.impl("jepa_kernels::prediction_loss", "cuda", prediction_loss_triton)
torch.library.define("jepa_kernels::prediction_loss_scale_", "(Tensor(a!) grad, Tensor grad_losses) -> ()")
torch.library.impl("jepa_kernels::prediction_loss_scale_", "default", prediction_loss_scale_ref)
torch.library.impl("jepa_kernels::prediction_loss_scale_", "cuda", prediction_loss_scale_triton)


@torch.library.register_fake("jepa_kernels::prediction_loss")
def _prediction_loss_fake(pred: Tensor, target: Tensor, index: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(pred.dtype, torch.float32)
    return pred.new_empty(index.shape[0], dtype=wide), pred.new_empty(pred.shape if with_grad else 0)


@torch.library.register_fake("jepa_kernels::prediction_loss_scale_")
def _prediction_loss_scale_fake(grad: Tensor, grad_losses: Tensor) -> None:
    return None


# Whether the current backward may run again (retain_graph). If this torch cannot tell, assume that it may.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _PredictionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, index: Tensor) -> Tensor:
        losses, grad = torch.ops.jepa_kernels.prediction_loss(pred, target, index, True)
        ctx.save_for_backward(grad)
        ctx.B = index.shape[1]
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        if torch.compiler.is_compiling() and grad.dtype != torch.float16:  # float16's power would be a constant
            weight = (grad_losses * len(grad_losses))[:, None].expand(-1, ctx.B).reshape(-1, 1, 1)
            fraction = (weight.new_ones((), dtype=torch.float64) / grad.numel()).to(weight.dtype)
            scaled = _unrounded(grad, fraction) * weight
            return scaled.to(grad.dtype), None, None  # the compiler fuses this: one kernel, no copy
        if torch.compiler.is_compiling() or _graph_is_kept():
            grad = grad.clone()  # otherwise this is its last use: scale in place and return it
        torch.ops.jepa_kernels.prediction_loss_scale_(grad, grad_losses)
        return grad, None, None
