"""The target encoder's forward with its blocks' linear layers in fp8 (`engine.target_precision: fp8`).

The targets need no gradient, so their matrix products, half of those of a ViT-H/14 step, can run at twice bf16's rate.
Only the training targets do: probes, checkpoints and the average see the encoder in bf16, whose weights stay its own.
Each layer keeps an e4m3 copy of its weight, made anew when the optimizer has written, and quantises its input:
    sum_k x_ik w_jk  ~  s_i t_j sum_k q_ik r_jk,    x_ik ~ s_i q_ik,    w_jk ~ t_j r_jk,    s_i = max_k |x_ik| / 448
with an fp32 scale for each token and each output. e4m3 has 3 mantissa bits: an element is off by at most 1/16 of itself
or, if smaller than 2^-6 s_i, by 2^-10 s_i (Micikevicius et al., arXiv 2209.05433). On a GPU torch multiplies, in the
tensor cores' fast accumulation; a CPU emulates the product in fp32, which is slow and meant for tests and study.

Legend: T tokens, K inputs and N outputs of a layer.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from jepa.config.schema import ConfigError

from .execution import compile_blocks
from .vit import Block, VisionTransformer

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
OLDEST = (9, 0)  # Hopper


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] -> e4m3 [..., K] and fp32 scales [..., 1], whose product is about x: zeros stay zeros, and a row with an
    infinity or NaN gives a row with NaN."""
    scale = x.abs().amax(-1, keepdim=True).float() / LARGEST
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() / scale).to(E4M3), scale


def rewrite(weight: Tensor, weight_8: Tensor, scale: Tensor) -> None:
    """Quantises the rows of `weight` [N, K] into `weight_8` and `scale` [N, 1]."""
    rounded, scales = quantise(weight)
    weight_8.copy_(rounded)
    scale.copy_(scales)


def emulated(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x e4m3 [..., K] with scales [..., 1], weight e4m3 [N, K] with scales [N, 1] -> [..., N] in the bias's dtype."""
    return F.linear(x.float() * x_scale, weight.float() * scale, bias.float()).to(bias.dtype)


def multiplied(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`emulated` by torch's own product; K and N are multiples of 16."""
    rows = ScalingType.RowWise
    x_TK, scale_T1 = x.flatten(0, -2), x_scale.flatten(0, -2)
    y_TN = F.scaled_mm(
        x_TK, weight.t(), scale_T1, rows, scale.t(), rows, bias=bias, output_dtype=bias.dtype, use_fast_accum=True
    )
    return y_TN.unflatten(0, x.shape[:-1])


# An op, because Inductor (torch 2.13) cannot lower torch's own if the number of tokens is a product of unknowns.
torch.library.define(
    "jepa_fp8::linear", "(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor bias) -> Tensor"
)
torch.library.impl("jepa_fp8::linear", "default", emulated)
torch.library.impl("jepa_fp8::linear", "cuda", multiplied)


@torch.library.register_fake("jepa_fp8::linear")
def _fake(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return bias.new_empty(*x.shape[:-1], weight.shape[0])


class Linear(nn.Module):
    """A linear layer that multiplies in e4m3, on the parameters of `layer`; like vit.QKV it takes other rows' queries.
    Its copy of the weight is undefined until it is first rewritten."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, outputs = layer.weight, layer.bias, len(layer.weight)
        self.weight_8: Tensor
        self.scale: Tensor
        self.register_buffer("weight_8", torch.empty_like(layer.weight, dtype=E4M3), persistent=False)
        self.register_buffer("scale", layer.weight.new_empty(outputs, 1, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Any:
        if queries is None:
            return self.product(x, slice(None))
        D = x.shape[-1]
        return self.product(queries, slice(None, D)), self.product(x, slice(D, None))

    def product(self, x: Tensor, outputs: slice) -> Tensor:
        return torch.ops.jepa_fp8.linear(*quantise(x), self.weight_8[outputs], self.scale[outputs], self.bias[outputs])


class Encoder:
    """A second forward of `encoder`, in fp8, on the same parameters: call `refresh` after they were written.

    `compiled`: compile its blocks, and the quantisation of a weight into one pass. Raises ConfigError on a GPU without
    fp8.
    """

    def __init__(self, encoder: VisionTransformer, compiled: bool = False) -> None:
        require(next(encoder.parameters()).device)
        own = (*encoder.parameters(), *encoder.buffers())
        self.encoder = copy.deepcopy(encoder, {id(tensor): tensor for tensor in own})  # copies modules, not tensors
        self.layers: list[Linear] = []
        for block in self.encoder.blocks:
            assert isinstance(block, Block)
            for parent, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
                self.layers.append(Linear(getattr(parent, name)))
                setattr(parent, name, self.layers[-1])
        self.rewrite = torch.compile(rewrite, dynamic=False) if compiled else rewrite
        if compiled:
            compile_blocks(self.encoder)

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantises the weights as they are now."""
        for layer in self.layers:
            self.rewrite(layer.weight, layer.weight_8, layer.scale)

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Sequence[Tensor] = ()) -> Tensor:
        """`VisionTransformer.forward` on all patches."""
        return self.encoder(images, rows=rows)


def require(device: torch.device) -> None:
    """Raises ConfigError if `device` is a GPU that cannot multiply in fp8."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < OLDEST:
        name, (has, needs) = torch.cuda.get_device_name(device), ("{}.{}".format(*pair) for pair in (found, OLDEST))
        problem = f"{name} has compute capability {has}; wanted {needs} (Hopper) or newer: give bf16"
        raise ConfigError([f"engine.target_precision = 'fp8': {problem}"])
