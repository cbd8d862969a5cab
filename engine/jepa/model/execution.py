"""How a model is run, which changes no result: the attention backend, recomputation, and compiled blocks."""

import torch
import torch._dynamo
import torch._inductor.config
import torch.fx.experimental._config
from torch import nn

from jepa.config.schema import Config

from .attention import require
from .predictor import Predictor
from .vit import Attention, Block, VisionTransformer


def configure(model: nn.Module, config: Config) -> None:
    """Makes `model` run as the section `engine` says. Raises ConfigError if its attention is not installed."""
    require(config.engine.attention)
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = config.engine.attention
        if isinstance(module, VisionTransformer | Predictor):
            module.checkpointing = config.engine.activation_checkpointing
        if isinstance(module, Predictor):
            module.skip_unread = config.engine.skip_unread


def compile_blocks(*models: nn.Module, backend: str = "inductor") -> None:
    """Compiles every block of the models: one graph for identical blocks, dynamic in the number of images and tokens.

    Per block, because that compiles quickly and leaves DeepSpeed and the kernels' ops outside the graphs.
    """
    torch._dynamo.config.recompile_limit = 64  # encoder, target encoder, predictor and eval all compile Block.forward
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by chance stay separate symbols
    # Inductor fuses a layer norm's gradients from a number of rows on, and would compile again on crossing it.
    if hasattr(torch._inductor.config.triton, "mix_order_reduction_non_strict_mode"):
        torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True
    else:  # torch 2.10
        torch._inductor.config.triton.mix_order_reduction = False
    for block in (module for model in models for module in model.modules() if isinstance(module, Block)):
        # Its patterns would turn materialised scores into scaled_dot_product_attention.
        options = {"pattern_matcher": False} if block.attn.backend == "math" else None
        block.compile(dynamic=True, backend=backend, options=options)
