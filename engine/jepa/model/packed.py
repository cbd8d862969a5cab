"""Packed sequences: contexts of unequal length, one after another in the rows of a matrix (`mask.mode: packed`).

Legend: B images, N patches, M target blocks of Kt patches; S sequences of T rows in total; H heads of C channels.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jepa.ranks.device import to_device

from .attention import attend_scores, modules, output


class Sequences(NamedTuple):
    """S non-empty sequences, packed one after another in the rows of a matrix without gaps."""

    offsets: Tensor
    """int32 [S + 1], on the device: the start of each, and the number of rows."""
    longest: int
    """Length of the longest, on the host, so that reading it does not synchronise."""

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(to_device(self.offsets, device), self.longest)

    def means(self, x_TD: Tensor) -> Tensor:
        """The mean row of each sequence, [S, D]."""
        row, (begin, end) = torch.arange(x_TD.shape[0], device=x_TD.device), (self.offsets[:-1], self.offsets[1:])
        member_ST = (row >= begin[:, None]) & (row < end[:, None])
        return member_ST.to(x_TD.dtype) @ x_TD / (end - begin)[:, None]


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences, backend: str = "sdpa"
) -> Tensor:
    """`attend` within each of S sequences; q [Tq, H, C], k and v [T, H, C] -> [Tq, H, C].

    sdpa uses a varlen kernel in half precision on a GPU if C is divisible by 8; otherwise, and in `math`, sequences
    are padded to the longest.
    """
    if backend == "flash_attn":
        return output(
            modules["flash_attn"].flash_attn_varlen_func(
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
        lengths = queries.offsets, keys.offsets, queries.longest, keys.longest
        return torch.ops.jepa.attention_packed(q, k, v, *lengths)[0]
    return _attend_padded(q, k, v, queries, keys, backend)


# --- the op: FlashAttention as PyTorch has it. (Its own varlen_attn takes cuDNN on some GPUs in some versions, which
# would build a plan for each new number of rows.)

_aten = torch.ops.aten
_LENGTHS = "Tensor q_offsets, Tensor k_offsets, SymInt q_longest, SymInt k_longest"
torch.library.define(
    "jepa::attention_packed", f"(Tensor q, Tensor k, Tensor v, {_LENGTHS}) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "jepa::attention_packed_backward",
    f"(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor logsumexp, Tensor state, {_LENGTHS}) "
    "-> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("jepa::attention_packed", "CUDA")
def _packed_cuda(q: Tensor, k: Tensor, v: Tensor, *lengths: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False)[:3]


@torch.library.impl("jepa::attention_packed_backward", "CUDA")
def _packed_backward_cuda(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor, state: Tensor, *lengths: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout the random state is not read.
    return _aten._flash_attention_backward(dy, q, k, v, y, logsumexp, *lengths, 0.0, False, state, state)


@torch.library.register_fake("jepa::attention_packed")
def _packed_fake(q: Tensor, k: Tensor, v: Tensor, *lengths: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, _ = q.shape
    logsumexp = q.new_empty(heads, rows, dtype=torch.float32)
    return torch.empty_like(q), logsumexp, q.new_empty(2, dtype=torch.uint64)


@torch.library.register_fake("jepa::attention_packed_backward")
def _packed_backward_fake(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.q_longest, ctx.k_longest = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _packed_backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.jepa.attention_packed_backward(dy, *ctx.saved_tensors, ctx.q_longest, ctx.k_longest)
    return *grads, None, None, None, None


torch.library.register_autograd("jepa::attention_packed", _packed_backward, setup_context=_remember)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences, backend: str) -> Tensor:
    """`attend_packed` on dense [S, longest, H, C]. A padding slot holds a copy of some row; as a key it is masked, as a
    query dropped, so its gradient is exactly 0 and does not affect that row's, in whatever order they are added."""

    def dense(x: Tensor, sequences: Sequences) -> Tensor:
        slot = sequences.offsets[:-1, None].long() + torch.arange(sequences.longest, device=x.device)
        rows = x.index_select(0, slot.clamp(max=x.shape[0] - 1).flatten())
        return rows.unflatten(0, slot.shape).transpose(1, 2)

    offsets = queries.offsets.long()
    lengths = keys.offsets.diff()
    seen = torch.arange(keys.longest, device=k.device) < lengths[:, None]
    y = attend_scores(dense(q, queries), dense(k, keys), dense(v, keys), seen[:, None, None, :], backend)
    row = torch.arange(q.shape[0], device=q.device)
    owner = torch.searchsorted(offsets[1:], row, right=True)
    place = owner * queries.longest + row - offsets[owner]
    return y.transpose(1, 2).flatten(0, 1).index_select(0, place)


ROUNDING = 128  # packed rows are padded to a multiple of 1/128 of the batch's patches


class Ragged(NamedTuple):
    """The packed contexts of B images, each at its own length, neither cut nor repeated.

    On a GPU padding is added as one more image, so that T takes few values and the allocator reuses memory: it costs at
    most 1/128 of the batch's patches (and one more image's targets in the predictor). With `mask.token_budget` it fills
    the budget, and T is constant. Padding attends only to itself and reaches no loss, so it has no gradient.
    S is B, or B + 1 with the padding.
    """

    patch_T: Tensor
    """int64, each row's patch, numbered over all images: image * N + patch."""
    contexts: Sequences
    """S sequences of context rows."""
    joined: Sequences
    """M * S sequences [context, target block], block-major."""
    targets: Sequences
    """M * S sequences of Kt mask tokens."""
    order_R: Tensor
    """int64 [T + S * Kt]: the position of each row of a block's joined sequences in [all contexts, all targets]."""
    back_R: Tensor
    """int64, its inverse."""

    def to(self, device: torch.device) -> "Ragged":
        patch, order, back = (to_device(x, device) for x in (self.patch_T, self.order_R, self.back_R))
        contexts, joined, targets = (x.to(device) for x in (self.contexts, self.joined, self.targets))
        return Ragged(patch, contexts, joined, targets, order, back)


def pack(context_T: Tensor, lengths_B: Tensor, target_MBK: Tensor, N: int, unit: int = 0) -> Ragged:
    """The layout of one packed context mask: concatenated int64 patches, and how many of them each image has.

    `unit`: add at least one row of padding, up to a multiple of this; 0: no padding.
    """
    M, B, Kt = target_MBK.shape
    patch = context_T + N * torch.arange(B).repeat_interleave(lengths_B)
    lengths = lengths_B
    if unit:
        missing = unit - len(patch) % unit
        patch, lengths = F.pad(patch, (0, missing)), F.pad(lengths, (0, 1), value=missing)
    S, T = len(lengths), len(patch)
    image = torch.arange(S)
    at_context = torch.arange(T) + Kt * image.repeat_interleave(lengths)
    at_target = (lengths.cumsum(0) + Kt * image)[:, None] + torch.arange(Kt)
    back = torch.cat([at_context, at_target.flatten()])
    order = torch.empty_like(back).scatter_(0, back, torch.arange(len(back)))
    return Ragged(
        patch,
        _sequences(lengths),
        _sequences((lengths + Kt).repeat(M)),
        _sequences(torch.full((M * S,), Kt)),
        order,
        back,
    )


def _sequences(lengths: Tensor) -> Sequences:
    return Sequences(F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()))


def join(z_TD: Tensor, ragged: Ragged, target_MBK: Tensor, positions_ND: Tensor, mask_token: Tensor) -> Tensor:
    """`predictor_tokens` for packed contexts: the sequences [context, mask tokens], block-major, [M * (T + S * Kt), D].

    `z_TD`: the contexts' rows; `mask_token` [1, 1, D].
    """
    positions_ND, (M, B, _) = positions_ND.to(z_TD.dtype), target_MBK.shape
    images = ragged.contexts.offsets.shape[0] - 1
    context = z_TD + positions_ND[ragged.patch_T % positions_ND.shape[0]]
    filled = F.pad(target_MBK, (0, 0, 0, images - B))
    target = (mask_token + positions_ND[filled.flatten(1)]).to(z_TD.dtype)
    both = torch.cat([context.expand(M, *context.shape), target], 1)
    return _Reorder.apply(both, ragged.order_R, ragged.back_R).flatten(0, 1)


def targets_of(x: Tensor, ragged: Ragged, T: int, M: int) -> Tensor:
    """The rows of the mask tokens in `join`'s sequences, [M * S * Kt, D]; T: rows of all contexts."""
    apart = _Reorder.apply(x.unflatten(0, (M, -1)), ragged.back_R, ragged.order_R)
    return apart[:, T:].flatten(0, 1)


class _Reorder(torch.autograd.Function):
    """y[:, i] = x[:, order[i]] for a permutation; `back` is its inverse, so that the backward is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(1, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.index_select(1, *ctx.saved_tensors), None, None
