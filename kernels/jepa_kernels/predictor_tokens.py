"""The predictor's input: visible tokens and mask tokens, positions added, one sequence per target block.

    y[m*B + b, k]      = context[b, k] + pos[context_index[b, k]]        k < Kc
    y[m*B + b, Kc + t] = mask_token    + pos[target_index[m, b, t]]      t < Kt

Shapes: B images, M target blocks, Kc visible and Kt hidden tokens, N positions, D the predictor's width. One
pass: y is written once, context is read once and again from cache for the other blocks. The CPU kernel is in
csrc/predictor_tokens.cpp. I-JEPA, arXiv 2301.08243, section 3.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_index


def predictor_tokens(
    context: Tensor, context_index: Tensor, target_index: Tensor, pos: Tensor, mask_token: Tensor
) -> Tensor:
    """One sequence [context, mask tokens] for every target block of every image.

    Args:
        context: [B, Kc, D], any floating dtype, any strides.
        context_index: [B, Kc] int64, the position of each visible token, 0..N-1.
        target_index: [M, B, Kt] int64, the positions to predict, 0..N-1.
        pos: [N, D] position table, dtype of `context` or float32; it gets no gradient and may not require it.
        mask_token: [D], dtype of `context` or float32.

    Returns:
        [M*B, Kc+Kt, D], contiguous, block-major rows, dtype of `context`; added in float32, rounded once.
        Gradients reach `context` (summed over blocks) and `mask_token` (over all its copies), in float32 and
        in a fixed order: the same bits every time.

    Raises:
        ValueError: wrong rank, dtype or device, sizes that differ, an index out of range (read on a CPU only;
            on a GPU the kernel asserts), a `pos` that requires a gradient.
    """
    if context.ndim != 3 or not context.dtype.is_floating_point:
        raise ValueError(
            "predictor_tokens: context must be floating-point [B, Kc, D]; "
            f"got {context.dtype} {list(context.shape)}"
        )
    B, Kc, D = context.shape
    for name, tensor, ndim in (("pos", pos, 2), ("mask_token", mask_token, 1)):
        right = tensor.dtype in (context.dtype, torch.float32) and tensor.device == context.device
        if tensor.ndim != ndim or tensor.shape[-1] != D or not right:
            raise ValueError(
                f"predictor_tokens: {name} must be {'[N, D]' if ndim == 2 else '[D]'} with D = {D}, "
                f"{context.dtype} or float32, on {context.device}; "
                f"got {list(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
            )
    if pos.requires_grad:
        raise ValueError("predictor_tokens: pos requires a gradient, and gets none here; pass pos.detach()")
    check_index("predictor_tokens", "context_index", context_index, (B, Kc), pos.shape[0], context)
    check_index("predictor_tokens", "target_index", target_index, (None, B, None), pos.shape[0], context)
    return _PredictorTokens.apply(context, context_index, target_index, pos, mask_token)


# --- reference


def predictor_tokens_ref(
    context_BKD: Tensor, context_index: Tensor, target_index: Tensor, pos_ND: Tensor, mask_token_D: Tensor
) -> Tensor:
    M, B, Kt = target_index.shape
    _, Kc, D = context_BKD.shape
    wide = torch.promote_types(context_BKD.dtype, torch.float32)
    seen = context_BKD.to(wide) + pos_ND.to(wide)[context_index]
    hidden = mask_token_D.to(wide) + pos_ND.to(wide)[target_index]
    tokens = torch.cat([seen.expand(M, B, Kc, D), hidden], dim=2)
    return tokens.reshape(M * B, Kc + Kt, D).to(context_BKD.dtype)


def predictor_tokens_backward_ref(dy: Tensor, M: int, B: int, Kc: int) -> tuple[Tensor, Tensor]:
    wide = dy.reshape(M, B, dy.shape[1], dy.shape[2]).to(torch.promote_types(dy.dtype, torch.float32))
    return wide[:, :, :Kc].sum(0).to(dy.dtype), wide[:, :, Kc:].sum((0, 1, 2))


# --- registration

torch.library.define(
    "jepa_kernels::predictor_tokens",
    "(Tensor context, Tensor context_index, Tensor target_index, Tensor pos, Tensor mask_token) -> Tensor",
)
torch.library.impl("jepa_kernels::predictor_tokens", "default", predictor_tokens_ref)
torch.library.define(
    "jepa_kernels::predictor_tokens_backward",
    "(Tensor dy, SymInt M, SymInt B, SymInt Kc) -> (Tensor, Tensor)",
)
torch.library.impl("jepa_kernels::predictor_tokens_backward", "default", predictor_tokens_backward_ref)


@torch.library.register_fake("jepa_kernels::predictor_tokens")
def _predictor_tokens_fake(
    context: Tensor, context_index: Tensor, target_index: Tensor, pos: Tensor, mask_token: Tensor
) -> Tensor:
    M, B, Kt = target_index.shape
    return context.new_empty(M * B, context.shape[1] + Kt, context.shape[2])


@torch.library.register_fake("jepa_kernels::predictor_tokens_backward")
def _predictor_tokens_backward_fake(dy: Tensor, M: int, B: int, Kc: int) -> tuple[Tensor, Tensor]:
    D = dy.shape[2]
    return dy.new_empty(B, Kc, D), dy.new_empty(D, dtype=torch.promote_types(dy.dtype, torch.float32))


class _PredictorTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: Tensor, context_index: Tensor, target_index: Tensor, pos: Tensor, mask: Tensor
    ) -> Tensor:
        ctx.sizes = target_index.shape[0], target_index.shape[1], context.shape[1]
        ctx.mask_dtype = mask.dtype
        return torch.ops.jepa_kernels.predictor_tokens(context, context_index, target_index, pos, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, Tensor]:
        d_context, d_mask = torch.ops.jepa_kernels.predictor_tokens_backward(dy, *ctx.sizes)
        return d_context, None, None, None, d_mask.to(ctx.mask_dtype)
