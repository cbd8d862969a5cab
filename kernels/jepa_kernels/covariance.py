"""The ops of VICReg: moments, squared covariances (or Gram matrices), and the gradient through them.

vicreg.py combines the three ops. Shapes: N rows, M views, D channels. The covariance is computed tile by tile, mirrored
tiles once, and only its squared norm is stored unless `keep` asks for the matrix; sums that are split into parts go
through a workspace of at most 256 tiles (4 MiB). The CPU kernels are in csrc/vicreg.cpp: they leave the matrix products
to BLAS, and hold the matrix and a float32 copy of z during the call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import wide

# --- reference


def vicreg_moments_ref(z_NMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[M, D] means and sums of squared deviations over rows; the sum of all squared deviations from the mean view."""
    z = z_NMD.to(wide(z_NMD))
    mean_MD = z.mean(0)
    spread = torch.linalg.vector_norm(z - z.mean(1, keepdim=True)).square()
    return mean_MD, (z - mean_MD).square_().sum(0), spread


def vicreg_products_ref(
    z_NMD: Tensor, mean_MD: Tensor, rows: int, gram: bool, keep: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Squared norms [M] of x^T x / (rows-1) without its diagonal, or of x x^T / (rows-1); the matrices if `keep`.

    rows: the total over all ranks; z may hold only some of them.
    """
    x_MND = (z_NMD - mean_MD).transpose(0, 1)
    if gram:
        matrix = (x_MND @ x_MND.mT).div_(rows - 1)
    else:
        matrix = (x_MND.mT @ x_MND).div_(rows - 1)
        matrix.diagonal(dim1=1, dim2=2).zero_()
    return squares_of(matrix), matrix if keep else matrix.new_empty(0)


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
    """Rows [first, first + count) of pull * (z - mean over views) + weight * x + push * (x C, or K x)."""
    rows = z_NMD[first : first + count]
    x = rows - mean_MD
    if gram:
        mixed_MND = matrix[:, first : first + count] @ (z_NMD - mean_MD).transpose(0, 1)
    else:
        mixed_MND = x.transpose(0, 1) @ matrix
    grad = torch.empty_like(rows, dtype=x.dtype)
    torch.sub(rows, rows.mean(1, keepdim=True, dtype=x.dtype), out=grad)
    grad.mul_(pull).addcmul_(weight_MD, x).addcmul_(push, mixed_MND.transpose(0, 1))
    return grad.to(z_NMD.dtype)


def squares_of(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(1, 2)).square()


# --- triton


@triton.jit
def _moments_kernel(
    z,  # [N, M, D]
    mean,  # [C, M, D], of the rows of each chunk
    scatter,  # [C, M, D], sums of squared deviations from it
    spread,  # [C, D / BLOCK_D]
    N,
    M,
    D,
    stride_n,
    stride_m,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide = mean.dtype.element_ty
    chunk = tl.program_id(0)
    row = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (row < N)[:, None] & (column < D)[None, :]
    at = z + row.to(tl.int64)[:, None] * stride_n + column[None, :]
    count = tl.minimum(N - chunk * BLOCK_N, BLOCK_N)

    views = tl.zeros([BLOCK_N, BLOCK_D], wide)
    for i in range(M):
        x = tl.load(at + i * tl.cast(stride_m, tl.int64), mask, other=0).to(wide)
        views += x
        center = tl.sum(x, 0) / count
        x = tl.where(mask, x - center[None, :], 0)
        out = (chunk.to(tl.int64) * M + i) * D + column
        tl.store(mean + out, center, column < D)
        tl.store(scatter + out, tl.sum(x * x, 0), column < D)
    views /= M
    apart = tl.zeros([BLOCK_N, BLOCK_D], wide)
    for i in range(M):  # reads from cache
        x = tl.load(at + i * tl.cast(stride_m, tl.int64), mask, other=0).to(wide) - views
        apart += x * x
    tl.store(spread + chunk * tl.num_programs(1) + tl.program_id(1), tl.sum(apart))


@triton.jit
def _combine_kernel(
    means,  # [C, S], S = M*D
    scatters,  # [C, S]
    mean,  # [S]
    scatter,  # [S]
    N,
    C,
    S,
    ROWS: tl.constexpr,  # per chunk
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    wide = mean.dtype.element_ty
    column = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S], wide)
    for first in range(0, C, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        mask = (chunk < C)[:, None] & (column < S)[None, :]
        count = tl.minimum(N - chunk * ROWS, ROWS)
        m = tl.load(means + chunk.to(tl.int64)[:, None] * S + column[None, :], mask, other=0)
        total += tl.sum(m * count[:, None], 0)
    center = total / N
    total = tl.zeros([BLOCK_S], wide)
    for first in range(0, C, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        mask = (chunk < C)[:, None] & (column < S)[None, :]
        count = tl.minimum(N - chunk * ROWS, ROWS)
        at = chunk.to(tl.int64)[:, None] * S + column[None, :]
        off = tl.load(means + at, mask, other=0) - center[None, :]
        within = tl.load(scatters + at, mask, other=0)
        total += tl.sum(tl.where(mask, within + off * off * count[:, None], 0), 0)
    tl.store(mean + column, center, column < S)
    tl.store(scatter + column, total, column < S)


@triton.jit
def _products_kernel(
    z,  # [N, M, D]; the matrix is D x D, summed over N; if GRAM, N x N, summed over D
    mean,  # [M, D]
    partial,  # [P, M, T(T+1)/2, BLOCK, BLOCK], T = side / BLOCK: partial sums if P > 1
    matrix,  # [M, side, side], written if KEEP
    squares,  # [M, T * T]
    rows,  # over all ranks
    side,
    length,  # of the summed axis
    M,
    D,
    stride_side,
    stride_sum,
    stride_m,
    part,  # length / P, a multiple of BLOCK_K
    IN_PARTS: tl.constexpr,
    GRAM: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wide = mean.dtype.element_ty
    tiles = tl.cdiv(side, BLOCK)
    p, q, i = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    if q < p:  # below the diagonal: mirrors another tile
        if not IN_PARTS:
            tl.store(squares + i.to(tl.int64) * tiles * tiles + tl.program_id(0), 0.0)
        return
    a_side = (p * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    b_side = (q * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    z += i * tl.cast(stride_m, tl.int64)
    mean += i * D
    product = tl.zeros([BLOCK, BLOCK], wide)
    if not GRAM:
        a_mean = tl.load(mean + a_side, a_side < side, other=0)[:, None]
        b_mean = tl.load(mean + b_side, b_side < side, other=0)[None, :]
    start = tl.program_id(2) * part
    for k0 in range(start, tl.minimum(start + part, length), BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        a_mask = (a_side < side)[:, None] & (k < length)[None, :]
        b_mask = (k < length)[:, None] & (b_side < side)[None, :]
        if GRAM:
            k_mean = tl.load(mean + k, k < length, other=0)
            a_mean = k_mean[None, :]
            b_mean = k_mean[:, None]
        a = tl.load(z + a_side[:, None] * stride_side + k[None, :] * stride_sum, a_mask, other=0).to(wide)
        b = tl.load(z + k[:, None] * stride_sum + b_side[None, :] * stride_side, b_mask, other=0).to(wide)
        a = tl.where(a_mask, a - a_mean, 0)
        b = tl.where(b_mask, b - b_mean, 0)
        product = tl.dot(a, b, product, input_precision=PRECISION, out_dtype=wide)
    if IN_PARTS:
        tl.store(_partial_tile(partial, tl.program_id(2), M, i, p, q, tiles, BLOCK), product)
    else:
        _keep_and_square(product, matrix, squares, rows, side, i, p, q, GRAM, KEEP, BLOCK)


@triton.jit
def _parts_kernel(
    partial,  # as above
    matrix,
    squares,
    rows,
    side,
    M,
    parts,
    GRAM: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wide = squares.dtype.element_ty
    tiles = tl.cdiv(side, BLOCK)
    p, q, i = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    if q < p:
        tl.store(squares + i.to(tl.int64) * tiles * tiles + tl.program_id(0), 0.0)
        return
    product = tl.zeros([BLOCK, BLOCK], wide)
    for k in range(parts):
        product += tl.load(_partial_tile(partial, k, M, i, p, q, tiles, BLOCK))
    _keep_and_square(product, matrix, squares, rows, side, i, p, q, GRAM, KEEP, BLOCK)


@triton.jit
def _partial_tile(partial, k, M, i, p, q, tiles, BLOCK: tl.constexpr):
    tile = p * (2 * tiles - p - 1) // 2 + q  # counts tiles on and above the diagonal, row by row
    place = (tl.cast(k, tl.int64) * M + i) * (tiles * (tiles + 1) // 2) + tile
    inside = tl.arange(0, BLOCK)
    return partial + place * BLOCK * BLOCK + inside[:, None] * BLOCK + inside[None, :]


@triton.jit
def _keep_and_square(
    product, matrix, squares, rows, side, i, p, q, GRAM: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr
):
    tiles = tl.cdiv(side, BLOCK)
    a_side = (p * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    b_side = (q * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    product /= rows - 1
    if not GRAM:
        product = tl.where(a_side[:, None] == b_side[None, :], 0, product)
    if KEEP:
        mask = (a_side < side)[:, None] & (b_side < side)[None, :]
        matrix += i.to(tl.int64) * side * side
        tl.store(matrix + a_side[:, None] * side + b_side[None, :], product, mask)
        if p < q:
            tl.store(matrix + b_side[None, :] * side + a_side[:, None], product, mask)
    times = tl.where(p < q, 2, 1)
    tl.store(squares + i.to(tl.int64) * tiles * tiles + p * tiles + q, tl.sum(product * product) * times)


@triton.jit
def _backward_kernel(
    z,  # [G, M, D]
    mean,  # [M, D]
    matrix,  # [M, D, D]; if GRAM, [M, G, G]
    weight,  # [M, D]
    pull,  # scalar
    push,  # scalar
    grad,  # [N, M, D], for rows [first, first + N)
    first,
    N,
    M,
    D,
    length,  # side of the matrix
    stride_n,
    stride_m,
    grad_stride_n,
    grad_stride_m,
    GRAM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wide = mean.dtype.element_ty
    across = tl.cdiv(D, BLOCK_D)
    row = (tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    column = tl.program_id(0) % across * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.program_id(1)
    mask = (row < N)[:, None] & (column < D)[None, :]
    mean += i * D
    matrix += i.to(tl.int64) * length * length
    view = z + i * tl.cast(stride_m, tl.int64)
    column_mean = tl.load(mean + column, column < D, other=0)[None, :]

    mixed = tl.zeros([BLOCK_N, BLOCK_D], wide)
    for k0 in range(0, length, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        a_mask = (row < N)[:, None] & (k < length)[None, :]
        b_mask = (k < length)[:, None] & (column < D)[None, :]
        if GRAM:
            a = tl.load(matrix + (first + row)[:, None] * length + k[None, :], a_mask, other=0)
            b = tl.load(view + k[:, None] * stride_n + column[None, :], b_mask, other=0).to(wide)
            b = tl.where(b_mask, b - column_mean, 0)
        else:
            a = tl.load(view + (first + row)[:, None] * stride_n + k[None, :], a_mask, other=0).to(wide)
            a = tl.where(a_mask, a - tl.load(mean + k, k < length, other=0)[None, :], 0)
            b = tl.load(matrix + k[:, None] * length + column[None, :], b_mask, other=0)
        mixed = tl.dot(a, b, mixed, input_precision=PRECISION, out_dtype=wide)

    at = (first + row)[:, None] * stride_n + column[None, :]
    x = tl.load(view + at, mask, other=0).to(wide)
    views = tl.zeros([BLOCK_N, BLOCK_D], wide)
    for j in range(M):
        views += tl.load(z + at + j * tl.cast(stride_m, tl.int64), mask, other=0).to(wide)
    y = tl.load(push) * mixed + tl.load(pull) * (x - views / M)
    y += tl.load(weight + i * D + column, column < D, other=0)[None, :] * (x - column_mean)
    grad += i * tl.cast(grad_stride_m, tl.int64) + row[:, None] * grad_stride_n + column[None, :]
    tl.store(grad, y.to(grad.dtype.element_ty), mask)


def vicreg_moments_triton(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = _unit_stride(z)
    (N, M, D), rows, columns = z.shape, 256 // wide(z).itemsize, 64  # a tile twice as large would spill
    chunks, across = triton.cdiv(N, rows), triton.cdiv(D, columns)
    means, scatters = z.new_empty(2, chunks, M, D, dtype=wide(z))
    mean = z.new_empty(M, D, dtype=wide(z))
    scatter = torch.empty_like(mean)
    spread = mean.new_empty(chunks, across)
    with torch.cuda.device_of(z):
        _moments_kernel[chunks, across](
            z, means, scatters, spread, N, M, D, z.stride(0), z.stride(1), rows, columns, num_warps=4
        )
        _combine_kernel[triton.cdiv(M * D, 64),](
            means, scatters, mean, scatter, N, chunks, M * D, rows, 32, 64, num_warps=4
        )
    return mean, scatter, spread.sum()


def vicreg_products_triton(
    z: Tensor, mean: Tensor, rows: int, gram: bool, keep: bool, precision: str
) -> tuple[Tensor, Tensor]:
    z = _unit_stride(z)
    N, M, D = z.shape
    side, length, strides = (N, D, (z.stride(0), 1)) if gram else (D, N, (1, z.stride(0)))
    block, block_k = 256 // mean.itemsize, _block_k(precision)
    tiles = triton.cdiv(side, block)
    upper = tiles * (tiles + 1) // 2
    # A few tiles with long sums (small batch, wide projector) would leave most of the GPU idle: such sums are split
    # into parts, using at most 256 tiles of 16 KiB in total.
    parts = max(1, min(256 // (M * upper), length // 256))
    part = triton.cdiv(triton.cdiv(length, parts), block_k) * block_k
    parts = triton.cdiv(length, part)
    partial = mean.new_empty((parts, M, upper, block, block) if parts > 1 else 0)
    matrix = mean.new_empty((M, side, side) if keep else 0)
    squares = mean.new_empty(M, tiles * tiles)
    with torch.cuda.device_of(z):
        _products_kernel[tiles * tiles, M, parts](
            z, mean, partial, matrix, squares, rows, side, length, M, D, *strides, z.stride(1), part,
            parts > 1, gram, keep, precision, block, block_k, num_warps=4,
        )  # fmt: skip
        if parts > 1:
            _parts_kernel[tiles * tiles, M](
                partial, matrix, squares, rows, side, M, parts, gram, keep, block, num_warps=4
            )
    return squares.sum(1), matrix


def vicreg_backward_triton(
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
    grad = torch.empty_like(z[first : first + count])
    if not count:
        return grad
    out = grad if grad.stride(2) == 1 else torch.empty_like(grad, memory_format=torch.contiguous_format)
    z, (_, M, D), block = _unit_stride(z), z.shape, 64
    with torch.cuda.device_of(z):
        _backward_kernel[triton.cdiv(count, block) * triton.cdiv(D, block), M](
            z, mean, matrix, weight, pull, push, out, first, count, M, D, matrix.shape[1],
            z.stride(0), z.stride(1), out.stride(0), out.stride(1),
            gram, precision, block, block, _block_k(precision), num_warps=8,
        )  # fmt: skip
    return grad if out is grad else grad.copy_(out)


def _block_k(precision: str) -> int:
    return 32 if precision == "tf32" else 16  # the others need more registers


def _unit_stride(z: Tensor) -> Tensor:
    return z if z.stride(2) == 1 else z.contiguous()


# --- registration

torch.library.define("jepa_kernels::vicreg_moments", "(Tensor z) -> (Tensor mean, Tensor scatter, Tensor spread)")
torch.library.impl("jepa_kernels::vicreg_moments", "default", vicreg_moments_ref)
torch.library.impl("jepa_kernels::vicreg_moments", "cuda", vicreg_moments_triton)
torch.library.define(
    "jepa_kernels::vicreg_products",
    "(Tensor z, Tensor mean, SymInt rows, bool gram, bool keep, str precision) -> (Tensor squares, Tensor matrix)",
)
torch.library.impl("jepa_kernels::vicreg_products", "default", vicreg_products_ref)
torch.library.impl("jepa_kernels::vicreg_products", "cuda", vicreg_products_triton)
torch.library.define(
    "jepa_kernels::vicreg_backward",
    "(Tensor z, Tensor mean, Tensor matrix, Tensor weight, Tensor pull, Tensor push, bool gram,"
    " SymInt first, SymInt count, str precision) -> Tensor",
)
torch.library.impl("jepa_kernels::vicreg_backward", "default", vicreg_backward_ref)
torch.library.impl("jepa_kernels::vicreg_backward", "cuda", vicreg_backward_triton)


@torch.library.register_fake("jepa_kernels::vicreg_moments")
def _vicreg_moments_fake(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = z.new_empty(z.shape[1:], dtype=wide(z))
    return mean, torch.empty_like(mean), mean.new_empty(())


@torch.library.register_fake("jepa_kernels::vicreg_products")
def _vicreg_products_fake(
    z: Tensor, mean: Tensor, rows: int, gram: bool, keep: bool, precision: str
) -> tuple[Tensor, Tensor]:
    N, M, D = z.shape
    side = N if gram else D
    return mean.new_empty(M), mean.new_empty((M, side, side) if keep else 0)


@torch.library.register_fake("jepa_kernels::vicreg_backward")
def _vicreg_backward_fake(
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
