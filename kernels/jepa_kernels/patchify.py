"""Extract the kept patches of uint8 images, normalise and cast them: the input matrix of the patch embedding.

    y[b, k, (c, py, px)] = (images[b, c, P*row + py, P*col + px] / 255 - mean[c]) / std[c]
    row, col = divmod(index[b, k], W / P)

Shapes: B images of H x W pixels, N = (H/P)(W/P) patches of P x P pixels in raster order, K kept. A row of y
has the order of a Conv2d weight [D, 3, P, P], so the embedding is y @ weight.flatten(1).T. No float image is
created: a kept pixel is read once as a byte and written once. The CPU kernel is in csrc/patchify.cpp.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import ASSERTING, check_index


def patchify(
    images: Tensor,
    index: Tensor | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Extracts and normalises the patches of `images` that `index` selects.

    Args:
        images: uint8 [B, 3, H, W] or [B, H, W, 3], any strides; H and W multiples of `patch_size`. If
            both shapes fit, axis 1 is the channel axis.
        index: [B, K] int64, 0..N-1 in raster order of the patch grid; None keeps all N.
        mean, std: per channel, for pixels scaled to 0..1.
        patch_size: P, in pixels.
        dtype: of the result: float32, bfloat16 or float16. Computed in float32, rounded once.

    Returns:
        [B, K, 3*P*P], contiguous, not differentiable: uint8 has no gradient.

    Raises:
        ValueError: wrong rank, dtype or device, a size that P does not divide, an index out of range (checked
            on a CPU only; on a GPU the kernel asserts).
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"patchify: images must be a uint8 tensor; got {type(images).__name__}")
    if images.ndim != 4 or images.dtype != torch.uint8 or (images.shape[1] != 3 and images.shape[3] != 3):
        raise ValueError(
            f"patchify: images must be uint8 [B, 3, H, W] or [B, H, W, 3]; got {images.dtype} {list(images.shape)}"
        )
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    B, _, H, W = images.shape
    if not isinstance(patch_size, (int, torch.SymInt)) or patch_size < 1 or H % patch_size or W % patch_size:
        raise ValueError(
            f"patchify: patch_size must be an integer that divides the image's {H} x {W} pixels; got {patch_size}. "
            "Crop or resize the images first"
        )
    if len(mean) != 3 or len(std) != 3 or not all(-math.inf < m < math.inf for m in mean):
        raise ValueError(f"patchify: mean and std must be 3 finite numbers each; got {mean} and {std}")
    if not all(0 < s < math.inf for s in std):
        raise ValueError(f"patchify: std must be finite and > 0; got {std}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"patchify: dtype must be float32, bfloat16 or float16; got {dtype}")
    if index is not None:
        check_index("patchify", "index", index, (B, None), (H // patch_size) * (W // patch_size), images)
    scale = [1 / (255 * s) for s in std]
    bias = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.ops.jepa_kernels.patchify(images, index, scale, bias, patch_size, dtype)


# --- reference: y = pixel * scale[c] + bias[c]


def patchify_ref(
    images_B3HW: Tensor,
    index: Tensor | None,
    scale: list[float],
    bias: list[float],
    P: int,
    dtype: torch.dtype,
) -> Tensor:
    B, _, H, W = images_B3HW.shape
    grid = images_B3HW.reshape(B, 3, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)
    bytes_BNL = grid.reshape(B, (H // P) * (W // P), 3 * P * P)
    if index is not None:
        bytes_BNL = bytes_BNL.gather(1, index[:, :, None].expand(-1, -1, 3 * P * P))
    channels = bytes_BNL.float().unflatten(2, (3, P * P)).unbind(2)
    rows = [x * scale[c] + bias[c] for c, x in enumerate(channels)]  # tensors would need a synchronous copy to a GPU
    return torch.cat(rows, 2).to(dtype)


# --- triton: a program writes ROWS patches of one image, and computes pixel offsets once for all of them


@triton.jit(do_not_specialize=["K"])  # K changes from step to step
def _patchify_kernel(
    images,  # [B, 3, H, W] uint8
    index,  # [B, K]; ignored if INDEXED is false
    y,  # [B, K, 3*P*P]
    K,
    grid_h,  # H / P
    grid_w,  # W / P
    images_b,  # strides of images
    images_c,
    images_h,
    images_w,
    scale_r,
    scale_g,
    scale_b,
    bias_r,
    bias_g,
    bias_b,
    INDEXED: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # pixels of a patch per program
):
    program = tl.program_id(0)
    parts, tiles = (P * P + BLOCK - 1) // BLOCK, tl.cdiv(K, ROWS)
    b = (program // parts // tiles).to(tl.int64)
    k = tl.minimum(program // parts % tiles * ROWS + tl.arange(0, ROWS), K - 1)  # surplus rows repeat the last one
    pixel = program % parts * BLOCK + tl.arange(0, BLOCK)
    if INDEXED:
        n = tl.load(index + b * K + k)
        tl.device_assert((n >= 0) & (n < grid_h * grid_w), "patchify: index out of range")
        n = n.to(tl.int32)
    else:
        n = k
    row, col = (n // grid_w * P).to(tl.int64), (n % grid_w * P).to(tl.int64)
    corner = images + b * images_b + row * images_h + col * images_w
    py, px = (pixel // P).to(tl.int64), (pixel % P).to(tl.int64)
    at = corner[:, None] + (py * images_h + px * images_w)[None, :]
    to = y + ((b * K + k) * (3 * P * P))[:, None] + pixel[None, :]
    inside = (pixel < P * P)[None, :]
    scale, bias = (scale_r, scale_g, scale_b), (bias_r, bias_g, bias_b)
    for c in tl.static_range(3):
        value = tl.load(at, inside, other=0).to(tl.float32) * scale[c] + bias[c]
        tl.store(to + c * P * P, value.to(y.dtype.element_ty), inside)
        at += images_c


def patchify_triton(
    images: Tensor, index: Tensor | None, scale: list[float], bias: list[float], P: int, dtype: torch.dtype
) -> Tensor:
    y = _patchify_fake(images, index, scale, bias, P, dtype)
    if y.numel():
        B, K, _ = y.shape
        block = min(triton.next_power_of_2(P * P), 1024)
        rows = min(triton.next_power_of_2(K), max(1, 2048 // block))
        patches = images if index is None else index.contiguous()
        sizes = K, images.shape[2] // P, images.shape[3] // P, *images.stride()
        options = index is not None, P, rows, block
        grid = (B * triton.cdiv(K, rows) * triton.cdiv(P * P, block),)
        with torch.cuda.device_of(images):
            _patchify_kernel[grid](images, patches, y, *sizes, *scale, *bias, *options, **ASSERTING)
    return y


# --- registration

torch.library.define(
    "jepa_kernels::patchify",
    "(Tensor images, Tensor? index, float[] scale, float[] bias, SymInt P, ScalarType dtype) -> Tensor",
)
torch.library.impl("jepa_kernels::patchify", "default", patchify_ref)
torch.library.impl("jepa_kernels::patchify", "cuda", patchify_triton)


@torch.library.register_fake("jepa_kernels::patchify")
def _patchify_fake(
    images: Tensor, index: Tensor | None, scale: list[float], bias: list[float], P: int, dtype: torch.dtype
) -> Tensor:
    B, _, H, W = images.shape
    K = (H // P) * (W // P) if index is None else index.shape[1]
    return images.new_empty(B, K, 3 * P * P, dtype=dtype)
