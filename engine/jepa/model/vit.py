"""The vision transformer of I-JEPA (arXiv 2301.08243): its blocks, and the encoder.

Legend: B images, N patches, K kept patches, D width, T rows of all contexts if these are packed. Parameter names are
those of the published checkpoints. Images stay uint8 until `patchify`, which writes only the patches that are kept.

What no loss reads is not computed, without changing results: a block's queries and MLP run only on its `rows`.
Everything between the matrix products (residual + norm, bias + GELU) is left to torch.compile (jepa.model.execution).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa.config.schema import Config
from jepa_kernels import gather_tokens, patchify

from .attention import attend
from .packed import Ragged, Sequences, attend_packed

LAYER_NORM_EPS = 1e-6
INIT_STD = 0.02


def sincos_positions(dim: int, side: int | tuple[int, int], span: int | None = None) -> Tensor:
    """Fixed 2-D sine-cosine position embeddings of `side` rows and columns, or (rows, columns), in raster order.

    fp32 [rows * columns, dim]. The first half of the width encodes the column, the second the row; each half is
    [sin | cos] of the coordinate times omega_i = 10000 ** (-i / (dim / 4)). Coordinates are 0 .. side - 1, or with
    `span` the centres of cells that share the area of 0 .. span - 1 in either direction.
    """
    rows, columns = (side, side) if isinstance(side, int) else side
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def axis(cells: int) -> Tensor:
        places = torch.arange(cells, dtype=torch.float64)
        if span is not None:
            places = (places + 0.5) * span / cells - 0.5
        angles = places[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    column = axis(columns)[None, :, :].expand(rows, columns, -1)
    row = axis(rows)[:, None, :].expand(rows, columns, -1)
    return torch.cat([column, row], dim=2).reshape(rows * columns, dim).float()


class QKV(nn.Linear):
    """Queries, keys and values of `x`, [..., 3 D]; or the queries of other rows, and the keys and values of `x`."""

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Any:
        if queries is None:
            return super().forward(x)
        D = x.shape[-1]
        return F.linear(queries, self.weight[:D], self.bias[:D]), F.linear(x, self.weight[D:], self.bias[D:])


class Attention(nn.Module):
    """Multi-head self-attention by jepa.model.attention; q, k and v are [..., H, D / H]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.backend = num_heads, "sdpa"
        self.qkv = QKV(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (parts, self.num_heads, -1)).unbind(-3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, queries: Sequences | None, keys: Sequences | None) -> Tensor:
        if queries is None or keys is None:
            y = attend(q, k, v, self.backend)
        else:
            y = attend_packed(q, k, v, queries, keys, self.backend)
        return self.proj(y.flatten(-2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on [B, K, D], or on packed rows [T, D] of the sequences `keys`.

    `rows`: the tokens to output, [B, U, D] or packed rows of the sequences `queries`; None: all.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.draws = False  # random numbers, in hooks that others add
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        queries: Sequences | None = None,
        keys: Sequences | None = None,
    ) -> Tensor:
        attn = self.attn
        if rows is None:
            q, k, v = attn.heads(attn.qkv(self.norm1(x)), 3)
        else:
            asking, asked = attn.qkv(self.norm1(x), self.norm1(rows))
            (q,), (k, v) = attn.heads(asking, 1), attn.heads(asked, 2)
        x = (x if rows is None else rows) + attn(q, k, v, queries, keys)
        return x + self.mlp(self.norm2(x))


class PatchProjection(nn.Module):
    """The patch embedding as one matrix product; its weight has a convolution's shape, [D, 3, P, P]."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """uint8 images -> embeddings [B, K, D] of the patches in `index_BK` (None: all)."""

    def __init__(self, patch_size: int, dim: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.patch_size, self.mean, self.std = patch_size, tuple(mean), tuple(std)
        self.proj = PatchProjection(patch_size, dim)

    def forward(self, images: Tensor, index_BK: Tensor | None) -> Tensor:
        patches = patchify(
            images,
            index_BK,
            mean=self.mean,
            std=self.std,
            patch_size=self.patch_size,
            dtype=self.proj.weight.dtype,
        )
        return self.proj(patches)


class VisionTransformer(nn.Module):
    """The encoder: uint8 images [B, H, W, 3] or [B, 3, H, W] of `img_size` pixels -> features [B, K, D].

    `index` selects the visible patches: int64 [B, K] raster indices, packed contexts (features [T, D]), or None for all
    N. `rows`: groups of those tokens, int64 [B, U]; only their features are computed, in the order of the groups, and
    the last block runs on each group separately. The final norm is applied.
    `mean` and `std` are per channel, for images scaled to 0..1.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.embed_dim = embed_dim
        self.checkpointing = False
        self.other_sizes: dict[tuple[int, int], Tensor] = {}  # (H, W) of other images, and their patches' positions
        self.patch_embed = PatchEmbed(patch_size, embed_dim, mean, std)
        positions = sincos_positions(embed_dim, img_size // patch_size)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", positions[None])
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.apply(init_weights)

    def embed(self, images: Tensor, index: Tensor | Ragged | None = None) -> Tensor:
        S = self.img_size
        if (size := (images.shape[1], images.shape[2])) in self.other_sizes and images.shape[3:] == (3,):
            x = self.patch_embed(images, None)
            self.other_sizes[size] = self.other_sizes[size].to(x.device, x.dtype)
            return x + self.other_sizes[size]
        if tuple(images.shape[1:]) not in ((S, S, 3), (3, S, S)):
            raise ValueError(
                f"images: given {list(images.shape)}, wanted [B, {S}, {S}, 3] or [B, 3, {S}, {S}] (data.crop_size)"
            )
        if isinstance(index, Ragged):  # treats the batch as one tall image
            rows = images.permute(0, 2, 3, 1) if images.shape[1] == 3 else images
            x = self.patch_embed(rows.reshape(1, -1, *rows.shape[2:]), index.patch_T[None])[0]
            return x + self.pos_embed[0].to(x.dtype)[index.patch_T % self.pos_embed.shape[1]]
        x = self.patch_embed(images, index)
        pos_ND = self.pos_embed[0].to(x.dtype)  # DeepSpeed keeps buffers in fp32; cast N rows, not B * K
        return x + (pos_ND if index is None else pos_ND[index])

    def allow(self, size: int | tuple[int, int]) -> None:
        """Also takes whole images [B, size, size, 3], or of (H, W), as crops of the area that `img_size` images show.

        Their positions are computed at the centres of their patches in that area, where DINO interpolates learned ones.
        """
        patch = self.patch_embed.patch_size
        H, W = (size, size) if isinstance(size, int) else size
        if {H, W} != {self.img_size} and (H, W) not in self.other_sizes:
            grid = H // patch, W // patch
            self.other_sizes[H, W] = sincos_positions(self.embed_dim, grid, self.img_size // patch)

    def forward(self, images: Tensor, index: Tensor | Ragged | None = None, rows: Sequence[Tensor] = ()) -> Tensor:
        x, sequences = self.embed(images, index), index.contexts if isinstance(index, Ragged) else None
        for block in self.blocks[: -1 if rows else None]:
            x = run(block, self.checkpointing, x, None, sequences, sequences)
        if rows:
            x = torch.cat([self.blocks[-1](x, gather_tokens(x, group)) for group in rows], 1)
        return self.norm(x)

    def features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The normed outputs [B, N, D] of the given blocks (0 is the first, -1 the last), in the order given."""
        wanted = [layer % len(self.blocks) for layer in layers]
        x, outputs = self.embed(images), {}
        for i, block in enumerate(self.blocks):
            x = run(block, self.checkpointing, x)
            if i in wanted:
                outputs[i] = self.norm(x)
        return [outputs[i] for i in wanted]

    def attention(self, images: Tensor) -> Tensor:
        """The attention probabilities [B, heads, N, N] of the last block."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        q, k, _ = (y.transpose(1, 2) for y in last.attn.heads(last.attn.qkv(last.norm1(x)), 3))
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def run(block: nn.Module, checkpointing: bool, *inputs: Any) -> Tensor:
    """The block's output; with `checkpointing`, only its inputs are saved for the backward."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=getattr(block, "draws", False))
    return block(*inputs)


def init_weights(module: nn.Module) -> None:
    """Normal weights with std 0.02, zero biases. (The usual truncation at 2, a hundred std away, has no effect.)"""
    if isinstance(module, nn.Linear | PatchProjection):
        nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)


def build_encoder(config: Config) -> VisionTransformer:
    """The encoder of a config, freshly initialised, in fp32 on the default device."""
    size = config.vit
    return VisionTransformer(
        img_size=config.data.crop_size,
        patch_size=config.mask.patch_size,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=size.mlp_ratio,
        mean=config.data.mean,
        std=config.data.std,
    )
