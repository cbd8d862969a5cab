"""fp8 targets: rounding as the format defines it, errors within derived bounds, copies always of the newest weights.

On a CPU the product is emulated; a GPU's is tested where there is one.
"""

import copy
import itertools
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import jepa.train.step
from jepa.config.schema import ConfigError
from jepa.data.loader import Batch
from jepa.data.masks import sample_masks
from jepa.data.synthetic import draw
from jepa.methods import build
from jepa.model import fp8
from jepa.model.layout import lay_out
from jepa.model.vit import VisionTransformer
from jepa.ranks import distributed
from jepa.train import zero
from jepa.train.memory import memory_per_rank
from numerics import CUDA, needs_gpu
from processes import rows, start, write_config, write_images
from small import run_ranks, small_config, whole_weights

CPU = torch.device("cpu")
SMALL = ("meta.embed_dim=32", "meta.use_bfloat16=true")
FP8 = (*SMALL, "engine.target_precision=fp8")


def e4m3() -> Tensor:
    """All finite values, from the definition: sign, 4 exponent bits of bias 7, 3 mantissa bits; all ones is NaN."""
    exponents, mantissas = torch.arange(16, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64) / 8
    positive = torch.where(exponents == 0, mantissas * 2**-6, (1 + mantissas) * 2 ** (exponents - 7)).flatten()[:-1]
    return torch.cat([-positive.flip(0), positive])


def outliers(*shape: int) -> Tensor:
    """bf16 rows of very different sizes, some with elements a hundred times the others."""
    x = torch.randn(shape) * 10 ** (4 * torch.rand(*shape[:-1], 1) - 2)
    return (x * torch.where(torch.rand(shape) < 0.02, 100.0, 1.0)).bfloat16()


def error_bound(x: Tensor) -> Tensor:
    """How far an element may be from its quantised value: half a step of 3 mantissa bits, or of the smallest step."""
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    return torch.maximum(x.double().abs() / 16, scale * 2**-10) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_element_becomes_the_nearest_value_of_the_format(dtype: torch.dtype) -> None:
    x = outliers(50, 96).to(dtype) * (1 + torch.rand(50, 96) / 300).to(dtype)
    x_8, scale = fp8.quantise(x)
    wanted = x.double().abs().amax(-1, keepdim=True) / 448
    assert torch.allclose(scale.double(), wanted, rtol=1e-6) and scale.dtype == torch.float32
    scaled = x.double() / scale.double()
    apart = (scaled[..., None] - e4m3()).abs().amin(-1)
    assert x_8.dtype == torch.float8_e4m3fn and torch.isin(x_8.double(), e4m3()).all()
    assert ((x_8.double() - scaled).abs() <= apart + 1e-6 * scaled.abs()).all()
    assert ((x_8.double() * scale.double() - x.double()).abs() <= error_bound(x)).all()


def test_zeros_stay_zeros_and_what_is_not_finite_stays_visible() -> None:
    x = torch.zeros(5, 16)
    x[1, 3], x[2, 3], x[3, 3], x[4] = 1e-38, float("inf"), float("nan"), 3e38
    x_8, scale = fp8.quantise(x)
    back = x_8.double() * scale.double()
    assert (back[0] == 0).all() and not back[2].isfinite().all() and not back[3].isfinite().all()
    assert torch.allclose(back[[1, 4]], x[[1, 4]].double(), rtol=1 / 16)


def linear(inputs: int, outputs: int) -> tuple[nn.Linear, fp8.Linear]:
    exact = nn.Linear(inputs, outputs).bfloat16().requires_grad_(False)
    exact.weight.data = outliers(outputs, inputs)
    layer = fp8.Linear(exact)
    fp8.rewrite(layer.weight, layer.weight_8, layer.scale)
    return exact, layer


@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 64), (2, 1, 256)])
def test_a_product_errs_no_more_than_the_format(shape: tuple[int, ...]) -> None:
    """Each output against float64: the errors of all its terms, and the rounding of the result to bf16."""
    exact, layer = linear(shape[-1], 48)
    x = outliers(*shape)
    y, w = layer(x), exact.weight.double()
    assert y.dtype == torch.bfloat16 and y.shape == (*shape[:-1], 48)
    wanted = F.linear(x.double(), w, exact.bias.double())
    dx, dw = error_bound(x), error_bound(w)
    bound = F.linear(dx, w.abs()) + F.linear(x.double().abs(), dw) + F.linear(dx, dw)
    assert ((y.double() - wanted).abs() <= 1.01 * bound + 2**-8 * y.double().abs()).all()
    x_8, scale = fp8.quantise(x)
    same = F.linear(x_8.double() * scale.double(), layer.weight_8.double() * layer.scale.double(), exact.bias.double())
    assert ((y.double() - same).abs() <= 2**-8 * same.abs() + 1e-5 * bound).all()


def test_the_usual_error_is_that_of_three_mantissa_bits() -> None:
    """Normal numbers: errors of random size and sign, a few hundredths of the result's norm."""
    exact, x = nn.Linear(256, 64).bfloat16().requires_grad_(False), torch.randn(100, 256).bfloat16()
    layer = fp8.Linear(exact)
    fp8.rewrite(layer.weight, layer.weight_8, layer.scale)
    wanted = F.linear(x.double(), exact.weight.double(), exact.bias.double())
    assert 0.02 < (layer(x).double() - wanted).norm() / wanted.norm() < 0.06


def test_queries_of_other_rows_are_those_rows_queries() -> None:
    _, layer = linear(32, 96)
    x, rows = outliers(4, 9, 32), outliers(4, 5, 32)
    asking, asked = layer(x, rows)
    assert torch.equal(asking, layer(rows)[..., :32]) and torch.equal(asked, layer(x)[..., 32:])


def teacher_of(*overrides: str) -> VisionTransformer:
    return build(small_config(*SMALL, *overrides)).encoder.bfloat16().requires_grad_(False)


def test_the_encoder_given_is_left_as_it_is_and_its_tensors_are_shared() -> None:
    encoder, images = teacher_of(), torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    before, state = encoder(images), copy.deepcopy(encoder.state_dict())
    in_fp8 = fp8.Encoder(encoder)
    in_fp8.refresh()
    first = in_fp8(images)
    assert torch.equal(encoder(images), before) and not torch.equal(first, before)
    assert encoder.state_dict().keys() == state.keys() == in_fp8.encoder.state_dict().keys()
    shared = dict(in_fp8.encoder.named_parameters())
    assert all(shared[name] is p and torch.equal(p, state[name]) for name, p in encoder.named_parameters())
    assert [type(m) for m in in_fp8.encoder.modules()].count(fp8.Linear) == len(in_fp8.layers) == 4 * 2

    for p in encoder.parameters():  # written in place, as the optimizer does
        p.data.mul_(1.5)
    in_fp8.refresh()
    other = fp8.Encoder(copy.deepcopy(encoder))
    other.refresh()
    assert torch.equal(in_fp8(images), other(images)) and not torch.equal(in_fp8(images), first)


def test_the_last_block_runs_on_rows_alone_as_in_bf16() -> None:
    in_fp8 = fp8.Encoder(teacher_of())
    in_fp8.refresh()
    images, rows = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 64, (2, 3, 7))
    whole = in_fp8(images)
    wanted = torch.cat([whole.gather(1, group[..., None].expand(-1, -1, 32)) for group in rows], 1)
    got = in_fp8(images, list(rows))
    assert F.cosine_similarity(got.float(), wanted.float(), dim=-1).min() > 0.999  # rounded after another product shape


# --- a run


def steps(stage: int) -> list[str]:
    """Three steps of two micro-batches; returns what was wrong with the copies that made the targets."""
    config = small_config(*FP8, f"engine.zero_stage={stage}", "engine.gradient_accumulation_steps=2")
    rank = dist.get_rank()
    ranks = distributed.Ranks(rank, dist.get_world_size(), CPU, dist.HashStore(), dist.group.WORLD)
    model_engine, teacher = jepa.train.step.start_model(config, CPU)
    assert teacher.in_fp8 is not None
    refresh, seen, wrong = teacher.in_fp8.refresh, list[None](), []
    teacher.in_fp8.refresh = lambda: seen.append(None) or refresh()
    averages: dict[str, Tensor] = {n: p.float().flatten() for n, p in teacher.weights.items()}
    numbers = torch.tensor([0.01, 0.1, 0.5], dtype=torch.float64, device=zero.schedule_device(model_engine))
    for step in range(3):
        zero.schedule(model_engine, numbers)
        torch.manual_seed(10 * step + rank)
        images = [torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8) for _ in range(2)]
        batches = iter([(step, micro, Batch([x], [])) for micro, x in enumerate(images)])
        done = jepa.train.step.take_step(config, ranks, model_engine, teacher, batches, step)
        if not done.applied or len(seen) != step + 1:
            wrong.append(f"step {step}: applied {bool(done.applied)}, {len(seen)} refreshes since the start")
        for name, module in teacher.in_fp8.encoder.named_modules():
            if isinstance(module, fp8.Linear):
                average = averages[f"encoder.{name}.weight"].bfloat16().view_as(module.weight)
                x_8, scale = fp8.quantise(average)
                if not (torch.equal(x_8.float(), module.weight_8.float()) and torch.equal(scale, module.scale)):
                    wrong.append(f"step {step}: {name} is not the copy of the average before the step")
        averages = whole_weights(model_engine, "ema")
    with torch.no_grad():
        if torch.equal(teacher(images[0]), teacher.averages["encoder"](images[0])):
            wrong.append("the targets are not in fp8")
    return wrong


def steps_of_all_stages() -> dict[int, list[str]]:
    return {stage: steps(stage) for stage in range(4)}


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_copies_are_of_the_newest_weights_and_made_once_a_step(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(world_size, steps_of_all_stages)):
        assert not any(found.values()), f"rank {rank}: {found}"


@pytest.mark.ranks
def test_a_run_resumes_bit_for_bit_replays_its_steps_and_refuses_other_targets(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", write_images(tmp_path / "images"))
    words = ("--config", config, *FP8, "engine.zero_stage=2", "logging.save_every=2")
    for folder in ("whole", "parts"):
        assert start(2, tmp_path / folder, *words, f"engine.max_steps={4 if folder == 'whole' else 2}").wait() == [0, 0]
    other = start(2, tmp_path / "parts", *words, "engine.max_steps=4", "engine.target_precision=bf16", "--resume")
    assert other.wait() == [1, 1]
    assert re.search(r"engine.target_precision fp8, this run has bf16.*--accept-changes", other.text())
    assert start(2, tmp_path / "parts", *words, "engine.max_steps=4", "--resume").wait() == [0, 0]
    whole, parts = (tmp_path / folder for folder in ("whole", "parts"))
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(parts)]
    ends = [json.loads((folder / "jepa-step00000004/state.json").read_text()) for folder in (whole, parts)]
    assert [f["sha256"] for f in ends[0]["files"]] == [f["sha256"] for f in ends[1]["files"]]
    assert not any("scale" in name or "_8" in name for name in ends[0]["shapes"])

    replayed = start(2, whole, *words, "--replay-step", 3)
    assert replayed.wait() == [0, 0], replayed.text()
    loss = sum(float(value) for value in re.findall(r"rank \d: total (\S+)", replayed.text())) / 2
    assert loss == pytest.approx(rows(whole)[3]["loss"], rel=1e-7)


# --- a trained model


@pytest.fixture(scope="module")
def trained() -> VisionTransformer:
    """A target encoder after 40 steps of I-JEPA on the demo's scenes; bf16."""
    config = small_config(
        "meta.embed_dim=64", "meta.depth=4", "data.crop_size=64", "mask.patch_size=8", "loss.objective=ijepa"
    )
    torch.manual_seed(0)
    model = build(config)
    teacher = copy.deepcopy(model.encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.04)
    losses = []
    for step in range(40):
        images = torch.from_numpy(draw(32 * step, 32).images)
        masks = sample_masks(config.mask_spec, seed=0, step=step, first=0, batch=32)
        where = lay_out(masks, config, CPU)
        features = teacher(images, rows=where.computed)
        loss = model([images], where, features).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for average, weight in zip(teacher.parameters(), model.encoder.parameters(), strict=True):
                average.lerp_(weight, 0.05)
    assert losses[-1] < 0.8 * losses[0]
    return teacher.bfloat16()


@pytest.mark.slow
def test_features_of_a_trained_model_are_those_of_bf16(trained: VisionTransformer) -> None:
    """The targets, layer-normed, on scenes it has not seen. The cosine of a patch's features with those in bf16 is over
    0.999, 0.9999 on average; of what differs between images, without each position's mean, 0.9 on average. The error
    against fp32 is less than twice that of bf16, whose rounding of the residual stream is most of both."""
    in_fp8, exact = fp8.Encoder(trained), copy.deepcopy(trained).float()
    in_fp8.refresh()
    images = torch.from_numpy(draw(0, 64, split=1).images)
    with torch.no_grad():
        wanted, bf16, low = (F.layer_norm(forward(images).float(), (64,)) for forward in (exact, trained, in_fp8))
    cosine = F.cosine_similarity(bf16, low, dim=-1)
    centred = F.cosine_similarity(bf16 - bf16.mean(0), low - low.mean(0), dim=-1)
    assert cosine.min() > 0.999 and 0.9999 < cosine.mean() < 1 - 1e-7 and centred.mean() > 0.9
    assert (low - wanted).norm() < 2 * (bf16 - wanted).norm()


# --- the op, compiled and on a GPU


def operands(device: str = "cpu") -> tuple[Tensor, ...]:
    _, layer = linear(64, 48)
    return tuple(t.to(device) for t in (*fp8.quantise(outliers(3, 7, 64)), layer.weight_8, layer.scale, layer.bias))


def test_the_op_is_registered_correctly() -> None:
    # torch cannot compare fp8 tensors, which test_schema does.
    torch.library.opcheck(torch.ops.jepa_fp8.linear, operands(), test_utils="test_faketensor")


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.10 has no such product with a scale per row on a CPU")
def test_torchs_own_product_says_what_the_emulation_says() -> None:
    """The call that is made on a GPU; all outputs and a part of them."""
    x, x_scale, weight, scale, bias = operands()
    for part in (slice(None), slice(None, 16), slice(16, None)):
        chosen = x, x_scale, weight[part], scale[part], bias[part]
        y, wanted = fp8.multiplied(*chosen).double(), fp8.emulated(*chosen).double()
        assert y.shape == (3, 7, len(weight[part])) and (y - wanted).norm() < 2**-8 * wanted.norm()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_are_equal_and_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of images and rows changes from step to step; only the front end runs, as in test_levers."""
    encoder = teacher_of()
    plain = fp8.Encoder(encoder)
    monkeypatch.setattr(fp8, "compile_blocks", partial(fp8.compile_blocks, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled, warm = fp8.Encoder(encoder, compiled=True), 0
    for i in range(6):
        for p in encoder.parameters():
            p.data.mul_(1.01)
        plain.refresh()
        compiled.refresh()
        images = torch.randint(0, 256, (int(torch.randint(2, 7, ())), 32, 32, 3), dtype=torch.uint8)
        rows = [torch.randint(0, 64, (len(images), int(n))) for n in torch.randint(8, 30, (2,))]
        assert torch.equal(compiled(images, rows), plain(images, rows))
        if i == 1:
            warm = counters["stats"]["unique_graphs"]
    # One graph for each of the weights' shapes, one for whole blocks and one for rows; nothing after the second step.
    assert counters["stats"]["unique_graphs"] == warm <= 4 + 2 and not counters["graph_break"]


@needs_gpu
@pytest.mark.skipif(CUDA and torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU or newer")
def test_a_gpu_multiplies_what_the_emulation_says() -> None:
    arguments = operands("cuda")
    y, wanted = torch.ops.jepa_fp8.linear(*arguments), fp8.emulated(*arguments)
    assert (y - wanted).float().norm() < 0.01 * wanted.float().norm()


# --- what is refused, and what it takes


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), True), ((9, 0), False), ((12, 0), False)])
def test_an_older_gpu_is_refused(capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    fp8.require(CPU)
    if refused:
        with pytest.raises(ConfigError, match=r"target_precision = 'fp8': Some GPU .* 8\.\d; wanted 9\.0 .*give bf16"):
            fp8.require(torch.device("cuda"))
    else:
        fp8.require(torch.device("cuda"))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("engine.precision=fp32", "needs bf16 training: give engine.precision=bf16"),
        ("meta.embed_dim=24", "needs an encoder width divisible by 16, not 24; or give bf16"),
        ("meta.mlp_ratio=1.25", "needs an encoder MLP width divisible by 16, not 40; or give bf16"),
    ],
)
def test_what_it_cannot_do_is_refused(override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        small_config(*FP8, override)


def test_the_copies_memory_is_in_the_budget() -> None:
    in_fp8 = fp8.Encoder(teacher_of())
    wanted = sum(b.numel() * b.element_size() for b in itertools.chain(*([m.weight_8, m.scale] for m in in_fp8.layers)))
    more: list[Any] = [memory_per_rank(small_config(*overrides), 2) for overrides in (FP8, SMALL)]
    assert more[0].teacher - more[1].teacher == wanted
