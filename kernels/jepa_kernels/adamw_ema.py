"""AdamW and the exponential moving average of the weights in one pass over memory (arXiv 1711.05101, alg. 2).

    g <- grad_scale * g
    m <- beta1 m + (1 - beta1) g;    v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr * weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    e <- momentum e + (1 - momentum) p

Averages are computed as x + (1 - beta) (new - x), and p by subtracting a small update, so only the final rounding
matters. A separate op computes what depends only on the step, in float64, and increments the step counters. Bytes per
parameter: 28 for AdamW (p, m, v read and written, g read) and 8 for e; 2 less for a 16-bit gradient, 2 more for each
16-bit copy. The CPU kernels are in csrc/adamw_ema.cpp; AdamWEMA (optimizer.py) checks the arguments of these ops.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import BLOCK, CACHES, lerp, pointer, table, tables, upload

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# --- reference: the definition, and the fallback for devices without a kernel


def adamw_ema_coefficients_ref(steps: list[Tensor], numbers: list[Tensor], beta1: float, beta2: float) -> Tensor:
    """Increments the steps and returns [R, 6] float32: one row of update coefficients per parameter.

    numbers: lr, weight_decay, momentum, grad_scale, found_inf. A row: lr * weight_decay, lr / (1 - beta1^t),
    1 / sqrt(1 - beta2^t), 1 - momentum, grad_scale, 1 to apply the update or 0 to skip it.
    """
    lr, weight_decay, momentum, scale, inf = (x.to(steps[0].device, torch.float64) for x in numbers)
    apply = (inf == 0).float()
    for step in steps:
        step.add_(apply)
    t = torch.stack(steps).double()
    row = (lr * weight_decay, lr / (1 - beta1**t), (1 - beta2**t).rsqrt(), 1 - momentum, scale, apply.double())
    return torch.stack([x.expand_as(t) for x in row], 1).float()


def adamw_ema_ref(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    weight_copies: list[Tensor],
    ema_copies: list[Tensor],
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    for i, p in enumerate(params):
        decay, lr, rsqrt_bias2, weight, scale, apply = coefficients[i].to(p.device)
        g = grads[i].float() * scale
        m = torch.lerp(exp_avgs[i], g, 1 - beta1)
        v = torch.lerp(exp_avg_sqs[i], g * g, 1 - beta2)
        new = p - (decay * p + lr * m / (v.sqrt() * rsqrt_bias2 + eps))
        writes = [(p, new), (exp_avgs[i], m), (exp_avg_sqs[i], v)]
        if weight_copies:
            writes.append((weight_copies[i], new))
        if emas:
            ema = torch.lerp(emas[i], new, weight)
            writes += [(emas[i], ema)] + ([(ema_copies[i], ema)] if ema_copies else [])
        for old, value in writes:
            old.copy_(torch.where(apply != 0, value, old))


# --- triton: one small launch for the coefficients of all parameters, then one for all of their elements


@triton.jit
def _coefficients_kernel(
    steps_ptr,  # int64 [R]: addresses of the float32 step counters
    lr_ptr,  # this and the next four: a scalar of any floating-point dtype
    weight_decay_ptr,
    momentum_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    log_betas_ptr,  # float64 [2]
    coefficients_ptr,  # float32 [R, 6]
    R,
    BLOCK_R: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_r = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    apply = tl.where(tl.load(found_inf_ptr) == 0, 1.0, 0.0)
    step_ptrs = tl.load(steps_ptr + offs_r, mask=mask_r, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptrs, mask=mask_r, other=0) + apply
    tl.store(step_ptrs, step, mask=mask_r)
    t = step.to(tl.float64)
    lr = tl.load(lr_ptr).to(tl.float64)
    row_ptrs = coefficients_ptr + 6 * offs_r
    decay = lr * tl.load(weight_decay_ptr).to(tl.float64)
    tl.store(row_ptrs, decay.to(tl.float32), mask=mask_r)
    step_size = lr / (1 - tl.exp(t * tl.load(log_betas_ptr)))
    tl.store(row_ptrs + 1, step_size.to(tl.float32), mask=mask_r)
    rsqrt_bias2 = 1 / tl.sqrt(1 - tl.exp(t * tl.load(log_betas_ptr + 1)))
    tl.store(row_ptrs + 2, rsqrt_bias2.to(tl.float32), mask=mask_r)
    weight = 1 - tl.load(momentum_ptr).to(tl.float64)
    tl.store(row_ptrs + 3, weight.to(tl.float32), mask=mask_r)
    tl.store(row_ptrs + 4, tl.load(grad_scale_ptr).to(tl.float32), mask=mask_r)
    tl.store(row_ptrs + 5, apply, mask=mask_r)


def adamw_ema_coefficients_triton(steps: list[Tensor], numbers: list[Tensor], beta1: float, beta2: float) -> Tensor:
    """Copies numbers and counters that are on the CPU to the device; such counters are incremented on the CPU."""
    device = next((t.device for t in (steps[0], *numbers) if not t.is_cpu), steps[0].device)
    counters = steps
    if steps[0].device != device:
        counters = list(upload(torch.stack(steps), device))
        torch._foreach_add_(steps, 1.0)
    here = [x.item() if x.device != device else 0.0 for x in numbers]
    sent = table((*here, *(math.log(beta) if beta else -math.inf for beta in (beta1, beta2))), torch.float64, device)
    lr, weight_decay, momentum, grad_scale, found_inf = (
        x if x.device == device else sent[i] for i, x in enumerate(numbers)
    )
    coefficients = torch.empty(len(steps), 6, dtype=torch.float32, device=device)
    block = 128
    grid = (triton.cdiv(len(steps), block),)
    with torch.cuda.device_of(coefficients):
        _coefficients_kernel[grid](
            steps_ptr=table(tuple(t.data_ptr() for t in counters), torch.int64, device),
            lr_ptr=lr,
            weight_decay_ptr=weight_decay,
            momentum_ptr=momentum,
            grad_scale_ptr=grad_scale,
            found_inf_ptr=found_inf,
            log_betas_ptr=sent[len(numbers) :],
            coefficients_ptr=coefficients,
            R=len(steps),
            BLOCK_R=block,
            num_warps=4,
        )
    return coefficients


@triton.jit
def _adamw_ema_kernel(
    blocks_ptr,  # int32 [total, 2]: row, block within the row
    rows_ptr,  # int64 [R, 8]: element count, addresses of p, g, m, v, e and the copies of p and e (0: none)
    coefficients_ptr,  # float32 [R, 6]
    beta1_c,  # 1 - beta1
    beta2_c,  # 1 - beta2
    eps,
    GRAD: tl.constexpr,
    EMA: tl.constexpr,
    WEIGHT_COPY: tl.constexpr,
    EMA_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    r = tl.load(blocks_ptr + 2 * pid).to(tl.int64)
    start = tl.load(blocks_ptr + 2 * pid + 1).to(tl.int64) * BLOCK
    row_ptr = rows_ptr + r * 8
    left = tl.load(row_ptr) - start
    coefficient_ptr = coefficients_ptr + r * 6
    addresses = tl.load(row_ptr + 1)
    for column in tl.static_range(2, 8):
        addresses |= tl.load(row_ptr + column)
    wide = (left >= BLOCK) & (addresses % 16 == 0)
    for WIDE in tl.static_range(2):  # a mask or an unaligned address would split wide loads into single elements
        if (tl.load(coefficient_ptr + 5) != 0) & (wide == WIDE):
            PIECE: tl.constexpr = BLOCK if WIDE else BLOCK // 4  # single-element accesses need more registers
            for k in range(0, BLOCK, PIECE):
                _update(
                    row_ptr, coefficient_ptr, start + k, left - k, beta1_c, beta2_c, eps,
                    GRAD, EMA, WEIGHT_COPY, EMA_COPY, WIDE, PIECE,
                )  # fmt: skip


@triton.jit
def _update(
    row_ptr,  # int64 [8]
    coefficient_ptr,  # float32 [6]
    start,
    left,
    beta1_c,
    beta2_c,
    eps,
    GRAD: tl.constexpr,
    EMA: tl.constexpr,
    WEIGHT_COPY: tl.constexpr,
    EMA_COPY: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
):
    decay = tl.load(coefficient_ptr)
    lr = tl.load(coefficient_ptr + 1)
    rsqrt_bias2 = tl.load(coefficient_ptr + 2)
    weight = tl.load(coefficient_ptr + 3)
    scale = tl.load(coefficient_ptr + 4)
    offs = tl.arange(0, PIECE)
    mask = None if WIDE else offs < left
    p_ptrs = pointer(tl.load(row_ptr + 1), tl.float32, start, WIDE) + offs
    g_ptrs = pointer(tl.load(row_ptr + 2), GRAD, start, WIDE) + offs
    m_ptrs = pointer(tl.load(row_ptr + 3), tl.float32, start, WIDE) + offs
    v_ptrs = pointer(tl.load(row_ptr + 4), tl.float32, start, WIDE) + offs
    e_ptrs = pointer(tl.load(row_ptr + 5), tl.float32, start, WIDE) + offs
    g = tl.load(g_ptrs, mask=mask).to(tl.float32) * scale
    m = tl.load(m_ptrs, mask=mask)
    v = tl.load(v_ptrs, mask=mask)
    p = tl.load(p_ptrs, mask=mask)
    if EMA:
        e = tl.load(e_ptrs, mask=mask)
    m = lerp(m, g, beta1_c)
    v = lerp(v, g * g, beta2_c)
    tiny = v < 1e-30  # tl.sqrt flushes subnormals to 0, and eps may be 0
    root = tl.sqrt(tl.where(tiny, v * 2.0**64, v)) * tl.where(tiny, 2.0**-32, 1.0)
    p -= decay * p + lr * m / (root * rsqrt_bias2 + eps)
    tl.store(m_ptrs, m, mask=mask)
    tl.store(v_ptrs, v, mask=mask)
    tl.store(p_ptrs, p, mask=mask)
    if WEIGHT_COPY is not None:
        copy_ptrs = pointer(tl.load(row_ptr + 6), WEIGHT_COPY, start, WIDE) + offs
        tl.store(copy_ptrs, p.to(WEIGHT_COPY), mask=mask)
    if EMA:
        e = lerp(e, p, weight)
        tl.store(e_ptrs, e, mask=mask)
        if EMA_COPY is not None:
            copy_ptrs = pointer(tl.load(row_ptr + 7), EMA_COPY, start, WIDE) + offs
            tl.store(copy_ptrs, e.to(EMA_COPY), mask=mask)


def adamw_ema_triton(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    weight_copies: list[Tensor],
    ema_copies: list[Tensor],
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Each list has a single dtype; `emas` and the copies have one tensor per parameter or are empty."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, emas, weight_copies, ema_copies)
    columns = [[t.data_ptr() for t in tensors] or [0] * len(params) for tensors in lists]
    blocks, rows = tables(list(zip((p.numel() for p in params), *columns, strict=True)), params[0].device)
    if coefficients.device.type == "cpu":
        coefficients = upload(coefficients, params[0].device)
    if len(blocks):
        with torch.cuda.device_of(params[0]):
            _adamw_ema_kernel[(len(blocks),)](
                blocks_ptr=blocks,
                rows_ptr=rows,
                coefficients_ptr=coefficients,
                beta1_c=1 - beta1,
                beta2_c=1 - beta2,
                eps=eps,
                GRAD=DTYPES[grads[0].dtype],
                EMA=bool(emas),
                WEIGHT_COPY=DTYPES[weight_copies[0].dtype] if weight_copies else None,
                EMA_COPY=DTYPES[ema_copies[0].dtype] if ema_copies else None,
                BLOCK=BLOCK,
            )


# --- registration; csrc registers the CPU kernels

torch.library.define(
    "jepa_kernels::adamw_ema_coefficients_",
    "(Tensor(a!)[] steps, Tensor[] numbers, float beta1, float beta2) -> Tensor",
    tags=CACHES,
)
torch.library.impl("jepa_kernels::adamw_ema_coefficients_", "default", adamw_ema_coefficients_ref)
torch.library.impl("jepa_kernels::adamw_ema_coefficients_", "cuda", adamw_ema_coefficients_triton)


@torch.library.register_fake("jepa_kernels::adamw_ema_coefficients_")
def _coefficients_fake(steps: list[Tensor], numbers: list[Tensor], beta1: float, beta2: float) -> Tensor:
    device = next((t.device for t in (steps[0], *numbers) if not t.is_cpu), steps[0].device)
    return torch.empty(len(steps), 6, dtype=torch.float32, device=device)


torch.library.define(
    "jepa_kernels::adamw_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas, "
    "Tensor(e!)[] weight_copies, Tensor(f!)[] ema_copies, Tensor coefficients, float beta1, float beta2, "
    "float eps) -> ()",
    tags=CACHES,
)
torch.library.impl("jepa_kernels::adamw_ema_", "default", adamw_ema_ref)
torch.library.impl("jepa_kernels::adamw_ema_", "cuda", adamw_ema_triton)
torch.library.register_fake("jepa_kernels::adamw_ema_", lambda *args: None)
