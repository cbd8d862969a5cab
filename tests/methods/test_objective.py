"""The losses against their definitions in float64, and two ranks against one."""

import copy
import math
from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from jepa.data.masks import sample_masks
from jepa.methods import build
from jepa.methods.base import Method
from jepa.methods.cjepa import mean_pairwise_cosine
from jepa.model.layout import Layout
from jepa.model.projector import GlobalBatchNorm
from plain import criterion
from small import every_row, run_ranks, small_config


def batch(images: int, *overrides: str) -> tuple[list[Tensor], Layout, Tensor]:
    """Random images, masks sampled by the config, and target features."""
    config = small_config(*overrides)
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8)
    masks = sample_masks(config.mask_spec, seed=int(torch.randint(2**31, ())), step=3, first=0, batch=images)
    return [pixels], every_row(masks.context, masks.target), torch.randn(images, 64, 24) * 3 + 1


def general_model(*overrides: str) -> Method:
    """A randomly perturbed model: at initialisation biases are zero and features nearly constant."""
    model = build(small_config(*overrides))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def norm_of(gradient: Iterable[Tensor]) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradient))


def wanted_losses(model: Method, views: list[Tensor], layout: Layout, h: Tensor) -> tuple[Tensor, ...]:
    """The criterion in float64 on the outputs of the model's encoder and predictor (checked by test_vit.py)."""
    (pixels,), (context, target, *_), per_context = views, layout, []
    for seen in context:
        z = model.encoder(pixels, seen)
        p = model.predictor(z, seen, target).double().view(*target.shape, -1)
        per_context.append(criterion(model, z.double().mean(1), p, target, h))
    return tuple(torch.stack(terms).mean() for terms in zip(*per_context, strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss.objective=ijepa",),
        ("loss.objective=ijepa", "mask.num_enc_masks=2"),
        ("loss.beta_vicreg=1.0",),
        ("loss.beta_vicreg=1.0", "mask.num_enc_masks=2", "mask.num_pred_masks=3"),
        ("loss.beta_vicreg=1.0", "loss.vicreg_on=context"),
        ("loss.beta_vicreg=1.0", "loss.regularizer=cosine"),
    ],
    ids=" ".join,
)
def test_losses_are_the_paper_s(overrides: tuple[str, ...]) -> None:
    model = general_model(*overrides)
    inputs = batch(6, *overrides)
    output = model(*inputs)
    got = output.loss, *output.terms
    names = list(dict(model.named_parameters()))
    grads = torch.autograd.grad(got[0], list(model.parameters()), allow_unused=True)
    wanted = wanted_losses(model, *inputs)
    wanted_grads = torch.autograd.grad(wanted[0], list(model.parameters()), allow_unused=True)
    for name, a, b in zip(("total", *model.terms), got, wanted, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-5, abs=1e-6), name
    scale = norm_of(g for g in wanted_grads if g is not None)
    for name, a, b in zip(names, grads, wanted_grads, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert float((a - b).norm()) < 1e-5 * scale, name


def test_features_may_be_made_when_they_are_needed() -> None:
    """After the predictions, and once for two context masks. The loss is bitwise the same."""
    overrides = ("mask.num_enc_masks=2",)
    model, (views, layout, h) = general_model(*overrides), batch(4, *overrides)
    happened = []
    model.predictor.register_forward_hook(lambda *_: happened.append("predicted"))
    later = model(views, layout, lambda: happened.append("features") or h)
    assert happened == ["predicted", "predicted", "features"] and later.features["target"] is h
    assert later.loss.item() == model(views, layout, h).loss.item()


def test_cosine_of_equal_and_opposite_blocks() -> None:
    row = torch.randn(5, 1, 7)
    assert float(mean_pairwise_cosine(row.expand(-1, 4, -1))) == pytest.approx(1, abs=1e-6)
    assert float(mean_pairwise_cosine(torch.cat([row, -row], 1))) == pytest.approx(-1, abs=1e-6)


def test_batch_norm_is_torch_s() -> None:
    norm, x = GlobalBatchNorm(7), torch.randn(33, 7, requires_grad=True)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    y = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(norm(x), y)
    direction = torch.randn_like(y)
    got, wanted = (torch.autograd.grad((out * direction).sum(), x)[0] for out in (norm(x), y))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def losses_and_gradient(state: dict, inputs: tuple[list[Tensor], Layout, Tensor], overrides: tuple[str, ...]) -> tuple:
    """One rank's part of the batch: its losses, and the gradient averaged over the ranks."""
    model = build(small_config(*overrides))
    model.load_state_dict(state)
    rank, world = dist.get_rank(), dist.get_world_size()
    (pixels,), (context, target, *_), h = inputs
    mine = slice(rank * len(pixels) // world, (rank + 1) * len(pixels) // world)
    output = model([pixels[mine]], every_row(context[:, mine], target[:, mine]), h[mine])
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= world
    return [output.loss.detach(), *output.terms], grads


@pytest.mark.ranks
@pytest.mark.parametrize("where", ["loss.vicreg_on=predictions", "loss.vicreg_on=context"])
def test_two_ranks_with_half_the_batch_are_one_rank_with_all_of_it(where: str) -> None:
    overrides = ("loss.beta_vicreg=1.0", where)
    model = general_model(*overrides)
    inputs = batch(8, *overrides)
    whole = copy.deepcopy(model)
    output = whole(*inputs)
    output.loss.backward()
    wanted = output.loss, *output.terms
    ranks = run_ranks(2, losses_and_gradient, model.state_dict(), inputs, overrides)
    for i, name in enumerate(("total", *model.terms)):
        mean = sum(losses[i].item() for losses, _ in ranks) / 2
        assert mean == pytest.approx(wanted[i].item(), rel=1e-5), name
    gradient = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    scale = norm_of(gradient.values())
    for _, grads in ranks:
        assert norm_of(grads[name] - gradient[name] for name in gradient) < 1e-5 * scale
