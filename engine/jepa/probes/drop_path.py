"""Stochastic depth for fine-tuning (Huang et al. 2016, arXiv 1603.09382)."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from jepa.model.vit import Block, VisionTransformer


def drop_path(encoder: VisionTransformer, rate: float) -> None:
    """In training, drops the branches of each block for some images; from never in the first block to `rate` in the
    last, linearly. Parameter names stay as they are.
    """
    for block, p in zip(encoder.blocks, torch.linspace(0, rate, len(encoder.blocks)).tolist(), strict=True):
        assert isinstance(block, Block)
        block.draws = True
        for branch in (block.attn, block.mlp):
            branch.drop_path = StochasticDepth(p, "row")
            branch.register_forward_hook(_drop)


def _drop(branch: nn.Module, _: Any, output: Tensor) -> Tensor:
    assert isinstance(branch.drop_path, nn.Module)
    return branch.drop_path(output)
