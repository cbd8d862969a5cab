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


# --- triton: a program builds ROWS tokens of one image in registers and writes them to its M sequences


@triton.jit(do_not_specialize=["B", "Kc", "Kt"])  # Kc and Kt change from step to step
def _predictor_tokens_kernel(
    context,  # [B, Kc, D]
    context_index,  # [B, Kc]
    target_index,  # [M, B, Kt]
    pos,  # [N, D]
    mask_token,  # [D]
    y,  # [M*B, Kc+Kt, D]
    B,
    Kc,
    Kt,
    N,
    context_b,  # strides of context
    context_k,
    context_d,
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    S = Kc + Kt
    tiles = tl.cdiv(S, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    s = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    seen, hidden = s < Kc, (s >= Kc) & (s < S)
    n = tl.load(context_index + b * Kc + s, seen, other=0)
    right = (n >= 0) & (n < N)
    asked = tl.tuple([])
    for m in tl.static_range(M):
        asked += (tl.load(target_index + (m * B + b) * Kt + s - Kc, hidden, other=0),)
        right &= (asked[m] >= 0) & (asked[m] < N)
    tl.device_assert(right, "predictor_tokens: context_index or target_index out of range")
    column = tl.arange(0, BLOCK_D)
    row = context + (b * context_b + s.to(tl.int64) * context_k)[:, None]
    token = tl.tuple([])  # context + pos if seen; else the mask token, its position not added yet
    for start in tl.static_range(0, D, BLOCK_D):
        d = (start + column)[None, :]
        inside = seen[:, None] & (d < D)
        x = tl.load(row + d.to(tl.int64) * context_d, inside, other=0).to(wide)
        x += tl.load(pos + n[:, None] * D + d, inside, other=0).to(wide)
        mask = tl.load(mask_token + d, d < D, other=0).to(wide)
        token += (tl.where(seen[:, None], x, mask),)
    for m in tl.static_range(M):
        to = y + ((m * B + b) * S + s)[:, None] * D
        for c in tl.static_range(len(token)):
            d = (c * BLOCK_D + column)[None, :]
            x = token[c] + tl.load(pos + asked[m][:, None] * D + d, hidden[:, None] & (d < D), other=0).to(wide)
            tl.store(to + d, x.to(y.dtype.element_ty), (s < S)[:, None] & (d < D))


@triton.jit(do_not_specialize=["Kc", "S"])
def _predictor_tokens_backward_kernel(
    dy,  # [M*B, S, D]
    d_context,  # [B, Kc, D]
    partial,  # [B, tiles from the first with a mask token on, D]: sums over each tile's mask tokens
    B,
    Kc,
    S,
    D,
    dy_s,  # strides of dy
    dy_k,
    dy_d,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    columns, tiles = tl.cdiv(D, BLOCK_D), tl.cdiv(S, ROWS)
    b, tile = (program // columns // tiles).to(tl.int64), program // columns % tiles
    s = tile * ROWS + tl.arange(0, ROWS)
    d = (program % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (s < S)[:, None] & (d < D)[None, :]
    at = dy + s.to(tl.int64)[:, None] * dy_k + d.to(tl.int64)[None, :] * dy_d
    total = tl.zeros((ROWS, BLOCK_D), partial.dtype.element_ty)
    for m in tl.static_range(M):
        total += tl.load(at + (m * B + b) * dy_s, mask=inside, other=0).to(total.dtype)
    seen = s < Kc
    to = d_context + (b * Kc + s)[:, None] * D + d[None, :]
    tl.store(to, total.to(d_context.dtype.element_ty), mask=seen[:, None] & (d < D)[None, :])
    first = Kc // ROWS
    hidden = tl.sum(tl.where(seen[:, None], 0, total), 0)
    tl.store(partial + (b * (tiles - first) + tile - first) * D + d, hidden, mask=(d < D) & (tile >= first))


def predictor_tokens_triton(
    context: Tensor, context_index: Tensor, target_index: Tensor, pos: Tensor, mask_token: Tensor
) -> Tensor:
    (M, B, Kt), (_, Kc, D) = target_index.shape, context.shape
    y = context.new_empty(M * B, Kc + Kt, D)
    if y.numel():
        columns = chunk(D)
        rows = min(triton.next_power_of_2(Kc + Kt), max(1, 4096 // triton.next_power_of_2(D)))
        grid = (B * triton.cdiv(Kc + Kt, rows),)
        tables = pos.contiguous(), mask_token.contiguous()
        indices = context_index.contiguous(), target_index.contiguous()
        sizes = B, Kc, Kt, pos.shape[0], *context.stride(), M, D
        with torch.cuda.device_of(context):
            _predictor_tokens_kernel[grid](context, *indices, *tables, y, *sizes, rows, columns, **ASSERTING)
    return y


def predictor_tokens_backward_triton(dy: Tensor, M: int, B: int, Kc: int) -> tuple[Tensor, Tensor]:
    _, S, D = dy.shape
    wide = torch.promote_types(dy.dtype, torch.float32)
    if not dy.numel():
        return dy.new_zeros(B, Kc, D), dy.new_zeros(D, dtype=wide)
    rows, block_d = tile(S, D, wide.itemsize)
    tiles = triton.cdiv(S, rows)
    d_context = dy.new_empty(B, Kc, D)
    partial = dy.new_empty(B * (tiles - Kc // rows), D, dtype=wide)
    grid = (B * tiles * triton.cdiv(D, block_d),)
    with torch.cuda.device_of(dy):
        _predictor_tokens_backward_kernel[grid](dy, d_context, partial, B, Kc, S, D, *dy.stride(), M, rows, block_d)
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
