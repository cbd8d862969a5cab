"""The JEPA loss: smooth L1 between predictions and layer-normed targets, its gradient from the same pass.

Shapes: M target blocks, B images, N patches, K patches per block, D channels. Rows of `pred` are block-major
(m*B + b). Per element one prediction and one target are read, and the slope of the loss is written only when
a gradient is wanted; the chosen target rows are gathered and normalised in registers. The CPU kernel is in
csrc/prediction_loss.cpp.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

EPS = 1e-5  # of the layer norm on the targets


def prediction_loss(
    pred: Tensor, target: Tensor, index: Tensor, *, per_block: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean smooth L1 (beta 1) of `pred` against the layer-normed target rows that `index` names.

    loss = mean over m, b, k, d of smooth_l1(pred[m*B+b, k, d] - layer_norm(target[b, index[m, b, k]])[d]);
    the layer norm has no weights and eps 1e-5. I-JEPA, arXiv 2301.08243, section 3 (its code uses the smooth
    L1 where the paper's equation 1 has the squared norm); C-JEPA keeps it.

    pred: [M*B, K, D], target: [B, N, D], both floating; index: [M, B, K] int64, values in [0, N).
    Returns a float32 scalar (float64 for float64 predictions), and with `per_block` also the [M] losses of
    the blocks, whose mean the scalar is. Gradients reach `pred` alone; the target is only read.
    Raises ValueError on shapes, dtypes or devices that do not fit and, where `index` lies on a CPU, on an
    index out of range. On a GPU that is a device-side assert: nothing is read back.
    """
    _check(pred, target, index)
    if torch.is_grad_enabled() and pred.requires_grad:
        losses = _PredictionLoss.apply(pred, target, index)
    else:
        losses, _ = torch.ops.jepa_kernels.prediction_loss(pred, target, index, False)
    loss = losses.mean()
    return (loss, losses) if per_block else loss


def _check(pred: Tensor, target: Tensor, index: Tensor) -> None:
    for name, x in (("pred", pred), ("target", target)):
        if x.ndim != 3 or not x.is_floating_point():
            want = "[M*B, K, D]" if name == "pred" else "[B, N, D]"
            raise ValueError(f"{name}: want a floating tensor {want}, got {x.dtype} {list(x.shape)}")
    if index.ndim != 3 or index.dtype != torch.int64:
        raise ValueError(f"index: want an int64 tensor [M, B, K], got {index.dtype} {list(index.shape)}")
    (M, B, K), (_, N, D) = index.shape, target.shape
    if target.shape[0] != B:
        raise ValueError(
            f"target: want {B} images, as index {list(index.shape)} has, got {list(target.shape)}; "
            "pass one target row per image, not one per block"
        )
    if pred.shape != (M * B, K, D):
        raise ValueError(
            f"pred: want {[M * B, K, D]} = [M*B, K, D] to go with index {list(index.shape)} "
            f"and target {list(target.shape)}, got {list(pred.shape)}"
        )
    if not pred.device == target.device == index.device:
        raise ValueError(
            f"pred, target and index: want one device, got {pred.device}, {target.device} and {index.device}"
        )
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= N:
            raise ValueError(f"index: want values in [0, {N}), the patches of target, got {low} to {high}")


# --- reference: the definition, the fallback for devices without a kernel, the oracle of the tests
def prediction_loss_ref(
    pred: Tensor, target: Tensor, index: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor]:
    """The [M] block losses and, if wanted, d(mean loss)/d(pred) / 2^e in pred's dtype; e: see `_unit`."""
    M, B, K = index.shape
    accumulate = torch.promote_types(pred.dtype, torch.float32)
    rows_MBKD = target[torch.arange(B, device=index.device)[:, None], index].to(accumulate)
    goal = F.layer_norm(rows_MBKD, rows_MBKD.shape[-1:], eps=EPS)
    error = pred.to(accumulate).view(M, B, K, -1) - goal
    losses = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").mean((1, 2, 3))
    if not with_slope:
        return losses, pred.new_empty(0)
    fraction, _ = _unit(pred.numel())
    return losses, (error.clamp(-1, 1) * fraction).to(pred.dtype).view(pred.shape)


def prediction_loss_backward_ref(slope: Tensor, grad_losses: Tensor) -> Tensor:
    """d(loss)/d(pred) from the saved slope and the [M] gradients of the block losses."""
    M = grad_losses.shape[0]
    _, power = _unit(slope.numel())
    return (slope.view(M, -1) * (grad_losses * (M * power))[:, None]).to(slope.dtype).view(slope.shape)


def _unit(count: int) -> tuple[float, float]:
    """1 / count as (fraction in [.5, 1), power of two).

    The slope is stored with the fraction only: it keeps clear of float16's subnormals, and the backward,
    which multiplies by the power of two and the incoming gradient (1, mostly), rounds nothing twice.
    """
    fraction, exponent = math.frexp(1 / max(count, 1))
    return fraction, 2.0**exponent


# --- registration
torch.library.define(
    "jepa_kernels::prediction_loss",
    "(Tensor pred, Tensor target, Tensor index, bool with_slope) -> (Tensor losses, Tensor slope)",
)
torch.library.define("jepa_kernels::prediction_loss_backward", "(Tensor slope, Tensor grad_losses) -> Tensor")
torch.library.impl("jepa_kernels::prediction_loss", "default", prediction_loss_ref)
torch.library.impl("jepa_kernels::prediction_loss_backward", "default", prediction_loss_backward_ref)


@torch.library.register_fake("jepa_kernels::prediction_loss")
def _(pred: Tensor, target: Tensor, index: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(pred.dtype, torch.float32)
    return pred.new_empty(index.shape[0], dtype=accumulate), pred.new_empty(pred.shape if with_slope else 0)


@torch.library.register_fake("jepa_kernels::prediction_loss_backward")
def _(slope: Tensor, grad_losses: Tensor) -> Tensor:
    return slope.new_empty(slope.shape)


class _PredictionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, pred: Tensor, target: Tensor, index: Tensor) -> Tensor:
        losses, slope = torch.ops.jepa_kernels.prediction_loss(pred, target, index, True)
        ctx.save_for_backward(slope)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.ops.jepa_kernels.prediction_loss_backward(slope, grad_losses), None, None
