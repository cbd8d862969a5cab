"""VICReg's invariance, variance and covariance between M views, in O(M) instead of O(M^2).

Shapes: N rows (images), M views (C-JEPA's target blocks), D channels; W ranks, G = W*N rows of all of them.
The definition is the mean of the two-view criterion over all ordered pairs of views. Variance and covariance
of a view do not depend on the pair, and squared distances between all pairs are squared distances to the
mean, so M covariances stand for 2*M*(M-1). The covariance goes through a D x D matrix, or through the G x G
Gram matrix where rows are fewer than channels: ||C||_F is the same for both.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

PRECISIONS = ("ieee", "tf32x3", "tf32")


def vicreg(
    z: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    gamma: float = 1.0,
    eps: float = 1e-4,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance terms of M views, each the mean over ordered pairs of views.

    With x[n, i] = z[n, i] - mean_n z[n, i] and C_i = x_i^T x_i / (N-1) (VICReg, arXiv 2105.04906, section 4
    and its code; C-JEPA, arXiv 2410.19560, algorithm 1):
        invariance = 2/(M-1) * mean_{n,d} sum_i (z[n, i] - mean_i z[n, i])^2
        variance   = mean_{i,d} max(0, gamma - sqrt(C_i[d, d] + eps))
        covariance = 2 * mean_i sum_{a != b} C_i[a, b]^2 / D

    z: [N, M, D] floating, any strides. Returns three float32 scalars (float64 for float64 input); everything is
    accumulated so. One view alone has no pair: its invariance is 0. `precision`: how a GPU multiplies float32: "ieee", "tf32x3" (three TF32
    products, nearly as exact) or "tf32".

    With a process `group` each rank passes its own rows, equally many; every rank gets the numbers of all G
    rows. The gradient sums over the ranks' losses, as a differentiable collective does: averaged by DDP
    or ZeRO it is the full batch's. All ranks must call this, and backward, together.
    Raises ValueError for another shape or dtype, or fewer than 2 rows in all.
    """
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    _check(z, precision, 1 if group is None else dist.get_world_size(group))
    if torch.is_grad_enabled() and z.requires_grad:
        return _VICReg.apply(z, gamma, eps, precision, group)
    return _forward(z, gamma, eps, precision, group, keep=False)[0]


def _check(z: Tensor, precision: str, ranks: int) -> None:
    if z.ndim != 3 or not z.is_floating_point():
        raise ValueError(f"z: want a floating tensor [N, M, D], got {z.dtype} {list(z.shape)}")
    N, M, D = z.shape
    if M < 1 or D < 1:
        raise ValueError(f"z: want [N, M, D] with at least 1 view M and 1 channel D, got {list(z.shape)}")
    if N * ranks < 2:
        raise ValueError(f"z: a variance needs at least 2 rows over all ranks, got {list(z.shape)} x {ranks}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: want one of {', '.join(PRECISIONS)}, got {precision!r}")


# --- reference: the definition in three steps, the fallback for devices without a kernel
def vicreg_moments_ref(z_NMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and squared deviations over rows, [M, D] each; the sum of squared deviations over views."""
    x = z_NMD.to(_accumulate(z_NMD))
    mean_MD = x.mean(0)
    return mean_MD, (x - mean_MD).square().sum(0), (x - x.mean(1, keepdim=True)).square().sum()


def vicreg_products_ref(
    z_NMD: Tensor, mean_MD: Tensor, scale: float, gram: bool, keep: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Squared norms [M] of the matrices scale * x^T x without diagonal (gram: x x^T with it); these, if kept."""
    x_MND = (z_NMD - mean_MD).transpose(0, 1)
    if gram:
        matrix = (x_MND @ x_MND.mT).mul_(scale)
    else:
        matrix = (x_MND.mT @ x_MND).mul_(scale)
        matrix.diagonal(dim1=1, dim2=2).zero_()
    squares = torch.linalg.vector_norm(matrix, dim=(1, 2)).square()
    return squares, matrix if keep else matrix.new_empty(0)


def vicreg_backward_ref(
    z_NMD: Tensor,
    mean_MD: Tensor,
    matrix: Tensor,
    weight_MD: Tensor,
    pull: Tensor,
    push: Tensor,
    gram: bool,
    first: int,
    count: int,
    precision: str,
) -> Tensor:
    """pull * (z - mean over views) + weight * x + push * (x matrix, or matrix x), rows first..first+count."""
    rows = z_NMD[first : first + count]
    x = rows - mean_MD
    if gram:
        mixed = matrix[:, first : first + count] @ (z_NMD - mean_MD).transpose(0, 1)
    else:
        mixed = x.transpose(0, 1) @ matrix
    views = rows.to(x.dtype)
    grad = pull * (views - views.mean(1, keepdim=True)) + weight_MD * x + push * mixed.transpose(0, 1)
    return torch.empty_like(rows).copy_(grad)


def _accumulate(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


# --- registration
torch.library.define(
    "jepa_kernels::vicreg_moments", "(Tensor z) -> (Tensor mean, Tensor scatter, Tensor spread)"
)
torch.library.define(
    "jepa_kernels::vicreg_products",
    "(Tensor z, Tensor mean, float scale, bool gram, bool keep, str precision) -> (Tensor, Tensor)",
)
torch.library.define(
    "jepa_kernels::vicreg_backward",
    "(Tensor z, Tensor mean, Tensor matrix, Tensor weight, Tensor pull, Tensor push, bool gram, "
    "SymInt first, SymInt count, str precision) -> Tensor",
)
torch.library.impl("jepa_kernels::vicreg_moments", "default", vicreg_moments_ref)
torch.library.impl("jepa_kernels::vicreg_products", "default", vicreg_products_ref)
torch.library.impl("jepa_kernels::vicreg_backward", "default", vicreg_backward_ref)


@torch.library.register_fake("jepa_kernels::vicreg_moments")
def _(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = z.new_empty(z.shape[1:], dtype=_accumulate(z))
    return mean, torch.empty_like(mean), mean.new_empty(())


@torch.library.register_fake("jepa_kernels::vicreg_products")
def _(z: Tensor, mean: Tensor, scale: float, gram: bool, keep: bool, precision: str) -> tuple[Tensor, Tensor]:
    N, M, D = z.shape
    side = N if gram else D
    return mean.new_empty(M), mean.new_empty((M, side, side) if keep else 0)


@torch.library.register_fake("jepa_kernels::vicreg_backward")
def _(
    z: Tensor,
    mean: Tensor,
    matrix: Tensor,
    weight: Tensor,
    pull: Tensor,
    push: Tensor,
    gram: bool,
    first: int,
    count: int,
    precision: str,
) -> Tensor:
    return torch.empty_like(z[first : first + count])


def _forward(
    z: Tensor, gamma: float, eps: float, precision: str, group: dist.ProcessGroup | None, keep: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The three terms; and what the backward needs: rows, mean, variance, matrix."""
    ops = torch.ops.jepa_kernels
    (N, M, D), ranks = z.shape, 1 if group is None else dist.get_world_size(group)
    G = ranks * N
    gram = G < D
    # Two ways to statistics of all rows, whichever sends less per view: the rows themselves (each rank then
    # does the work of all), or the D x D matrix, which an all-reduce sends twice. Fewer rows than channels:
    # always the rows.
    reduce = group is not None and not gram and G * z.element_size() > 2 * D * 4
    rows = z
    if group is not None and not reduce:
        rows = z.new_empty(G, M, D)
        dist.all_gather_into_tensor(rows, z.contiguous(), group=group)
    mean, scatter, spread = ops.vicreg_moments(rows)
    if reduce:
        here = mean
        shared = torch.cat([mean.flatten() / ranks, spread[None]])
        dist.all_reduce(shared, group=group)
        mean, spread = shared[:-1].view(M, D), shared[-1]
        scatter = scatter + N * (here - mean).square()
    squares, matrix = ops.vicreg_products(rows, mean, 1 / (G - 1), gram, keep or reduce, precision)
    var = scatter / (G - 1)
    if reduce:
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal.copy_(var)
        dist.all_reduce(matrix, group=group)
        var = diagonal.clone()
        diagonal.zero_()
        squares = torch.linalg.vector_norm(matrix, dim=(1, 2)).square()
    elif gram:
        squares = squares - var.square().sum(1)
    terms = (
        spread * (2 / (max(1, M - 1) * G * D)),
        (gamma - (var + eps).sqrt()).relu().mean(),
        squares.mean() * (2 / D),
    )
    return terms, (rows if gram else z, mean, var, matrix)


class _VICReg(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        z: Tensor,
        gamma: float,
        eps: float,
        precision: str,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        terms, saved = _forward(z, gamma, eps, precision, group, keep=True)
        ctx.save_for_backward(*saved)
        ctx.rows, ctx.options = z.shape[0], (gamma, eps, precision, group)  # type: ignore[attr-defined]
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        z, mean, var, matrix = ctx.saved_tensors  # type: ignore[attr-defined]
        gamma, eps, precision, group = ctx.options  # type: ignore[attr-defined]
        N, (M, D) = ctx.rows, mean.shape  # type: ignore[attr-defined]
        G, first, incoming = N, 0, torch.stack(grads)
        if group is not None:
            G = N * dist.get_world_size(group)
            dist.all_reduce(incoming, group=group)  # each rank's loss depends on this rank's rows
        gram = G < D
        if group is not None and gram:
            first = N * dist.get_rank(group)
        by_invariance, by_variance, by_covariance = incoming.unbind()
        std = (var + eps).sqrt()
        push = by_covariance * (8 / (M * D * (G - 1)))
        weight = torch.where(std < gamma, by_variance * (-1 / (M * D * (G - 1))) / std, 0)
        if gram:
            weight = weight - push * var
        pull = by_invariance * (4 / (max(1, M - 1) * G * D))
        grad = torch.ops.jepa_kernels.vicreg_backward(
            z, mean, matrix, weight, pull, push, gram, first, N, precision
        )
        return grad, None, None, None, None
