"""What a method without averages says that a step costs, against torch's counts and what autograd saves."""

import random

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jepa.config.schema import Config
from jepa.methods import build
from jepa.methods.base import Method
from jepa.model.cost import Kept
from jepa.model.layout import Place
from jepa.train.budget import flops_per_image, mean_tokens
from views import WITHOUT_AVERAGES, config_of, random_views

WIDE = {
    "vicreg": ("loss.expander=[{},{},{}]",),
    "simsiam": ("loss.projector={}", "loss.bottleneck={}"),
    "lejepa": ("loss.projector=[{},{},{}]", "loss.slices={}", "loss.local_size=16"),
}
IN_KERNELS = {"covariance"}  # whose products torch does not see
each = pytest.mark.parametrize("name", WITHOUT_AVERAGES)


def shaped(name: str, patch: int, *overrides: str) -> Config:
    """Of random sizes, with MLPs wide enough that the peak is at the beginning of the backward."""
    heads = random.choice([1, 2])
    width, depth = 4 * heads * random.randint(4, 9), random.randint(1, 3)
    own = [word.format(*(random.randint(300, 600) for _ in range(3))) for word in WIDE[name]]
    size = (f"meta.embed_dim={width}", f"meta.depth={depth}", f"meta.num_heads={heads}")
    size += (f"meta.mlp_ratio={random.choice([1.5, 4.0])}", f"mask.patch_size={patch}")
    return config_of(name, *own, *size, *overrides)


def inputs(config: Config) -> tuple[Method, list[Tensor], object]:
    layout = config.method.layout(config, Place(0, 0, 0, 1), torch.device("cpu"))
    return build(config), random_views(config, config.data.batch_size), layout


@each
def test_flops_are_those_that_torch_counts(name: str) -> None:
    config = shaped(name, 4, "engine.attention=math")  # its products are visible
    model, views, layout = inputs(config)
    with FlopCounterMode(display=False) as counter:
        model(views, layout, None).loss.backward()
    seen = {part: flops for part, flops in flops_per_image(config).items() if part not in IN_KERNELS}
    assert counter.get_total_flops() == config.data.batch_size * sum(seen.values())


@each
def test_saved_bytes_are_those_that_autograd_keeps(name: str) -> None:
    config = shaped(name, 16)
    model, views, layout = inputs(config)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own and tensor.is_floating_point():
            found[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(views, layout, None).loss
    saved = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    held = config.method.activations(config, Kept(*mean_tokens(config)), 4, 1)
    assert loss.requires_grad and held.peak > held.encoder
    assert held.peak - held.features == pytest.approx(saved, rel=0.1)
