"""The vision transformers of I-JEPA (arXiv 2301.08243): the encoder and the narrow predictor.

Legend: B images, N patches, K kept patches (Kc of the context, Kt of a target block), M target blocks, D encoder
width, Dp predictor width. Parameter names are those of the published checkpoints. Images stay uint8 until
`patchify`, which writes only the patches that are kept.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kernels import patchify, predictor_tokens

from .config import Config

LAYER_NORM_EPS = 1e-6
INIT_STD = 0.02


def sincos_positions(dim: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, fp32 [side * side, dim], in raster order.

    The first half of the width encodes the column, the second the row; each half is [sin | cos] of the coordinate
    times omega_i = 10000 ** (-i / (dim / 4)).
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(side * side, dim).float()


class Attention(nn.Module):
    """Multi-head self-attention whose score matrix is never written to memory."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x_BKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, heads, K, D / heads]."""
        B, K, D = x_BKD.shape
        q, k, v = self.qkv(x_BKD).view(B, K, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x_BKD: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x_BKD))
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchProjection(nn.Module):
    """The patch embedding as one matrix product, its weight in a convolution's shape [D, 3, P, P]."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """uint8 images -> embedded patches [B, K, D], of the patches in `index_BK` only (all of them if None)."""

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

    `index_BK` (int64, raster order) chooses the patches that are seen; None means all N. The final norm is applied.
    `mean` and `std` are the three channels' statistics of images scaled to 0..1.
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
        self.patch_embed = PatchEmbed(patch_size, embed_dim, mean, std)
        positions = sincos_positions(embed_dim, img_size // patch_size)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", positions[None])
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.apply(init_weights)

    def embed(self, images: Tensor, index_BK: Tensor | None = None) -> Tensor:
        if self.img_size not in images.shape[1:3] or self.img_size not in images.shape[2:4]:
            raise ValueError(
                f"images: given {list(images.shape)}, wanted [B, {self.img_size}, {self.img_size}, 3] or "
                f"[B, 3, {self.img_size}, {self.img_size}] (data.crop_size)"
            )
        x = self.patch_embed(images, index_BK)
        return x + (self.pos_embed if index_BK is None else self.pos_embed[0][index_BK]).to(x.dtype)

    def forward(self, images: Tensor, index_BK: Tensor | None = None) -> Tensor:
        x = self.embed(images, index_BK)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The normed outputs [B, N, D] of the given blocks (0 is the first, -1 the last), in the order asked for."""
        wanted = [layer % len(self.blocks) for layer in layers]
        x, outputs = self.embed(images), {}
        for i, block in enumerate(self.blocks):
            x = block(x)
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
        q, k, _ = last.attn.heads(last.norm1(x))
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


class Predictor(nn.Module):
    """Predicts the M target blocks from the context, each in a sequence of its own [context, its mask tokens].

    forward: context [B, Kc, D], its indices [B, Kc], the targets' [M, B, Kt] -> [M * B, Kt, D], rows m * B + b.
    """

    def __init__(
        self,
        side: int,
        embed_dim: int,
        predictor_embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.predictor_embed = nn.Linear(embed_dim, predictor_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, predictor_embed_dim))
        self.predictor_pos_embed: Tensor
        self.register_buffer("predictor_pos_embed", sincos_positions(predictor_embed_dim, side)[None])
        self.predictor_blocks = nn.ModuleList([Block(predictor_embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.predictor_norm = nn.LayerNorm(predictor_embed_dim, eps=LAYER_NORM_EPS)
        self.predictor_proj = nn.Linear(predictor_embed_dim, embed_dim)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=INIT_STD)

    def forward(self, context_BKD: Tensor, context_index_BK: Tensor, target_index_MBK: Tensor) -> Tensor:
        x = predictor_tokens(
            self.predictor_embed(context_BKD),
            context_index_BK,
            target_index_MBK,
            self.predictor_pos_embed[0],
            self.mask_token.flatten(),
        )
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, context_index_BK.shape[1] :]))


def init_weights(module: nn.Module) -> None:
    """Normal weights of deviation 0.02, zero biases. (Truncation at 2, a hundred deviations away, does nothing.)"""
    if isinstance(module, nn.Linear | PatchProjection):
        nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)


def build_encoder(config: Config) -> VisionTransformer:
    """The encoder that the config describes, freshly initialised, fp32, on the default device."""
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


def build_predictor(config: Config) -> Predictor:
    """The predictor that the config describes, freshly initialised, fp32, on the default device."""
    return Predictor(
        side=config.grid,
        embed_dim=config.vit.embed_dim,
        predictor_embed_dim=config.meta.pred_emb_dim,
        depth=config.meta.pred_depth,
        num_heads=config.meta.pred_num_heads or config.vit.num_heads,
    )
