"""A step of every method on a GPU, and in bf16, against fp32 on the CPU, which other tests hold to float64."""

import copy
import math

import pytest
import torch
from torch import Tensor

from jepa.config.schema import Config
from jepa.methods import names
from jepa.methods.base import Method
from jepa.model.layout import Place
from numerics import DEVICES, needs_gpu
from views import config_of, general, random_views

CASES = [(name,) for name in names()] + [
    ("ijepa", "mask.mode=packed"),
    ("cjepa", "mask.mode=unbiased", "mask.num_enc_masks=2", "loss.beta_vicreg=1.0"),
    ("cjepa", "loss.vicreg_on=context", "loss.beta_vicreg=1.0"),
    ("cjepa", "loss.regularizer=cosine", "loss.beta_vicreg=1.0"),
]


def step(
    model: Method, teacher: Method, config: Config, views: list[Tensor], device: str, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The loss and its terms, and the gradients by name, on the CPU. `teacher` stands in for the averages."""
    model, teacher = (copy.deepcopy(module).to(device, dtype) for module in (model, teacher))
    here = [view.to(device) for view in views]
    layout, targets = model.layout(config, Place(5, 0, 0, 1), torch.device(device)), None
    if model.averaged:
        with torch.no_grad():
            targets = model.targets(lambda images, rows: teacher.encoder(images, rows=rows), here, layout)
    output = model(here, layout, targets)
    output.loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return [value.detach().cpu() for value in (output.loss, *output.terms)], gradients


def compare(case: tuple[str, ...], device: str, dtype: torch.dtype, error: float) -> None:
    """The loss, its terms and all gradients."""
    config = config_of(*case)
    model, teacher, views = general(config), general(config), random_views(config, config.data.batch_size)
    losses, gradients = step(model, teacher, config, views, device, dtype)
    exact_losses, exact = step(model, teacher, config, views, "cpu", torch.float32)
    for name, a, b in zip(("loss", *model.terms), losses, exact_losses, strict=True):
        assert math.isclose(a.item(), b.item(), rel_tol=error, abs_tol=error), name
    assert gradients.keys() == exact.keys()
    scale = torch.nn.utils.get_total_norm(list(exact.values())).item()
    assert scale > 1e-3
    for name, gradient in gradients.items():
        assert float((gradient.double() - exact[name]).norm()) < error * scale, name


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_step_on_a_gpu_is_that_of_the_cpu(case: tuple[str, ...]) -> None:
    compare(case, "cuda", torch.float32, 2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [("ijepa",), ("ijepa", "mask.mode=packed"), ("cjepa",)], ids=" ".join)
def test_a_step_in_bf16_is_near_that_in_fp32(case: tuple[str, ...], device: str) -> None:
    """Of methods whose statistics do not divide by the deviation of a few rounded images."""
    compare(case, device, torch.bfloat16, 6e-2)
