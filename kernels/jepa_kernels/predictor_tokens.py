"""The predictor's input: visible tokens and mask tokens plus positions, one sequence per target block.

    y[m*B + b, k]      = context[b, k] + pos[context_index[b, k]]        k < Kc
    y[m*B + b, Kc + t] = mask_token    + pos[target_index[m, b, t]]      t < Kt

Shapes: B images, M target blocks, Kc visible and Kt hidden tokens, N positions, D the predictor's width. One
pass: y is written once; on a GPU, context is read once. The CPU kernel is in csrc/predictor_tokens.cpp. I-JEPA, arXiv
2301.08243, section 3.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

from .checks import ASSERTING, check_floats, check_index
from .tiles import chunk, tile


def predictor_tokens(
    context: Tensor, context_index: Tensor, target_index: Tensor, pos: Tensor, mask_token: Tensor
) -> Tensor:
    """Builds one sequence [context, mask tokens] for every target block of every image.

    Args:
        context: [B, Kc, D], float32, float64, bfloat16 or float16, any strides.
        context_index: [B, Kc] int64, the position of each visible token, 0..N-1.
        target_index: [M, B, Kt] int64, the positions to predict, 0..N-1.
        pos: [N, D] position table, dtype of `context` or float32; it gets no gradient and may not require one.
        mask_token: [D], dtype of `context` or float32.

    Returns:
        [M*B, Kc+Kt, D], contiguous, block-major rows, dtype of `context`; added in float32, rounded once.
        Gradients of `context` (summed over blocks) and `mask_token` (over all its copies) are accumulated in
        float32 (float64 for float64) in a fixed order, so they are bitwise reproducible.

    Raises:
        ValueError: wrong rank, dtype or device, sizes that differ, an index out of range (checked on a CPU only;
            on a GPU the kernel asserts), a `pos` that requires a gradient.
    """
    check_floats("predictor_tokens", "context", context, "[B, Kc, D]")
    B, Kc, D = context.shape
    for name, tensor, ndim in (("pos", pos, 2), ("mask_token", mask_token, 1)):
        right = tensor.dtype in (context.dtype, torch.float32) and tensor.device == context.device
        if tensor.ndim != ndim or tensor.shape[-1] != D or not right:
            raise ValueError(
                f"predictor_tokens: {name} must be {'[N, D]' if ndim == 2 else '[D]'} with D = {D}, "
                f"{context.dtype} or float32, on {context.device}; "
                f"got {list(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
            )
    if torch.is_grad_enabled() and pos.requires_grad:
        raise ValueError("predictor_tokens: pos requires a gradient, but receives none; pass pos.detach()")
    check_index("predictor_tokens", "context_index", context_index, (B, Kc), pos.shape[0], context)
    check_index("predictor_tokens", "target_index", target_index, (None, B, None), pos.shape[0], context)
    if torch.is_grad_enabled() and (context.requires_grad or mask_token.requires_grad):
        return _PredictorTokens.apply(context, context_index, target_index, pos, mask_token)
    return torch.ops.jepa_kernels.predictor_tokens(context, context_index, target_index, pos, mask_token)


# --- reference


def predictor_tokens_ref(
    context_BKD: Tensor, context_index: Tensor, target_index: Tensor, pos_ND: Tensor, mask_token_D: Tensor
) -> Tensor:
    M, B, Kt = target_index.shape
    _, Kc, D = context_BKD.shape
    wide = torch.promote_types(context_BKD.dtype, torch.float32)
    seen = context_BKD.to(wide) + embedding(context_index, pos_ND.to(wide))
    hidden = mask_token_D.to(wide) + embedding(target_index, pos_ND.to(wide))
    tokens = torch.cat([seen.expand(M, B, Kc, D), hidden], dim=2)
    return tokens.reshape(M * B, Kc + Kt, D).to(context_BKD.dtype)


def predictor_tokens_backward_ref(dy: Tensor, M: int, B: int, Kc: int) -> tuple[Tensor, Tensor]:
    wide = dy.reshape(M, B, dy.shape[1], dy.shape[2]).to(torch.promote_types(dy.dtype, torch.float32))
    return wide[:, :, :Kc].sum(0).to(dy.dtype), wide[:, :, Kc:].sum((0, 1, 2))


# --- triton: a program builds BLOCK_S tokens of one image in registers and writes them to its M sequences


@triton.jit(do_not_specialize=["B", "Kc", "Kt"])  # Kc and Kt change from step to step
def _predictor_tokens_kernel(
    context_ptr,  # [B, Kc, D]
    context_index_ptr,  # [B, Kc]
    target_index_ptr,  # [M, B, Kt]
    pos_ptr,  # [N, D]
    mask_token_ptr,  # [D]
    y_ptr,  # [M*B, Kc+Kt, D]
    B,
    Kc,
    Kt,
    N,
    stride_b,  # of context
    stride_k,
    stride_d,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    S = Kc + Kt
    tiles_s = tl.cdiv(S, BLOCK_S)
    pid = tl.program_id(0)
    b = (pid // tiles_s).to(tl.int64)
    offs_s = pid % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)
    seen = offs_s < Kc
    hidden = (offs_s >= Kc) & (offs_s < S)
    seen_n = tl.load(context_index_ptr + b * Kc + offs_s, mask=seen, other=0)
    right = (seen_n >= 0) & (seen_n < N)
    hidden_n = tl.tuple([])
    for m in tl.static_range(M):
        hidden_n += (tl.load(target_index_ptr + (m * B + b) * Kt + offs_s - Kc, mask=hidden, other=0),)
        right &= (hidden_n[m] >= 0) & (hidden_n[m] < N)
    tl.device_assert(right, "predictor_tokens: context_index or target_index out of range")
    offs_chunk = tl.arange(0, BLOCK_D)
    context_ptrs = context_ptr + (b * stride_b + offs_s.to(tl.int64) * stride_k)[:, None]
    tokens = tl.tuple([])  # by chunk: context + pos if seen; else the mask token, its position not added yet
    for start_d in tl.static_range(0, D, BLOCK_D):
        offs_d = (start_d + offs_chunk)[None, :]
        mask = seen[:, None] & (offs_d < D)
        x = tl.load(context_ptrs + offs_d.to(tl.int64) * stride_d, mask=mask, other=0).to(wide)
        x += tl.load(pos_ptr + seen_n[:, None] * D + offs_d, mask=mask, other=0).to(wide)
        mask_token = tl.load(mask_token_ptr + offs_d, mask=offs_d < D, other=0).to(wide)
        tokens += (tl.where(seen[:, None], x, mask_token),)
    for m in tl.static_range(M):
        y_ptrs = y_ptr + ((m * B + b) * S + offs_s)[:, None] * D
        for c in tl.static_range(len(tokens)):
            offs_d = (c * BLOCK_D + offs_chunk)[None, :]
            pos_ptrs = pos_ptr + hidden_n[m][:, None] * D + offs_d
            mask_d = offs_d < D
            x = tokens[c] + tl.load(pos_ptrs, mask=hidden[:, None] & mask_d, other=0).to(wide)
            tl.store(y_ptrs + offs_d, x.to(y_ptr.dtype.element_ty), mask=(offs_s < S)[:, None] & mask_d)


@triton.jit(do_not_specialize=["Kc", "S"])
def _predictor_tokens_backward_kernel(
    dy_ptr,  # [M*B, S, D]
    d_context_ptr,  # [B, Kc, D]
    partial_ptr,  # [B, tiles from the first with a mask token on, D]: sums over each tile's mask tokens
    B,
    Kc,
    S,
    D,
    stride_q,  # of dy
    stride_s,
    stride_d,
    M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(D, BLOCK_D)
    tiles_s = tl.cdiv(S, BLOCK_S)
    b = (pid // tiles_d // tiles_s).to(tl.int64)
    tile_s = pid // tiles_d % tiles_s
    offs_s = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_d = (pid % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_s < S)[:, None] & (offs_d < D)[None, :]
    dy_ptrs = dy_ptr + offs_s.to(tl.int64)[:, None] * stride_s + offs_d.to(tl.int64)[None, :] * stride_d
    total = tl.zeros((BLOCK_S, BLOCK_D), partial_ptr.dtype.element_ty)
    for m in tl.static_range(M):
        total += tl.load(dy_ptrs + (m * B + b) * stride_q, mask=mask, other=0).to(total.dtype)
    seen = offs_s < Kc
    d_context_ptrs = d_context_ptr + (b * Kc + offs_s)[:, None] * D + offs_d[None, :]
    tl.store(d_context_ptrs, total.to(d_context_ptr.dtype.element_ty), mask=seen[:, None] & (offs_d < D)[None, :])
    first = Kc // BLOCK_S  # tile with a mask token
    hidden = tl.sum(tl.where(seen[:, None], 0, total), 0)
    partial_ptrs = partial_ptr + (b * (tiles_s - first) + tile_s - first) * D + offs_d
    tl.store(partial_ptrs, hidden, mask=(offs_d < D) & (tile_s >= first))


def predictor_tokens_triton(
    context: Tensor, context_index: Tensor, target_index: Tensor, pos: Tensor, mask_token: Tensor
) -> Tensor:
    (M, B, Kt), (_, Kc, D) = target_index.shape, context.shape
    y = context.new_empty(M * B, Kc + Kt, D)
    if y.numel():
        block_s = min(triton.next_power_of_2(Kc + Kt), max(1, 4096 // triton.next_power_of_2(D)))
        grid = (B * triton.cdiv(Kc + Kt, block_s),)
        with torch.cuda.device_of(context):
            _predictor_tokens_kernel[grid](
                context_ptr=context,
                context_index_ptr=context_index.contiguous(),
                target_index_ptr=target_index.contiguous(),
                pos_ptr=pos.contiguous(),
                mask_token_ptr=mask_token.contiguous(),
                y_ptr=y,
                B=B,
                Kc=Kc,
                Kt=Kt,
                N=pos.shape[0],
                stride_b=context.stride(0),
                stride_k=context.stride(1),
                stride_d=context.stride(2),
                M=M,
                D=D,
                BLOCK_S=block_s,
                BLOCK_D=chunk(D),
                **ASSERTING,
            )
    return y


def predictor_tokens_backward_triton(dy: Tensor, M: int, B: int, Kc: int) -> tuple[Tensor, Tensor]:
    _, S, D = dy.shape
    wide = torch.promote_types(dy.dtype, torch.float32)
    if not dy.numel():
        return dy.new_zeros(B, Kc, D), dy.new_zeros(D, dtype=wide)
    block_s, block_d = tile(S, D, wide.itemsize)
    tiles_s = triton.cdiv(S, block_s)
    d_context = dy.new_empty(B, Kc, D)
    partial = dy.new_empty(B * (tiles_s - Kc // block_s), D, dtype=wide)
    grid = (B * tiles_s * triton.cdiv(D, block_d),)
    with torch.cuda.device_of(dy):
        _predictor_tokens_backward_kernel[grid](
            dy_ptr=dy,
            d_context_ptr=d_context,
            partial_ptr=partial,
            B=B,
            Kc=Kc,
            S=S,
            D=D,
            stride_q=dy.stride(0),
            stride_s=dy.stride(1),
            stride_d=dy.stride(2),
            M=M,
            BLOCK_S=block_s,
            BLOCK_D=block_d,
        )
    return d_context, partial.sum(0)


# --- registration

torch.library.define(
    "jepa_kernels::predictor_tokens",
    "(Tensor context, Tensor context_index, Tensor target_index, Tensor pos, Tensor mask_token) -> Tensor",
)
torch.library.impl("jepa_kernels::predictor_tokens", "default", predictor_tokens_ref)
torch.library.impl("jepa_kernels::predictor_tokens", "cuda", predictor_tokens_triton)
torch.library.define(
    "jepa_kernels::predictor_tokens_backward",
    "(Tensor dy, SymInt M, SymInt B, SymInt Kc) -> (Tensor, Tensor)",
)
torch.library.impl("jepa_kernels::predictor_tokens_backward", "default", predictor_tokens_backward_ref)
torch.library.impl("jepa_kernels::predictor_tokens_backward", "cuda", predictor_tokens_backward_triton)


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
