"""Attention whose scores are never written to memory: for sequences of one length, and for sequences end to end.

Backends: `sdpa` is PyTorch's own; `flash_attn` (the newest installed of FlashAttention 4, 3 and 2) and `xformers` are
used when asked for; `math` writes the scores after all, as something to compare with. flash_attn and xformers follow
their published signatures and have not been run yet: tests/test_attention.py compares them where they are installed.

Legend: B sequences of K tokens (Kq of them queries); S sequences end to end, T tokens in all; H heads of C channels.
"""

import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from .config import ConfigError

FLASH = ("flash_attn.cute", "flash_attn_interface", "flash_attn")  # FlashAttention 4, 3, 2
FROM_HOPPER_ON = FLASH[:2]
HOW_TO_GET = {
    "flash_attn": "pip install flash-attn-4 (from Hopper on), or build flash-attn 2 or 3 from its sources",
    "xformers": "pip install xformers",
}
# Of the backends in use, by name: an import inside a compiled block would break its graph.
_modules: dict[str, Any] = {}


class Sequences(NamedTuple):
    """S sequences that lie end to end in the rows of a matrix: none of them empty, no row in none of them."""

    offsets: Tensor
    """int32 [S + 1], on the device: where each begins, and the number of rows."""
    longest: int
    """The length of the longest, known without asking the device."""

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(to_device(self.offsets, device), self.longest)

    def means(self, x_TD: Tensor) -> Tensor:
        """The mean row of each sequence, [S, D]."""
        row, (begin, end) = torch.arange(x_TD.shape[0], device=x_TD.device), (self.offsets[:-1], self.offsets[1:])
        member_ST = (row >= begin[:, None]) & (row < end[:, None])
        return member_ST.to(x_TD.dtype) @ x_TD / (end - begin)[:, None]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, so that nobody waits for a GPU's copy. (One with gaps would be copied out of it first.)"""
    if device.type != "cuda":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q k / sqrt(C)) v of every head; q [B, Kq, H, C], k and v [B, K, H, C] -> [B, Kq, H, C]."""
    if backend == "flash_attn":
        return _output(_modules["flash_attn"].flash_attn_func(q, k, v))
    if backend == "xformers":
        return _modules["xformers"].memory_efficient_attention(q, k, v)
    return _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, backend).transpose(1, 2)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences, backend: str = "sdpa"
) -> Tensor:
    """`attend` within each of S sequences; q [Tq, H, C], k and v [T, H, C] -> [Tq, H, C].

    In half precision on a GPU by a kernel that takes the offsets; elsewhere the sequences are padded to the longest.
    """
    if backend == "flash_attn":
        return _output(
            _modules["flash_attn"].flash_attn_varlen_func(
                q,
                k,
                v,
                cu_seqlens_q=queries.offsets,
                cu_seqlens_k=keys.offsets,
                max_seqlen_q=queries.longest,
                max_seqlen_k=keys.longest,
            )
        )
    if backend == "sdpa" and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        # By position: what follows these seven has changed from one version of torch to the next.
        out = varlen_attn(q, k, v, queries.offsets, keys.offsets, queries.longest, keys.longest)
        assert isinstance(out, Tensor)
        return out
    return _attend_padded(q, k, v, queries, keys, backend)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, backend: str) -> Tensor:
    """[B, H, K, C]; `seen` are the keys that count, bool [B, 1, 1, K]."""
    if backend != "math":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1) @ v


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences, backend: str) -> Tensor:
    """`attend_packed` on dense [S, longest, H, C]. A padded slot holds a copy of some row; as a key it is masked, as a
    query it is dropped, so that its gradient is 0: in whatever order it is added, it changes nothing."""

    def dense(x: Tensor, sequences: Sequences) -> Tensor:
        slot = sequences.offsets[:-1, None].long() + torch.arange(sequences.longest, device=x.device)
        rows = x.index_select(0, slot.clamp(max=x.shape[0] - 1).flatten())
        return rows.unflatten(0, slot.shape).transpose(1, 2)

    offsets = queries.offsets.long()
    lengths = keys.offsets.diff()
    seen = torch.arange(keys.longest, device=k.device) < lengths[:, None]
    y = _attend(dense(q, queries), dense(k, keys), dense(v, keys), seen[:, None, None, :], backend)
    row = torch.arange(q.shape[0], device=q.device)
    owner = torch.searchsorted(offsets[1:], row, right=True)
    place = owner * queries.longest + row - offsets[owner]
    return y.transpose(1, 2).flatten(0, 1).index_select(0, place)


def require(backend: str) -> None:
    """Makes a backend ready. Raises ConfigError, which says how to get it, where it is not installed.

    sdpa goes without cuDNN, which builds a plan for each new shape, and the lengths of masks are new in most steps.
    """
    if backend == "sdpa":
        torch.backends.cuda.enable_cudnn_sdp(False)
    names = {"flash_attn": FLASH, "xformers": ("xformers.ops",)}.get(backend, ())
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        names = tuple(name for name in names if name not in FROM_HOPPER_ON)
    if names and backend not in _modules:
        here = next((name for name in names if _installed(name)), None)
        if here is None:
            raise ConfigError([f"engine.attention = {backend!r}: not installed; {HOW_TO_GET[backend]}, or give sdpa"])
        _modules[backend] = importlib.import_module(here)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _output(result: Any) -> Tensor:
    """FlashAttention 4, and some versions of 3, return the log-sum-exp beside the output."""
    return result[0] if isinstance(result, tuple) else result
