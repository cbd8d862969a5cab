"""VICReg's invariance, variance and covariance of M views, in O(M) instead of O(M^2).

Shapes: N rows (images), M views (C-JEPA's target blocks), D channels; W ranks with G = W*N rows in total.
The definition is the mean of the two-view criterion over all ordered pairs of views. The variance and covariance
of a view do not depend on its partner, and the squared distances between all views follow from those to their
mean, so M covariances replace 2*M*(M-1). With fewer rows than channels, the Gram matrix (G x G) replaces the
covariance (D x D): it has the same norm and gives the same gradient.

If a gradient is needed, one matrix per view is kept until the backward: M * min(G, D)^2 numbers in float32, never more
than a float32 copy of all G rows, in addition to z and two [M, D] tensors. Recomputing it would add half to the FLOPs
of the backward. The ops that read z are in covariance.py.
"""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_floats
from .covariance import squares_of
from .precision import no_autocast, wide


def vicreg(
    z: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    gamma: float = 1.0,
    eps: float = 1e-4,
    precision: Literal["ieee", "tf32x3", "tf32"] = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance of M views, each the mean over ordered pairs of views.

    With x[n, i] = z[n, i] - mean_n z[n, i] and C_i = x_i^T x_i / (N - 1):

        invariance = 2/(M-1) * mean over n, d of sum_i (z[n, i, d] - mean_i z[n, i, d])^2
        variance   = mean over i, d of max(0, gamma - sqrt(C_i[d, d] + eps))
        covariance = 2/D * mean over i of sum_{a != b} C_i[a, b]^2

    VICReg, arXiv 2105.04906, section 4 and its code; C-JEPA, arXiv 2410.19560, algorithm 1.

    Args:
        z: [N, M, D], float32, float64, bfloat16 or float16, any strides. A single view forms no pairs: its
            invariance is 0.
        group: a process group whose ranks all hold the same number of rows; the statistics are over all rows. What
            is communicated depends on N, so ranks exchange it first: a few bytes, without waiting for a GPU.
        gamma, eps: parameters of the variance term.
        precision: how a GPU multiplies float32 matrices: "ieee", "tf32x3" (three TF32 products, nearly as
            accurate) or "tf32".

    Returns:
        Three float32 scalars (float64 for float64 input), accumulated in at least that precision. On a GPU every
        sum has a fixed order; on a CPU all do except in the matrix products, where BLAS may change it with its number
        of threads. Training keeps until the backward: z (the rows of all ranks if G < D), one
        min(G, D) x min(G, D) matrix per view and two [M, D] tensors. With a `group`, all ranks return the same numbers,
        and the gradient is that of the sum of all ranks' losses: averaged over ranks, as DDP and ZeRO do, gradients
        equal those of one process with all rows. All ranks must call this, and its backward, together.

    Raises:
        ValueError: wrong rank or dtype, fewer than 2 rows over all ranks; a negative or infinite gamma or eps, an
            unknown precision; ranks of a group with different numbers of rows (on a GPU, and in a compiled call, an
            assertion on the device).
    """
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    check_floats("vicreg", "z", z, "[N, M, D]")
    if z.shape[1] < 1 or z.shape[2] < 1:
        raise ValueError(f"vicreg: z must have at least one view and one channel; got {list(z.shape)}")
    if not 0 <= gamma < math.inf or not 0 <= eps < math.inf:
        raise ValueError(f"vicreg: gamma and eps must be finite and >= 0; got {gamma} and {eps}")
    if group is not None:
        _check_rows(z, group)
    if z.shape[0] * _ranks(group) < 2:
        raise ValueError(f"vicreg: z must have at least 2 rows over all ranks; got {list(z.shape)} on each")
    if precision not in ("ieee", "tf32x3", "tf32"):
        raise ValueError(f'vicreg: precision must be "ieee", "tf32x3" or "tf32"; got {precision!r}')
    with no_autocast(z):
        if torch.is_grad_enabled() and z.requires_grad:
            return _VICReg.apply(z, gamma, eps, precision, group)
        return _forward(z, gamma, eps, precision, group, keep=False)[0]


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


def _check_rows(z: Tensor, group: dist.ProcessGroup) -> None:
    """Unequal numbers of rows would hang the collectives that follow, or be averaged as if they were equal."""
    own = torch.full((1,), z.shape[0], device=z.device)
    rows = own.new_empty(dist.get_world_size(group))
    _all_gather(rows, own, group=group)
    if z.device.type == "cpu" and not torch.compiler.is_compiling():
        if len(rows.unique()) > 1:
            raise ValueError(f"vicreg: z must have the same row count on every rank of the group; got {rows.tolist()}")
    else:
        torch._assert_async((rows == own).all(), "vicreg: z must have the same row count on every rank of the group")


def _ranks(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _forward(
    z: Tensor, gamma: float, eps: float, precision: str, group: dist.ProcessGroup | None, keep: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The three terms and, for the backward, z (gram: the rows of all ranks), mean, variance and matrix."""
    ops = torch.ops.jepa_kernels
    N, M, D = z.shape
    G = N * _ranks(group)
    gram = G < D
    # Two ways to get statistics of all rows, chosen by what a rank receives per view. Gather the rows: G x D in
    # z's dtype, and every rank does all the work. Or all-reduce a D x D matrix, which is transferred twice.
    reduce = group is not None and not gram and G * z.element_size() > 2 * D * wide(z).itemsize
    rows = z
    if group is not None and not reduce:
        rows = z.new_empty(G, M, D)
        _all_gather(rows, z.contiguous(), group=group)
    mean, scatter, spread = ops.vicreg_moments(rows)
    if reduce:
        own = mean
        shared = torch.cat([mean.flatten() * (N / G), spread[None]])
        dist.all_reduce(shared, group=group)
        mean, spread = shared[:-1].view(M, D), shared[-1]
        scatter = scatter + N * (own - mean).square()
    var = scatter / (G - 1)
    squares, matrix = ops.vicreg_products(rows, mean, G, gram, keep or reduce, precision)
    if reduce:
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal.copy_(var)  # reduced along with the matrix, whose diagonal is unused
        dist.all_reduce(matrix, group=group)
        var = diagonal.clone()
        diagonal.zero_()
        squares = squares_of(matrix)
    elif gram:
        squares = squares - var.square().sum(1)
    invariance = spread * (2 / (max(1, M - 1) * G * D))
    variance = (gamma - (var + eps).sqrt()).relu().mean()
    covariance = squares.mean() * (2 / D)
    return (invariance, variance, covariance), (rows if gram else z, mean, var, matrix)


class _VICReg(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, gamma: float, eps: float, precision: str, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        terms, saved = _forward(z, gamma, eps, precision, group, keep=True)
        ctx.save_for_backward(*saved)
        ctx.N, ctx.options = z.shape[0], (gamma, eps, precision, group)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        z, mean, var, matrix = ctx.saved_tensors
        gamma, eps, precision, group = ctx.options
        N, (M, D) = ctx.N, mean.shape
        G = N * _ranks(group)
        gram = G < D
        if group is not None:
            shared = torch.stack(grads)
            dist.all_reduce(shared, group=group)  # the losses of all ranks depend on these rows
            grads = shared.unbind()
        first = N * dist.get_rank(group) if gram and group is not None else 0
        by_invariance, by_variance, by_covariance = grads
        # Per view, x = z - mean_n z, C = x^T x / (G-1) and std = sqrt(diag C + eps). Sums over every index:
        #   d invariance = 2/((M-1) G D) sum 2 (z - mean_i z) dz        (the deviations from mean_i z sum to 0 over i)
        #   d variance   = -1/(M D) sum_{std < gamma} d std             d std = d diag C / (2 std) = x dx / ((G-1) std)
        #   d covariance = 2/(M D) sum_{a != b} 2 C dC = 8/(M D (G-1)) sum (x C) dx           C without its diagonal
        # x and x C have mean 0 over n, so dx may be read as dz.
        pull = by_invariance * (4 / (max(1, M - 1) * G * D))
        push = by_covariance * (8 / (M * D * (G - 1)))
        std = (var + eps).sqrt()
        weight = torch.where(std < gamma, by_variance * (-1 / (M * D * (G - 1))) / std, 0)
        if gram:  # with K = x x^T / (G - 1), K x is x C with the diagonal of C: subtract its part
            weight = weight - push * var
        with no_autocast(z):
            dz = torch.ops.jepa_kernels.vicreg_backward(z, mean, matrix, weight, pull, push, gram, first, N, precision)
        return dz, None, None, None, None
