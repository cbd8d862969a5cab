"""Packed contexts against the papers' definitions in float64, one image at a time; and two ranks against one."""

import random
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jepa.config.schema import Config, ConfigError
from jepa.data.masks import Masks, sample_masks, thin
from jepa.methods import build
from jepa.methods.base import Method
from jepa.model.layout import Place, lay_out, masks_of, target_rows
from jepa.model.packed import ROUNDING, Ragged, pack
from jepa.ranks.distributed import Ranks
from plain import MEAN, STD, criterion, embedded, encoded, predicted
from small import every_row, run_ranks, small_config

PACKED = ("mask.mode=packed", f"data.mean={list(MEAN)}", f"data.std={list(STD)}")
CPU = torch.device("cpu")


def packed(*overrides: str) -> Config:
    regularized = () if "loss.objective=ijepa" in overrides else ("loss.beta_vicreg=1.0",)
    return small_config(*PACKED, *regularized, *overrides)


def general_model(*overrides: str) -> Method:
    """A randomly perturbed model: at initialisation biases are zero and features nearly constant."""
    model = build(packed(*overrides))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def draw(images: int, *overrides: str) -> tuple[Tensor, Masks, Tensor]:
    """Random images, masks, and target features."""
    spec = packed(*overrides).mask_spec
    masks = sample_masks(spec, seed=random.randrange(2**32), step=random.randrange(100), first=0, batch=images)
    return torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8), masks, torch.randn(images, 64, 24) * 3 + 1


def layout(masks: Masks, pad: bool) -> list[Ragged]:
    assert masks.lengths is not None
    parts = masks.context.split(masks.lengths.sum(1).tolist())
    unit = -(-64 * masks.target.shape[1] // ROUNDING) if pad else 0
    return [pack(part, n, masks.target, 64, unit) for part, n in zip(parts, masks.lengths, strict=True)]


def wanted_losses(model: Method, pixels: Tensor, masks: Masks, h: Tensor) -> tuple[Tensor, ...]:
    assert masks.lengths is not None
    w, v = ({name: x.double() for name, x in part.state_dict(keep_vars=True).items()}
            for part in (model.encoder, model.predictor))  # fmt: skip
    M, B, _ = masks.target.shape
    contexts, per_context = iter(masks.context.split(masks.lengths.flatten().tolist())), []
    for _ in masks.lengths:
        seen = [next(contexts) for _ in range(B)]
        z = [encoded(embedded(pixels[b : b + 1], w, 4)[:, seen[b]], w, 2, 2)[0] for b in range(B)]
        p = [
            torch.stack([predicted(z[b], seen[b], masks.target[m, b], v, 8, 2, 2) for b in range(B)]) for m in range(M)
        ]
        pooled = torch.stack([rows.mean(0) for rows in z])
        per_context.append(criterion(model, pooled, torch.stack(p), masks.target, h))
    return tuple(torch.stack(terms).mean() for terms in zip(*per_context, strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss.objective=ijepa",),
        ("loss.objective=ijepa", "mask.num_enc_masks=2", "engine.activation_checkpointing=true"),
        (),
        ("mask.num_enc_masks=2", "mask.num_pred_masks=3", "engine.skip_unread=false"),
        ("loss.vicreg_on=context",),
        ("loss.regularizer=cosine",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("pad", [False, True])
def test_packed_losses_and_gradients(overrides: tuple[str, ...], pad: bool) -> None:
    model = general_model(*overrides)
    pixels, masks, h = draw(5, *overrides)
    output = model([pixels], every_row(layout(masks, pad), masks.target), h)
    got = output.loss, *output.terms
    wanted = wanted_losses(model, pixels, masks, h)
    for name, a, b in zip(("total", *model.terms), got, wanted, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-5, abs=1e-6), name
    parameters = dict(model.named_parameters())
    grads, wanted_grads = (
        torch.autograd.grad(x, list(parameters.values()), allow_unused=True) for x in (got[0], wanted[0])
    )
    scale = torch.cat([g.flatten() for g in wanted_grads if g is not None]).norm()
    for name, a, b in zip(parameters, grads, wanted_grads, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert float((a - b).norm()) < 1e-5 * scale, name


def test_images_in_either_layout() -> None:
    model, (pixels, masks, _) = general_model(), draw(3)
    (ragged,) = layout(masks, pad=True)
    assert torch.equal(model.encoder(pixels, ragged), model.encoder(pixels.permute(0, 3, 1, 2), ragged))


@pytest.mark.parametrize("pad", [False, True])
def test_every_patch_is_in_the_layout_once(pad: bool) -> None:
    for _ in range(20):
        B = random.randint(1, 9)
        _, masks, _ = draw(B)
        (ragged,) = layout(masks, pad)
        assert masks.lengths is not None
        begin = ragged.contexts.offsets.tolist()
        own = masks.context.split(masks.lengths[0].tolist())
        assert len(begin) == B + 1 + pad and begin[-1] == len(ragged.patch_T)
        assert max(b - a for a, b in pairwise(begin)) == ragged.contexts.longest
        for b in range(B):
            assert torch.equal(ragged.patch_T[begin[b] : begin[b + 1]], own[b] + 64 * b)
        if pad:  # at least one row, at most 1/128 of the batch's patches
            assert 1 <= begin[-1] - begin[-2] <= -(-64 * B // 128) and begin[-1] % -(-64 * B // 128) == 0
        source = torch.arange(len(ragged.order_R))
        assert torch.equal(source[ragged.order_R][ragged.back_R], source)


def test_a_budget_is_always_filled_and_never_exceeded() -> None:
    """Packed contexts have one total size; larger ones are thinned at random, and no further than needed."""
    sizes = set()
    for share in (0.25, 0.4, 0.9):
        config = packed(f"mask.token_budget={share}", "data.batch_size=6", "mask.num_enc_masks=2")
        assert config.token_budget == round(share * 6 * 64)
        for step in range(20):
            whole, place = sample_masks(config.mask_spec, seed=0, step=step, first=0, batch=6), Place(step, 0, 0, 1)
            masks = masks_of(config, place)
            assert torch.equal(masks.context, masks_of(config, place).context)
            pairs = zip(by_image(whole), by_image(masks), strict=True)
            assert all(
                set(kept) <= set(drawn) and kept == sorted(kept) and kept[0] == drawn[0] for drawn, kept in pairs
            )
            assert masks.lengths is not None and whole.lengths is not None
            for drawn, kept in zip(whole.lengths.sum(1).tolist(), masks.lengths.sum(1).tolist(), strict=True):
                assert kept == min(drawn, config.token_budget - 1)
                sizes.add("cut" if kept < drawn else "whole")
            rows = lay_out(masks, config, CPU)
            assert isinstance(rows.contexts, list)
            assert {len(one.patch_T) for one in rows.contexts} == {config.token_budget}
    assert sizes == {"cut", "whole"}


def test_patches_are_thinned_evenly() -> None:
    """Regardless of their image and their position in it, except for an image's first patch."""
    lengths, most, draws = torch.tensor([[9, 4, 12]]), 15, 3000
    masks = Masks(torch.cat([torch.arange(n) for n in lengths[0].tolist()]), torch.zeros(1, 3, 1), lengths)
    left = torch.zeros(25)
    for step in range(draws):
        thinned = thin(masks, most, seed=int(torch.randint(2**40, ())), step=step, first=0)
        assert thinned.lengths is not None and len(thinned.context) == most
        owner = torch.arange(3).repeat_interleave(thinned.lengths[0])
        left[torch.tensor([0, 9, 13])[owner] + thinned.context] += 1
    always, others = torch.tensor([0, 9, 13]), torch.ones(25, dtype=torch.bool)
    others[always] = False
    p = (most - 3) / 22
    assert left[always].tolist() == [draws] * 3
    assert float((left[others] - draws * p).abs().max()) < 5 * (draws * p * (1 - p)) ** 0.5


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    for words in (("mask.mode=packed", "mask.token_budget=0.01"), ("mask.token_budget=0.5",)):
        with pytest.raises(ConfigError, match=r"mask\.token_budget"):
            small_config(*words)


def alone() -> Ranks:
    return Ranks(0, 1, CPU, dist.HashStore(), None)


def by_image(masks: Masks) -> list[list[int]]:
    assert masks.lengths is not None
    return [part.tolist() for part in masks.context.split(masks.lengths.flatten().tolist())]


def test_rows_of_the_targets() -> None:
    """As many as any image needs, all distinct, with the targets at the positions returned."""
    for _ in range(20):
        M, B, Kt, N = (random.randint(1, 9) for _ in range(4))
        target = torch.rand(M, B, N).argsort(-1)[..., :Kt]
        order, places, used = target_rows(target, N)
        assert torch.equal(order.sort(1).values, torch.arange(N).expand(B, N))
        assert used == max(len(set(target[:, b].flatten().tolist())) for b in range(B))
        assert int(places.max()) < used
        for b in range(B):
            assert torch.equal(order[b][places[:, b]], target[:, b])


def losses_and_gradient(state: dict[str, Tensor], pixels: Tensor, h: Tensor, seed: int) -> tuple:
    """One rank's part of the batch, with masks it sampled itself: losses, and the gradient averaged over ranks."""
    config = packed()
    model = build(config)
    model.load_state_dict(state)
    rank, world = dist.get_rank(), dist.get_world_size()
    share = len(pixels) // world
    mine = slice(rank * share, (rank + 1) * share)
    masks = sample_masks(config.mask_spec, seed=seed, step=1, first=rank * share, batch=share)
    rows = lay_out(masks, config, CPU)
    order, _, used = target_rows(masks.target, 64)
    features = h[mine].gather(1, order[:, :used, None].expand(-1, -1, h.shape[2]))
    output = model([pixels[mine]], rows, features)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= world
    return [output.loss.detach(), *output.terms], grads


@pytest.mark.ranks
def test_two_ranks_with_half_the_batch_are_one_rank_with_all_of_it() -> None:
    model, (pixels, _, h), seed = general_model(), draw(8), random.randrange(2**32)
    masks = sample_masks(packed().mask_spec, seed=seed, step=1, first=0, batch=8)
    wanted = wanted_losses(model, pixels, masks, h)
    names = [name for name, _ in model.named_parameters()]
    gradient = dict(zip(names, torch.autograd.grad(wanted[0], list(model.parameters())), strict=True))
    scale = torch.cat([g.flatten() for g in gradient.values()]).norm()
    ranks = run_ranks(2, losses_and_gradient, model.state_dict(), pixels, h, seed)
    for i, name in enumerate(("total", *model.terms)):
        assert sum(losses[i].item() for losses, _ in ranks) / 2 == pytest.approx(wanted[i].item(), rel=1e-5), name
    for _, grads in ranks:
        assert torch.cat([(grads[n] - gradient[n]).flatten() for n in gradient]).norm() < 1e-5 * scale
