"""I-JEPA's narrow predictor (arXiv 2301.08243).

Legend: B images, M target blocks, Kc/Kt kept patches of a context and of a target block, D encoder width, Dp predictor
width, T rows of all contexts if these are packed. Parameter names are those of the published checkpoints.
"""

import torch
from torch import Tensor, nn

from jepa.config.schema import Config
from jepa_kernels import predictor_tokens

from .packed import Ragged, join, targets_of
from .vit import INIT_STD, LAYER_NORM_EPS, Block, init_weights, run, sincos_positions


class Predictor(nn.Module):
    """Predicts the M target blocks from the context, each in its own sequence [context, mask tokens].

    forward: context [B, Kc, D], its indices [B, Kc], the targets' [M, B, Kt] -> [M * B, Kt, D], rows m * B + b;
    or packed contexts, [T, D] and their layout, in place of the first two.
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
        self.checkpointing, self.skip_unread = False, True
        self.predictor_embed = nn.Linear(embed_dim, predictor_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, predictor_embed_dim))
        self.predictor_pos_embed: Tensor
        self.register_buffer("predictor_pos_embed", sincos_positions(predictor_embed_dim, side)[None])
        self.predictor_blocks = nn.ModuleList([Block(predictor_embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.predictor_norm = nn.LayerNorm(predictor_embed_dim, eps=LAYER_NORM_EPS)
        self.predictor_proj = nn.Linear(predictor_embed_dim, embed_dim)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=INIT_STD)

    def forward(self, context: Tensor, index: Tensor | Ragged, target_MBK: Tensor) -> Tensor:
        z, (M, B, Kt) = self.predictor_embed(context), target_MBK.shape
        ragged, asking, joined = None, None, None
        if isinstance(index, Ragged):
            ragged, asking, joined = index, index.targets, index.joined
            x = join(z, ragged, target_MBK, self.predictor_pos_embed[0], self.mask_token)
        else:
            x = predictor_tokens(z, index, target_MBK, self.predictor_pos_embed[0], self.mask_token.flatten())

        def targets(x: Tensor) -> Tensor:
            return x[:, z.shape[1] :] if ragged is None else targets_of(x, ragged, len(z), M)

        blocks = list(self.predictor_blocks)
        last = blocks.pop() if self.skip_unread else None
        for block in blocks:
            x = run(block, self.checkpointing, x, None, joined, joined)
        x = run(last, self.checkpointing, x, targets(x), asking, joined) if last else targets(x)
        if ragged:  # drops the padding image, if any
            x = x.view(M, -1, Kt, x.shape[-1])[:, :B].flatten(0, 1)
        return self.predictor_proj(self.predictor_norm(x))


def build_predictor(config: Config) -> Predictor:
    """The predictor of a config, freshly initialised, in fp32 on the default device."""
    size = config.predictor
    return Predictor(
        side=config.grid,
        embed_dim=config.vit.embed_dim,
        predictor_embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
    )
