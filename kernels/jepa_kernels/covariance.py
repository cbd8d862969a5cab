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
    z_ptr,  # [N, M, D]
    mean_ptr,  # [C, M, D], of the rows of each chunk
    scatter_ptr,  # [C, M, D], sums of squared deviations from it
    spread_ptr,  # [C, D / BLOCK_D]
    N,
    M,
    D,
    stride_n,
    stride_m,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide = mean_ptr.dtype.element_ty
    pid_n = tl.program_id(0)  # a chunk
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pid_d = tl.program_id(1)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    z_ptrs = z_ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :]
    count = tl.minimum(N - pid_n * BLOCK_N, BLOCK_N)

    views = tl.zeros([BLOCK_N, BLOCK_D], wide)
    for i in range(M):
        x = tl.load(z_ptrs + i * tl.cast(stride_m, tl.int64), mask=mask, other=0).to(wide)
        views += x
        center = tl.sum(x, 0) / count
        x = tl.where(mask, x - center[None, :], 0)
        offs = (pid_n.to(tl.int64) * M + i) * D + offs_d
        tl.store(mean_ptr + offs, center, mask=offs_d < D)
        tl.store(scatter_ptr + offs, tl.sum(x * x, 0), mask=offs_d < D)
    views /= M
    apart = tl.zeros([BLOCK_N, BLOCK_D], wide)
    for i in range(M):  # reads from cache
        x = tl.load(z_ptrs + i * tl.cast(stride_m, tl.int64), mask=mask, other=0).to(wide) - views
        apart += x * x
    tl.store(spread_ptr + pid_n * tl.num_programs(1) + pid_d, tl.sum(apart))


@triton.jit
def _combine_kernel(
    means_ptr,  # [C, S], S = M*D
    scatters_ptr,  # [C, S]
    mean_ptr,  # [S]
    scatter_ptr,  # [S]
    N,
    C,
    S,
    ROWS: tl.constexpr,  # per chunk
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    wide = mean_ptr.dtype.element_ty
    pid = tl.program_id(0)
    offs_s = pid * BLOCK_S + tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S], wide)
    for start_c in range(0, C, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        mask = (offs_c < C)[:, None] & (offs_s < S)[None, :]
        count = tl.minimum(N - offs_c * ROWS, ROWS)
        m = tl.load(means_ptr + offs_c.to(tl.int64)[:, None] * S + offs_s[None, :], mask=mask, other=0)
        total += tl.sum(m * count[:, None], 0)
    center = total / N
    total = tl.zeros([BLOCK_S], wide)
    for start_c in range(0, C, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        mask = (offs_c < C)[:, None] & (offs_s < S)[None, :]
        count = tl.minimum(N - offs_c * ROWS, ROWS)
        offs = offs_c.to(tl.int64)[:, None] * S + offs_s[None, :]
        off_center = tl.load(means_ptr + offs, mask=mask, other=0) - center[None, :]
        within = tl.load(scatters_ptr + offs, mask=mask, other=0)
        total += tl.sum(tl.where(mask, within + off_center * off_center * count[:, None], 0), 0)
    tl.store(mean_ptr + offs_s, center, mask=offs_s < S)
    tl.store(scatter_ptr + offs_s, total, mask=offs_s < S)


@triton.jit
def _products_kernel(
    z_ptr,  # [N, M, D]; the matrix is D x D, summed over N; if GRAM, N x N, summed over D
    mean_ptr,  # [M, D]
    partial_ptr,  # [P, M, T(T+1)/2, BLOCK, BLOCK], T = side / BLOCK: partial sums if P > 1
    matrix_ptr,  # [M, side, side], written if KEEP
    squares_ptr,  # [M, T * T]
    rows,  # over all ranks
    side,
    K,  # length of the summed axis
    M,
    D,
    stride_side,
    stride_k,
    stride_m,
    part,  # K / P, a multiple of BLOCK_K
    IN_PARTS: tl.constexpr,
    GRAM: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wide = mean_ptr.dtype.element_ty
    tiles = tl.cdiv(side, BLOCK)
    pid = tl.program_id(0)  # of T * T tiles
    pid_a = pid // tiles
    pid_b = pid % tiles
    i = tl.program_id(1)
    if pid_b < pid_a:  # below the diagonal: mirrors another tile
        if not IN_PARTS:
            tl.store(squares_ptr + i.to(tl.int64) * tiles * tiles + pid, 0.0)
        return
    offs_a = (pid_a * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offs_b = (pid_b * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    z_ptr += i * tl.cast(stride_m, tl.int64)
    mean_ptr += i * D
    product = tl.zeros([BLOCK, BLOCK], wide)
    if not GRAM:
        mean_a = tl.load(mean_ptr + offs_a, mask=offs_a < side, other=0)[:, None]
        mean_b = tl.load(mean_ptr + offs_b, mask=offs_b < side, other=0)[None, :]
    pid_k = tl.program_id(2)
    start = pid_k * part
    for start_k in range(start, tl.minimum(start + part, K), BLOCK_K):
        offs_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_a = (offs_a < side)[:, None] & (offs_k < K)[None, :]
        mask_b = (offs_k < K)[:, None] & (offs_b < side)[None, :]
        if GRAM:
            mean_k = tl.load(mean_ptr + offs_k, mask=offs_k < K, other=0)
            mean_a = mean_k[None, :]
            mean_b = mean_k[:, None]
        a_ptrs = z_ptr + offs_a[:, None] * stride_side + offs_k[None, :] * stride_k
        a = tl.load(a_ptrs, mask=mask_a, other=0).to(wide)
        b_ptrs = z_ptr + offs_k[:, None] * stride_k + offs_b[None, :] * stride_side
        b = tl.load(b_ptrs, mask=mask_b, other=0).to(wide)
        a = tl.where(mask_a, a - mean_a, 0)
        b = tl.where(mask_b, b - mean_b, 0)
        product = tl.dot(a, b, product, input_precision=PRECISION, out_dtype=wide)
    if IN_PARTS:
        tl.store(_partial_ptrs(partial_ptr, pid_k, M, i, pid_a, pid_b, tiles, BLOCK), product)
    else:
        _keep_and_square(product, matrix_ptr, squares_ptr, rows, side, i, pid_a, pid_b, GRAM, KEEP, BLOCK)


@triton.jit
def _parts_kernel(
    partial_ptr,  # this and the next two: as in _products_kernel
    matrix_ptr,
    squares_ptr,
    rows,
    side,
    M,
    parts,
    GRAM: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wide = squares_ptr.dtype.element_ty
    tiles = tl.cdiv(side, BLOCK)
    pid = tl.program_id(0)
    pid_a = pid // tiles
    pid_b = pid % tiles
    i = tl.program_id(1)
    if pid_b < pid_a:
        tl.store(squares_ptr + i.to(tl.int64) * tiles * tiles + pid, 0.0)
        return
    product = tl.zeros([BLOCK, BLOCK], wide)
    for k in range(parts):
        product += tl.load(_partial_ptrs(partial_ptr, k, M, i, pid_a, pid_b, tiles, BLOCK))
    _keep_and_square(product, matrix_ptr, squares_ptr, rows, side, i, pid_a, pid_b, GRAM, KEEP, BLOCK)


@triton.jit
def _partial_ptrs(partial_ptr, k, M, i, pid_a, pid_b, tiles, BLOCK: tl.constexpr):
    """Pointers [BLOCK, BLOCK] to part k of a tile of view i."""
    tile = pid_a * (2 * tiles - pid_a - 1) // 2 + pid_b  # counts tiles on and above the diagonal, row by row
    place = (tl.cast(k, tl.int64) * M + i) * (tiles * (tiles + 1) // 2) + tile
    offs = tl.arange(0, BLOCK)
    return partial_ptr + place * BLOCK * BLOCK + offs[:, None] * BLOCK + offs[None, :]


@triton.jit
def _keep_and_square(
    product,  # [BLOCK, BLOCK], a tile
    matrix_ptr,  # this and the next: as in _products_kernel
    squares_ptr,
    rows,
    side,
    i,
    pid_a,
    pid_b,
    GRAM: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(side, BLOCK)
    offs_a = (pid_a * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offs_b = (pid_b * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    product /= rows - 1
    if not GRAM:
        product = tl.where(offs_a[:, None] == offs_b[None, :], 0, product)
    if KEEP:
        mask = (offs_a < side)[:, None] & (offs_b < side)[None, :]
        matrix_ptr += i.to(tl.int64) * side * side
        tl.store(matrix_ptr + offs_a[:, None] * side + offs_b[None, :], product, mask=mask)
        if pid_a < pid_b:
            tl.store(matrix_ptr + offs_b[None, :] * side + offs_a[:, None], product, mask=mask)
    times = tl.where(pid_a < pid_b, 2, 1)
    square_ptr = squares_ptr + i.to(tl.int64) * tiles * tiles + pid_a * tiles + pid_b
    tl.store(square_ptr, tl.sum(product * product) * times)


@triton.jit
def _backward_kernel(
    z_ptr,  # [G, M, D]
    mean_ptr,  # [M, D]
    matrix_ptr,  # [M, K, K]
    weight_ptr,  # [M, D]
    pull_ptr,  # scalar
    push_ptr,  # scalar
    grad_ptr,  # [N, M, D], for rows [first, first + N)
    first,
    N,
    M,
    D,
    K,  # D; if GRAM, G
    stride_zn,
    stride_zm,
    stride_gn,
    stride_gm,
    GRAM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wide = mean_ptr.dtype.element_ty
    tiles_d = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    offs_n = (pid // tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_d = pid % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.program_id(1)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    mean_ptr += i * D
    matrix_ptr += i.to(tl.int64) * K * K
    view_ptr = z_ptr + i * tl.cast(stride_zm, tl.int64)
    mean = tl.load(mean_ptr + offs_d, mask=offs_d < D, other=0)[None, :]

    mixed = tl.zeros([BLOCK_N, BLOCK_D], wide)
    for start_k in range(0, K, BLOCK_K):
        offs_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_a = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        mask_b = (offs_k < K)[:, None] & (offs_d < D)[None, :]
        if GRAM:
            a = tl.load(matrix_ptr + (first + offs_n)[:, None] * K + offs_k[None, :], mask=mask_a, other=0)
            b = tl.load(view_ptr + offs_k[:, None] * stride_zn + offs_d[None, :], mask=mask_b, other=0).to(wide)
            b = tl.where(mask_b, b - mean, 0)
        else:
            a_ptrs = view_ptr + (first + offs_n)[:, None] * stride_zn + offs_k[None, :]
            a = tl.load(a_ptrs, mask=mask_a, other=0).to(wide)
            a = tl.where(mask_a, a - tl.load(mean_ptr + offs_k, mask=offs_k < K, other=0)[None, :], 0)
            b = tl.load(matrix_ptr + offs_k[:, None] * K + offs_d[None, :], mask=mask_b, other=0)
        mixed = tl.dot(a, b, mixed, input_precision=PRECISION, out_dtype=wide)

    offs = (first + offs_n)[:, None] * stride_zn + offs_d[None, :]
    z = tl.load(view_ptr + offs, mask=mask, other=0).to(wide)
    views = tl.zeros([BLOCK_N, BLOCK_D], wide)
    for j in range(M):
        views += tl.load(z_ptr + offs + j * tl.cast(stride_zm, tl.int64), mask=mask, other=0).to(wide)
    grad = tl.load(push_ptr) * mixed + tl.load(pull_ptr) * (z - views / M)
    grad += tl.load(weight_ptr + i * D + offs_d, mask=offs_d < D, other=0)[None, :] * (z - mean)
    grad_ptrs = grad_ptr + i * tl.cast(stride_gm, tl.int64) + offs_n[:, None] * stride_gn + offs_d[None, :]
    tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def vicreg_moments_triton(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = _unit_stride(z)
    N, M, D = z.shape
    rows = 256 // wide(z).itemsize  # a tile twice as large would spill
    columns = 64
    chunks, tiles_d = triton.cdiv(N, rows), triton.cdiv(D, columns)
    means, scatters = z.new_empty(2, chunks, M, D, dtype=wide(z))
    mean = z.new_empty(M, D, dtype=wide(z))
    scatter = torch.empty_like(mean)
    spread = mean.new_empty(chunks, tiles_d)
    with torch.cuda.device_of(z):
        _moments_kernel[chunks, tiles_d](
            z_ptr=z,
            mean_ptr=means,
            scatter_ptr=scatters,
            spread_ptr=spread,
            N=N,
            M=M,
            D=D,
            stride_n=z.stride(0),
            stride_m=z.stride(1),
            BLOCK_N=rows,
            BLOCK_D=columns,
            num_warps=4,
        )
        _combine_kernel[(triton.cdiv(M * D, 64),)](
            means_ptr=means,
            scatters_ptr=scatters,
            mean_ptr=mean,
            scatter_ptr=scatter,
            N=N,
            C=chunks,
            S=M * D,
            ROWS=rows,
            BLOCK_C=32,
            BLOCK_S=64,
            num_warps=4,
        )
    return mean, scatter, spread.sum()


def vicreg_products_triton(
    z: Tensor, mean: Tensor, rows: int, gram: bool, keep: bool, precision: str
) -> tuple[Tensor, Tensor]:
    z = _unit_stride(z)
    N, M, D = z.shape
    side, K = (N, D) if gram else (D, N)
    stride_side, stride_k = (z.stride(0), 1) if gram else (1, z.stride(0))
    block, block_k = 256 // mean.itemsize, _block_k(precision)
    tiles = triton.cdiv(side, block)
    upper = tiles * (tiles + 1) // 2
    # A few tiles with long sums (small batch, wide projector) would leave most of the GPU idle: such sums are split
    # into parts, using at most 256 tiles of 16 KiB in total.
    parts = max(1, min(256 // (M * upper), K // 256))
    part = triton.cdiv(triton.cdiv(K, parts), block_k) * block_k
    parts = triton.cdiv(K, part)
    partial = mean.new_empty((parts, M, upper, block, block) if parts > 1 else 0)
    matrix = mean.new_empty((M, side, side) if keep else 0)
    squares = mean.new_empty(M, tiles * tiles)
    with torch.cuda.device_of(z):
        _products_kernel[tiles * tiles, M, parts](
            z_ptr=z,
            mean_ptr=mean,
            partial_ptr=partial,
            matrix_ptr=matrix,
            squares_ptr=squares,
            rows=rows,
            side=side,
            K=K,
            M=M,
            D=D,
            stride_side=stride_side,
            stride_k=stride_k,
            stride_m=z.stride(1),
            part=part,
            IN_PARTS=parts > 1,
            GRAM=gram,
            KEEP=keep,
            PRECISION=precision,
            BLOCK=block,
            BLOCK_K=block_k,
            num_warps=4,
        )
        if parts > 1:
            _parts_kernel[tiles * tiles, M](
                partial_ptr=partial,
                matrix_ptr=matrix,
                squares_ptr=squares,
                rows=rows,
                side=side,
                M=M,
                parts=parts,
                GRAM=gram,
                KEEP=keep,
                BLOCK=block,
                num_warps=4,
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
    z = _unit_stride(z)
    _, M, D = z.shape
    block = 64
    with torch.cuda.device_of(z):
        _backward_kernel[triton.cdiv(count, block) * triton.cdiv(D, block), M](
            z_ptr=z,
            mean_ptr=mean,
            matrix_ptr=matrix,
            weight_ptr=weight,
            pull_ptr=pull,
            push_ptr=push,
            grad_ptr=out,
            first=first,
            N=count,
            M=M,
            D=D,
            K=matrix.shape[1],
            stride_zn=z.stride(0),
            stride_zm=z.stride(1),
            stride_gn=out.stride(0),
            stride_gm=out.stride(1),
            GRAM=gram,
            PRECISION=precision,
            BLOCK_N=block,
            BLOCK_D=block,
            BLOCK_K=_block_k(precision),
            num_warps=8,
        )
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
