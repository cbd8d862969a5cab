"""Attention without materialised scores.

Backends: `sdpa` is PyTorch's own; `flash_attn` (the newest installed of FlashAttention 4, 3 and 2) and `xformers` are
optional; `math` materialises the scores, for comparison. flash_attn and xformers are written to their published
signatures and have not been run yet: tests/model/test_attention.py checks them if they are installed.

`sdpa` calls the kernels behind scaled_dot_product_attention in an op of its own. Under that name Inductor guards on
each length modulo 8, and recompiles for most of the masks' lengths; and cuDNN, which recent GPUs prefer, would build a
plan for each new shape.

Legend: B sequences of K tokens (Kq of them queries); H heads of C channels.
"""

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jepa.config.schema import ConfigError

FLASH = ("flash_attn.cute", "flash_attn_interface", "flash_attn")  # FlashAttention 4, 3, 2

FROM_HOPPER_ON = FLASH[:2]

HOW_TO_GET = {
    "flash_attn": "pip install flash-attn-4 (Hopper or newer), or build flash-attn 2 or 3 from source",
    "xformers": "pip install xformers",
}

# Modules of the backends in use, by name: importing inside a compiled block would break its graph.
modules: dict[str, Any] = {}


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q k / sqrt(C)) v per head; q [B, Kq, H, C], k and v [B, K, H, C] -> [B, Kq, H, C]."""
    if backend == "flash_attn":
        return output(modules["flash_attn"].flash_attn_func(q, k, v))
    if backend == "xformers":
        return modules["xformers"].memory_efficient_attention(q, k, v)
    return attend_scores(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, backend).transpose(1, 2)


def attend_scores(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, backend: str) -> Tensor:
    """q, k, v [B, H, K, C]; `seen`, bool [B, 1, 1, K]: the keys to attend to."""
    if backend == "sdpa" and seen is None and _has_kernel(q):
        return _Attention.apply(q, k, v)
    if backend != "math":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1) @ v


_aten = torch.ops.aten

torch.library.define("jepa::attention", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")

torch.library.define(
    "jepa::attention_backward",
    "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor logsumexp) -> (Tensor, Tensor, Tensor)",
)


def _has_kernel(q: Tensor) -> bool:
    """FlashAttention: half precision on a GPU, any on a CPU. Memory-efficient attention: fp32 on a GPU."""
    if q.device.type == "cpu":
        return q.dtype != torch.float16
    if not q.is_cuda or q.shape[-1] % 8:
        return False
    if q.dtype == torch.float32:
        return True
    ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and ampere


@torch.library.impl("jepa::attention", "CPU")
def _attention_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


@torch.library.impl("jepa::attention_backward", "CPU")
def _attention_backward_cpu(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(dy, q, k, v, y, logsumexp, 0.0, False)


@torch.library.impl("jepa::attention", "CUDA")
def _attention_cuda(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.dtype == torch.float32:
        return _aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return _aten._scaled_dot_product_flash_attention(q, k, v)[:2]


@torch.library.impl("jepa::attention_backward", "CUDA")
def _attention_backward_cuda(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # None: undefined tensors; there are no ragged lengths, no bias and, without dropout, no random state.
    if q.dtype == torch.float32:
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            dy, q, k, v, None, y, logsumexp, None, None, 0.0, [True, True, True, False]
        )
        return grads[:3]
    return _aten._scaled_dot_product_flash_attention_backward(
        dy, q, k, v, y, logsumexp, None, None, q.shape[2], k.shape[2], 0.0, False, None, None
    )


def _like(x: Tensor) -> Tensor:
    """Strides as the kernels write them: [B, K, H, C], transposed."""
    B, H, K, C = x.shape
    return x.new_empty(B, K, H, C).transpose(1, 2)


@torch.library.register_fake("jepa::attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, H, Kq, _ = q.shape
    if q.device.type == "cpu":
        return _like(q), q.new_empty(B, Kq, H, dtype=torch.promote_types(q.dtype, torch.float32)).transpose(1, 2)
    rows = (Kq + 31) // 32 * 32 if q.dtype == torch.float32 else Kq
    return _like(q), q.new_empty(B, H, rows, dtype=torch.float32)


@torch.library.register_fake("jepa::attention_backward")
def _attention_backward_fake(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, logsumexp = torch.ops.jepa.attention(q, k, v)
        ctx.save_for_backward(q, k, v, y, logsumexp)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.jepa.attention_backward(dy, *ctx.saved_tensors)


def require(backend: str) -> None:
    """Prepares a backend. Raises ConfigError, with install instructions, if it is not installed."""
    names = {"flash_attn": FLASH, "xformers": ("xformers.ops",)}.get(backend, ())
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        names = tuple(name for name in names if name not in FROM_HOPPER_ON)
    if names and backend not in modules:
        here = next((name for name in names if _installed(name)), None)
        if here is None:
            raise ConfigError([f"engine.attention = {backend!r}: not installed; {HOW_TO_GET[backend]}, or give sdpa"])
        modules[backend] = importlib.import_module(here)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def output(result: Any) -> Tensor:
    """The output alone: FlashAttention 4, and some versions of 3, also return the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result
