"""For tests of methods without averages: small models of them, and their encoder and MLPs in float64 (plain.py).

Weights are a dict of float64 leaves, `w["projector.0.weight"]`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jepa.config.schema import Config
from jepa.methods import build, find, names
from jepa.methods.base import Method
from plain import MEAN, STD, embedded, encoded, linear
from small import small_config

OWN = {
    "vicreg": ("loss.expander=[24,16,12]",),
    "simsiam": ("loss.projector=24", "loss.bottleneck=8"),
    "lejepa": ("loss.projector=[24,16,8]", "loss.slices=32", "loss.local_views=2", "loss.local_size=16"),
}  # what keeps a method small
WITHOUT_AVERAGES = [name for name in names() if not find(name).averaged]


def config_of(name: str, *overrides: str) -> Config:
    """32 px images, patch 4, encoder 24 x 2, fp32."""
    pixels = (f"data.mean={[*MEAN]}", f"data.std={[*STD]}")
    return small_config(f"loss.objective={name}", *OWN.get(name, ()), *pixels, *overrides)


def general(config: Config) -> Method:
    """A randomly perturbed model: at initialisation biases are zero and features nearly constant."""
    model = build(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def random_views(config: Config, images: int) -> list[Tensor]:
    sizes = [view.size for view in config.method.views(config)]
    return [torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8) for size in sizes]


def pooled(images: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The mean over patches of the encoder's output, [B, 24], of images of the config's size."""
    encoder = {name.removeprefix("encoder."): value for name, value in w.items() if name.startswith("encoder.")}
    return encoded(embedded(images, encoder, 4), encoder, 2, 2).mean(1)


def normed(x: Tensor) -> Tensor:
    """Batch norm without scale and shift."""
    x = x - x.mean(0)
    return x / torch.sqrt((x**2).mean(0) + 1e-5)


def mlp(x: Tensor, w: dict[str, Tensor], name: str, layers: int) -> Tensor:
    """Linear layers with batch norm and ReLU between them."""
    for i in range(layers):
        x = linear(x, w, f"{name}.{3 * i}")
        if i < layers - 1:
            norm = f"{name}.{3 * i + 1}"
            x = (normed(x) * w[f"{norm}.weight"] + w[f"{norm}.bias"]).clamp_min(0)
    return x


def compare(model: Method, views: list[Tensor], layout: object, wanted: Callable[..., tuple[Tensor, ...]]) -> None:
    """The loss, its terms and every gradient with `wanted(views, w)`, which computes them in float64."""
    output = model(views, layout, None)
    output.loss.backward()
    got = (output.loss, *output.terms)
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    exact = wanted(views, w)
    exact[0].backward()
    for name, a, b in zip(("total", *model.terms), got, exact, strict=True):
        assert math.isclose(a.item(), b.item(), rel_tol=1e-5, abs_tol=2e-6), name
    exact_gradients = {name: value.grad for name, value in w.items() if value.grad is not None}
    scale = torch.nn.utils.get_total_norm(list(exact_gradients.values())).item()
    assert scale > 1e-3 and exact_gradients.keys() == w.keys()
    for name, p in model.named_parameters():
        assert p.grad is not None and float((p.grad - exact_gradients[name]).norm()) < 3e-5 * scale, name
