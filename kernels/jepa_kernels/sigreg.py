"""SIGReg: how far random one-dimensional projections of embeddings are from a standard normal, and the gradient.

Shapes: V views, N rows (images; G over all ranks), D channels, S slices (directions), K knots t_k = k * step, at which
the characteristic function of a slice's projections, mean_n exp(i t x_n), is compared with a normal's, exp(-t^2/2).
(At t = 0 both are 1.) What is stored is the projections x [V, N, S] and a table [K, 2, V, S] of sums over rows, which
is all that ranks exchange. exp(i t_k x) itself is the k-th power of exp(i step x): one sine and cosine per projection
give it at every knot, in registers, and again in the backward. The CPU kernels are in csrc/sigreg.cpp.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_floats
from .precision import no_autocast, wide


def sigreg(
    z: Tensor, slices: Tensor, *, knots: int = 17, t_max: float = 3.0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The Epps-Pulley statistic of projections against the standard normal, the mean over views and slices.

    With x = z @ slices, and over all G rows c(t) = mean_n cos(t x_n), s(t) = mean_n sin(t x_n):

        statistic = G * integral from -t_max to t_max of |c(t) + i s(t) - phi(t)|^2 phi(t) dt,  phi(t) = exp(-t^2/2)

    by the trapezoid rule on `knots` equally spaced t in [0, t_max], doubled for t < 0. LeJEPA, arXiv 2511.08544,
    SIGReg and its code, whose knots and t_max are the defaults.

    Args:
        z: [V, N, D], float32, float64, bfloat16 or float16, any strides. Every view has a statistic of its own.
        slices: [D, S], one of these dtypes, on z's device, columns of norm 1 (`sigreg_slices` draws them). The same
            on all ranks. They get no gradient and may not require one.
        knots: number of knots, 0 and t_max included; at least 2.
        t_max: the last knot. Projections of a standard normal have |x| < 4: t_max * |x| counts radians.
        group: a process group; the statistic is over the rows of all its ranks, which may hold different numbers of
            rows, even none.

    Returns:
        A float32 scalar (float64 for float64 input), computed in that dtype, under autocast too. Training keeps the
        projections, [V, N, S], and the table, [knots - 1, 2, V, S]. If all projections of a view are 0, so is its
        gradient: there the statistic does not push collapsed embeddings apart. With a `group`, all ranks return the
        same number, and the gradient is that of the sum of all ranks' losses: averaged over ranks, as DDP and ZeRO
        do, gradients equal those of one process with all rows. All ranks must call this, and its backward, together,
        with the same V, S and knots.

    Raises:
        ValueError: wrong rank, dtype or device, sizes that differ or are 0, slices that require a gradient, fewer than
            2 knots, a t_max that is not positive and finite.
    """
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    check_floats("sigreg", "z", z, "[V, N, D]")
    check_floats("sigreg", "slices", slices, "[D, S]")
    V, N, D = z.shape
    if V < 1 or D < 1 or (N < 1 and group is None):
        raise ValueError(f"sigreg: z must have at least one view, row and channel; got {list(z.shape)}")
    if slices.shape[0] != D or slices.shape[1] < 1 or slices.device != z.device:
        raise ValueError(
            f"sigreg: slices must be [{D}, S] on {z.device} for z {list(z.shape)}, with at least one slice; "
            f"got {list(slices.shape)} on {slices.device}"
        )
    if torch.is_grad_enabled() and slices.requires_grad:
        raise ValueError("sigreg: slices require a gradient, but receive none; pass slices.detach()")
    if not isinstance(knots, int) or knots < 2:
        raise ValueError(f"sigreg: knots must be an integer >= 2, the first at 0 and the last at t_max; got {knots}")
    if not 0 < t_max < math.inf:
        raise ValueError(f"sigreg: t_max must be finite and > 0; got {t_max}")
    if torch.is_grad_enabled() and z.requires_grad:
        return _SIGReg.apply(z, slices, knots, t_max, group)
    return _forward(z, slices, knots, t_max, group)[0]


def sigreg_slices(D: int, S: int, *, seed: int, step: int, device: torch.device | str | None = None) -> Tensor:
    """Random directions that every rank draws alike, from (seed, step) alone: nothing is sent, no state is kept.

    Uniform on the sphere: independent standard normals, divided by the norm of their column. The normals are Box and
    Muller's, of words from Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and the step in the counter.

    Args:
        D, S: dimensions and number of directions, at least 1, with D*S at most 2^34.
        seed, step: 0..2^63 - 1.
        device: where they are drawn; nothing is copied there, and the host does not wait.

    Returns:
        [D, S] float32, columns of norm 1: the same bits on ranks with the same kind of device. The random words are the
        same on every kind; what is computed from them may differ between kinds by float32 rounding.

    Raises:
        ValueError: sizes, seed or step out of range.
    """
    if D < 1 or S < 1 or D * S > 2**34:
        raise ValueError(f"sigreg_slices: D and S must be at least 1, and D*S at most 2^34; got {D} and {S}")
    if not (0 <= seed < 2**63 and 0 <= step < 2**63):
        raise ValueError(f"sigreg_slices: seed and step must be in 0..2^63 - 1; got {seed} and {step}")
    normals = torch.empty(D, S, device=device)
    torch.ops.jepa_kernels.sigreg_normals_(normals, seed, step)
    return normals.div_(torch.linalg.vector_norm(normals, dim=0))


def _quadrature(knots: int, t_max: float) -> tuple[float, list[float], list[float]]:
    """The step between knots and, for every knot but 0, phi and the root of its weight (trapezoid times phi).

    The table is multiplied by the root, so that its squared norm is the integral.
    """
    K = knots - 1
    step = t_max / K
    phi = [math.exp(-((step * k) ** 2) / 2) for k in range(1, K + 1)]
    return step, phi, [math.sqrt((step if k == K else 2 * step) * p) for k, p in enumerate(phi, 1)]


def _forward(
    z: Tensor, slices: Tensor, knots: int, t_max: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The statistic and, for the backward, the projections, the table over all ranks and the number of all rows."""
    with no_autocast(z):
        x = z.to(wide(z)) @ slices.to(wide(z))
    table = torch.ops.jepa_kernels.sigreg_table(x, *_quadrature(knots, t_max))
    rows = table.new_full((1,), z.shape[1])
    if group is not None:
        shared = torch.cat([table.flatten(), rows])
        dist.all_reduce(shared, group=group)
        table, rows = shared[:-1].view(table.shape), shared[-1:]
    squares = torch.linalg.vector_norm(table, dim=3).square().sum()
    return squares / (rows[0] * (x.shape[0] * x.shape[2])), (x, table, rows)


class _SIGReg(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, slices: Tensor, knots: int, t_max: float, group: dist.ProcessGroup | None
    ) -> Tensor:
        statistic, saved = _forward(z, slices, knots, t_max, group)
        ctx.save_for_backward(slices, *saved)
        ctx.dtype, ctx.options = z.dtype, (knots, t_max, group)
        return statistic

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        slices, x, table, rows = ctx.saved_tensors
        knots, t_max, group = ctx.options
        if group is not None:
            grad = grad.clone()
            dist.all_reduce(grad, group=group)  # the losses of all ranks depend on these rows
        step, _, weight = _quadrature(knots, t_max)
        slope = [w * step * k for k, w in enumerate(weight, 1)]
        scale = grad * 2 / (rows * (x.shape[0] * x.shape[2]))
        dx = torch.ops.jepa_kernels.sigreg_backward(x, table, scale, step, slope)
        with no_autocast(x):
            return (dx @ slices.to(x.dtype).T).to(ctx.dtype), None, None, None, None


# --- reference


def sigreg_table_ref(x_VNS: Tensor, step: float, phi: list[float], weight: list[float]) -> Tensor:
    """weight_k * the sums over rows of (cos(t_k x) - phi_k, sin(t_k x)): [K, 2, V, S]."""
    table = x_VNS.new_empty(len(phi), 2, x_VNS.shape[0], x_VNS.shape[2])
    for k, row in enumerate(table):
        angle = x_VNS * (step * (k + 1))
        row[0] = angle.cos().sum(1).sub_(phi[k] * x_VNS.shape[1]).mul_(weight[k])
        row[1] = angle.sin().sum(1).mul_(weight[k])
    return table


def sigreg_backward_ref(x_VNS: Tensor, table: Tensor, scale: Tensor, step: float, slope: list[float]) -> Tensor:
    """scale * the sum over k of slope_k * (table[k, 1] cos(t_k x) - table[k, 0] sin(t_k x))."""
    grad = x_VNS.new_zeros(x_VNS.shape)
    for k, (cosines, sines) in enumerate(table[:, :, :, None]):
        angle = x_VNS * (step * (k + 1))
        grad.addcmul_(angle.cos(), sines, value=slope[k]).addcmul_(angle.sin(), cosines, value=-slope[k])
    return grad.mul_(scale)


_LOW = 2**32 - 1  # the lower word
_PURPOSE = 0x51C3  # in the counter: keeps the words apart from others drawn with the same seed and step


def sigreg_normals_ref(out: Tensor, seed: int, step: int) -> None:
    """Fills `out` with standard normals; in order, four from the words of a counter (index, purpose, step)."""
    index = torch.arange((out.numel() + 3) // 4, device=out.device)
    words = _philox4x32((index, _PURPOSE, step & _LOW, step >> 32), (seed & _LOW, seed >> 32))
    a, b, c, d = (word.double() for word in words)
    pairs = []
    for u, v in ((a, b), (c, d)):
        radius, angle = (-2 * ((u + 0.5) / 2**32).log()).sqrt(), v * (math.tau / 2**32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    out.copy_(torch.stack(pairs, 1).flatten()[: out.numel()].view(out.shape))


def _philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words, in int64, of a 128-bit counter (integers or tensors) and a 64-bit key."""
    a, b, c, d = counter
    k, l = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32 & _LOW) ^ b ^ k, q & _LOW, (p >> 32 & _LOW) ^ d ^ l, p & _LOW
        k, l = k + 0x9E3779B9 & _LOW, l + 0xBB67AE85 & _LOW
    return a, b, c, d


# --- triton: a warp sums the rows of 32 slices; each of its threads keeps the sums of one slice at all knots


@triton.jit
def _unit_circle(x, TURNS: tl.constexpr):
    """cos and sin of 2 pi TURNS x, for any x.

    Reduced in float64, by half turns; then Taylor's series, nested, for angles up to a quarter turn. (CUDA's own sine
    spills for the sake of large angles.)
    """
    turns = x.to(tl.float64) * TURNS
    turns -= tl.floor(turns)
    half = tl.floor(2 * turns + 0.5)
    angle = ((turns - 0.5 * half) * 6.283185307179586).to(x.dtype)
    square = angle * angle
    TERMS: tl.constexpr = 10 if x.dtype == tl.float64 else 6
    c = tl.full(x.shape, 1, x.dtype)
    s = tl.full(x.shape, 1, x.dtype)
    for j in tl.static_range(TERMS, 0, -1):
        c = 1 - c * (square * (1 / ((2 * j - 1) * (2 * j))))
        s = 1 - s * (square * (1 / ((2 * j) * (2 * j + 1))))
    sign = tl.where(half == 1, -1, 1).to(x.dtype)
    return sign * c, sign * s * angle


@triton.jit(do_not_specialize=["N", "rows"])
def _table_kernel(
    x_ptr,  # [V, N, S]
    table_ptr,  # [N / rows, all K, 2, V, S]
    N,
    S,
    rows,  # per program
    knots,  # all K; this launch writes those after FIRST
    TURNS: tl.constexpr,
    FIRST: tl.constexpr,
    PHI: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    K: tl.constexpr = len(PHI)
    pid_n = tl.program_id(0)
    pid_s = tl.program_id(1)
    pid_v = tl.program_id(2)
    V = tl.num_programs(2).to(tl.int64)
    offs_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = offs_s < S
    start = pid_n * rows
    stop = tl.minimum(start + rows, N)
    x_ptrs = x_ptr + (pid_v.to(tl.int64) * N + start) * S + offs_s
    sums = tl.tuple([])
    for _ in tl.static_range(2 * K):
        sums += (tl.zeros([BLOCK_S], x_ptr.dtype.element_ty),)
    for _ in range(start, stop):
        value = tl.load(x_ptrs, mask, other=0)
        x_ptrs += S
        step_c, step_s = _unit_circle(value, TURNS)
        c = step_c
        s = step_s
        if FIRST:
            c, s = _unit_circle(value, TURNS * (FIRST + 1))
        added = tl.tuple([])
        for k in tl.static_range(K):
            added += (sums[2 * k] + c, sums[2 * k + 1] + s)
            c, s = c * step_c - s * step_s, s * step_c + c * step_s
        sums = added
    count = (stop - start).to(x_ptr.dtype.element_ty)
    table_ptrs = table_ptr + ((pid_n * knots + FIRST) * 2 * V + pid_v) * S + offs_s
    for k in tl.static_range(K):
        tl.store(table_ptrs, (sums[2 * k] - count * PHI[k]) * WEIGHT[k], mask)
        tl.store(table_ptrs + V * S, sums[2 * k + 1] * WEIGHT[k], mask)
        table_ptrs += 2 * V * S


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    x_ptr,  # [V, N, S]
    table_ptr,  # [K, 2, V, S]
    scale_ptr,  # scalar
    grad_ptr,  # [V, N, S]
    N,
    S,
    TURNS: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    K: tl.constexpr = len(SLOPE)
    pid_n = tl.program_id(0)
    pid_s = tl.program_id(1)
    pid_v = tl.program_id(2)
    V = tl.num_programs(2).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    mask = (offs_n < N)[:, None] & mask_s[None, :]
    offs = (pid_v.to(tl.int64) * N + offs_n)[:, None] * S + offs_s[None, :]
    step_c, step_s = _unit_circle(tl.load(x_ptr + offs, mask, other=0), TURNS)
    # Horner's rule for the real part of the sum of (sines_k + i cosines_k) exp(i t_k x)
    real = tl.zeros([BLOCK_N, BLOCK_S], x_ptr.dtype.element_ty)
    imaginary = tl.zeros([BLOCK_N, BLOCK_S], x_ptr.dtype.element_ty)
    table_ptrs = table_ptr + ((2 * K - 2) * V + pid_v) * S + offs_s
    for k in tl.static_range(K - 1, -1, -1):
        imaginary += tl.load(table_ptrs, mask_s, other=0)[None, :] * SLOPE[k]
        real += tl.load(table_ptrs + V * S, mask_s, other=0)[None, :] * SLOPE[k]
        table_ptrs -= 2 * V * S
        real, imaginary = real * step_c - imaginary * step_s, imaginary * step_c + real * step_s
    tl.store(grad_ptr + offs, real * tl.load(scale_ptr), mask)


@triton.jit(do_not_specialize=["seed", "step"])
def _normals_kernel(
    out_ptr,  # [count]
    count,
    seed,
    step,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,  # counters per program, four numbers each
):
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.uint32)
    low = step.to(tl.uint32)
    high = (step.to(tl.int64) >> 32).to(tl.uint32)
    words = tl.philox(seed.to(tl.int64), offs.to(tl.uint32), zero + PURPOSE, zero + low, zero + high)
    for j in tl.static_range(2):
        u = (words[2 * j].to(tl.float64) + 0.5) / 4294967296
        radius = tl.sqrt(-2 * tl.log(u))
        c, s = _unit_circle(words[2 * j + 1].to(tl.float64), 1 / 4294967296)
        offs_out = 4 * offs + 2 * j
        tl.store(out_ptr + offs_out, (radius * c).to(tl.float32), offs_out < count)
        tl.store(out_ptr + offs_out + 1, (radius * s).to(tl.float32), offs_out + 1 < count)


def sigreg_normals_triton(out: Tensor, seed: int, step: int) -> None:
    with torch.cuda.device_of(out):
        grid = (triton.cdiv(out.numel(), 4 * 128),)
        _normals_kernel[grid](
            out_ptr=out, count=out.numel(), seed=seed, step=step, PURPOSE=_PURPOSE, BLOCK=128, num_warps=4
        )


def sigreg_table_triton(x: Tensor, step: float, phi: list[float], weight: list[float]) -> Tensor:
    V, N, S = x.shape
    K, group = len(phi), 16  # the sums at sixteen knots fit into registers
    rows = min(256, max(64, triton.cdiv(N, 16)))  # many programs, yet their tables take at most half as much as x
    table = x.new_empty(max(1, triton.cdiv(N, rows)), K, 2, V, S)
    with torch.cuda.device_of(x):
        for first in range(0, K, group):
            part = slice(first, first + group)
            _table_kernel[len(table), triton.cdiv(S, 32), V](
                x_ptr=x.contiguous(),
                table_ptr=table,
                N=N,
                S=S,
                rows=rows,
                knots=K,
                TURNS=step / math.tau,
                FIRST=first,
                PHI=tuple(phi[part]),
                WEIGHT=tuple(weight[part]),
                BLOCK_S=32,
                num_warps=1,
            )
    return table.sum(0) if len(table) > 1 else table[0]


def sigreg_backward_triton(x: Tensor, table: Tensor, scale: Tensor, step: float, slope: list[float]) -> Tensor:
    V, N, S = x.shape
    grad = x.new_empty(x.shape)
    if N:
        rows, columns = min(64, triton.next_power_of_2(N)), 64
        with torch.cuda.device_of(x):
            _backward_kernel[triton.cdiv(N, rows), triton.cdiv(S, columns), V](
                x_ptr=x.contiguous(),
                table_ptr=table.contiguous(),
                scale_ptr=scale,
                grad_ptr=grad,
                N=N,
                S=S,
                TURNS=step / math.tau,
                SLOPE=tuple(slope),
                BLOCK_N=rows,
                BLOCK_S=columns,
                num_warps=8,
            )
    return grad


# --- registration

torch.library.define("jepa_kernels::sigreg_table", "(Tensor x, float step, float[] phi, float[] weight) -> Tensor")
torch.library.impl("jepa_kernels::sigreg_table", "default", sigreg_table_ref)
torch.library.impl("jepa_kernels::sigreg_table", "cuda", sigreg_table_triton)
torch.library.define(
    "jepa_kernels::sigreg_backward", "(Tensor x, Tensor table, Tensor scale, float step, float[] slope) -> Tensor"
)
torch.library.impl("jepa_kernels::sigreg_backward", "default", sigreg_backward_ref)
torch.library.impl("jepa_kernels::sigreg_backward", "cuda", sigreg_backward_triton)
torch.library.define("jepa_kernels::sigreg_normals_", "(Tensor(a!) out, SymInt seed, SymInt step) -> ()")
torch.library.impl("jepa_kernels::sigreg_normals_", "default", sigreg_normals_ref)
torch.library.impl("jepa_kernels::sigreg_normals_", "cuda", sigreg_normals_triton)


@torch.library.register_fake("jepa_kernels::sigreg_normals_")
def _sigreg_normals_fake(out: Tensor, seed: int, step: int) -> None:
    return None


@torch.library.register_fake("jepa_kernels::sigreg_table")
def _sigreg_table_fake(x: Tensor, step: float, phi: list[float], weight: list[float]) -> Tensor:
    return x.new_empty(len(phi), 2, x.shape[0], x.shape[2])


@torch.library.register_fake("jepa_kernels::sigreg_backward")
def _sigreg_backward_fake(x: Tensor, table: Tensor, scale: Tensor, step: float, slope: list[float]) -> Tensor:
    return x.new_empty(x.shape)
