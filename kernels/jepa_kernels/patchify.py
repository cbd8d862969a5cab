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


# --- triton: a program writes BLOCK_K patches of one image, and computes pixel offsets once for all of them


@triton.jit(do_not_specialize=["K"])  # K changes from step to step
def _patchify_kernel(
    images_ptr,  # [B, 3, H, W] uint8
    index_ptr,  # [B, K]; ignored if INDEXED is false
    y_ptr,  # [B, K, 3*P*P]
    K,
    grid_h,  # H / P
    grid_w,  # W / P
    stride_b,  # of images
    stride_c,
    stride_h,
    stride_w,
    scale_r,
    scale_g,
    scale_b,
    bias_r,
    bias_g,
    bias_b,
    INDEXED: tl.constexpr,
    P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pixels of a patch per program
):
    pid = tl.program_id(0)
    tiles_p = (P * P + BLOCK_P - 1) // BLOCK_P
    tiles_k = tl.cdiv(K, BLOCK_K)
    b = (pid // tiles_p // tiles_k).to(tl.int64)
    offs_k = tl.minimum(pid // tiles_p % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K), K - 1)  # surplus: the last again
    offs_p = pid % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    if INDEXED:
        n = tl.load(index_ptr + b * K + offs_k)
        tl.device_assert((n >= 0) & (n < grid_h * grid_w), "patchify: index out of range")
        n = n.to(tl.int32)
    else:
        n = offs_k
    row = (n // grid_w * P).to(tl.int64)
    col = (n % grid_w * P).to(tl.int64)
    corner_ptrs = images_ptr + b * stride_b + row * stride_h + col * stride_w
    py = (offs_p // P).to(tl.int64)
    px = (offs_p % P).to(tl.int64)
    pixel_ptrs = corner_ptrs[:, None] + (py * stride_h + px * stride_w)[None, :]
    y_ptrs = y_ptr + ((b * K + offs_k) * (3 * P * P))[:, None] + offs_p[None, :]
    mask = (offs_p < P * P)[None, :]
    scale = (scale_r, scale_g, scale_b)
    bias = (bias_r, bias_g, bias_b)
    for c in tl.static_range(3):
        pixel = tl.load(pixel_ptrs, mask=mask, other=0).to(tl.float32)
        y = pixel * scale[c] + bias[c]
        tl.store(y_ptrs + c * P * P, y.to(y_ptr.dtype.element_ty), mask=mask)
        pixel_ptrs += stride_c


def patchify_triton(
    images: Tensor, index: Tensor | None, scale: list[float], bias: list[float], P: int, dtype: torch.dtype
) -> Tensor:
    y = _patchify_fake(images, index, scale, bias, P, dtype)
    if y.numel():
        (B, _, H, W), K = images.shape, y.shape[1]
        block_p = min(triton.next_power_of_2(P * P), 1024)
        block_k = min(triton.next_power_of_2(K), max(1, 2048 // block_p))
        grid = (B * triton.cdiv(K, block_k) * triton.cdiv(P * P, block_p),)
        with torch.cuda.device_of(images):
            _patchify_kernel[grid](
                images_ptr=images,
                index_ptr=images if index is None else index.contiguous(),
                y_ptr=y,
                K=K,
                grid_h=H // P,
                grid_w=W // P,
                stride_b=images.stride(0),
                stride_c=images.stride(1),
                stride_h=images.stride(2),
                stride_w=images.stride(3),
                scale_r=scale[0],
                scale_g=scale[1],
                scale_b=scale[2],
                bias_r=bias[0],
                bias_g=bias[1],
                bias_b=bias[2],
                INDEXED=index is not None,
                P=P,
                BLOCK_K=block_k,
                BLOCK_P=block_p,
                **ASSERTING,
            )
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
