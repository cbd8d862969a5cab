"""The levers of a step (config section `engine`): same loss and gradient, one compilation, no reads by the host."""

import copy
import random
import re
import traceback
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import jepa.train.step
from jepa.config.schema import ConfigError
from jepa.data.loader import Batch
from jepa.data.masks import sample_masks
from jepa.methods import build
from jepa.methods.base import Method
from jepa.model.execution import compile_blocks
from jepa.model.layout import Layout, Place, lay_out
from jepa.model.vit import Block, VisionTransformer
from jepa.ranks import distributed
from jepa.train import zero
from jepa.train.schedules import Schedules, ScheduleTable
from small import every_row, run_ranks, small_config

CPU = torch.device("cpu")
MODES = ("mask.mode=unbiased", "mask.mode=packed")
DEPTHS = ("meta.pred_depth=3", "loss.beta_vicreg=1.0")
Step = tuple[Tensor, Tensor]


def general_model(*overrides: str) -> tuple[Method, VisionTransformer]:
    """A model with perturbed weights, and another model's encoder as its teacher."""
    models = [build(small_config(*DEPTHS, *overrides)) for _ in range(2)]
    for parameter in (p for model in models for p in model.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return models[0], models[1].encoder.requires_grad_(False)


def with_levers(model: Method, *overrides: str) -> Method:
    other = build(small_config(*DEPTHS, *overrides))
    other.load_state_dict(model.state_dict())
    return other.to(next(model.parameters()).dtype)


def step(model: Method, teacher: VisionTransformer, pixels: Tensor, seed: int, *overrides: str) -> Step:
    """The loss and the whole gradient of a training step."""
    config = small_config(*DEPTHS, *overrides)
    masks = sample_masks(config.mask_spec, seed=seed, step=seed % 100, first=0, batch=len(pixels))
    rows = lay_out(masks, config, torch.device("cpu"), all_read=model.reads_all_targets(config))
    with torch.no_grad():
        features = teacher(pixels, rows=rows.computed)
    loss = model([pixels], rows, features).loss
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([g.flatten() for g in gradient])


def images(B: int = 5) -> Tensor:
    return torch.randint(0, 256, (B, 32, 32, 3), dtype=torch.uint8)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


PLAIN = "engine.skip_unread=false"
LEVERS = ["engine.skip_unread=true", "engine.activation_checkpointing=true"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("where", ["loss.vicreg_on=predictions", "loss.vicreg_on=context"])
def test_a_lever_changes_no_result(mode: str, lever: str, where: str) -> None:
    model, teacher = general_model(where)
    pixels, seed = images(), random.randrange(2**32)
    loss, gradient = step(with_levers(model, where, PLAIN), teacher, pixels, seed, mode, where, PLAIN)
    fast_loss, fast_gradient = step(with_levers(model, where, lever), teacher, pixels, seed, mode, where, lever)
    assert relative(fast_loss, loss) < 1e-5 and relative(fast_gradient, gradient) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_levers_in_bfloat16_err_no_more_than_the_plain_path(mode: str) -> None:
    """Over several draws, against float32 on the same rounded weights: at most 1.25 times the plain path's error."""
    fast_error = plain_error = 0.0
    for _ in range(8):
        model, teacher = general_model()
        model.bfloat16()
        teacher.bfloat16()
        pixels, seed = images(), random.randrange(2**32)
        exact = step(
            with_levers(copy.deepcopy(model).float(), PLAIN), copy.deepcopy(teacher).float(), pixels, seed, mode
        )[1]
        _, plain = step(with_levers(model, PLAIN), teacher, pixels, seed, mode, PLAIN)
        _, fast = step(with_levers(model, *LEVERS), teacher, pixels, seed, mode)
        plain_error += relative(plain, exact) ** 2
        fast_error += relative(fast, exact) ** 2
    assert fast_error < 1.25**2 * plain_error


def kept_bytes(model: Method, *inputs: Any) -> int:
    """Bytes that a forward saves for its backward, besides weights and inputs."""
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(*inputs).loss
    views, layout, h = inputs
    own = [*model.parameters(), *views, layout.contexts, layout.target_MBK, h]
    assert loss.requires_grad
    return sum(n for place, n in saved.items() if place not in {x.untyped_storage().data_ptr() for x in own})


def test_checkpointing_keeps_the_inputs_of_blocks() -> None:
    depths = ("meta.depth=8", "meta.pred_depth=8")
    config = small_config(*depths)
    masks = sample_masks(config.mask_spec, seed=1, step=random.randrange(99), first=0, batch=5)
    inputs = [images()], every_row(masks.context, masks.target), torch.randn(5, 64, 24)
    plain, thrifty = (build(small_config(*depths, *more)) for more in ((), LEVERS[1:]))
    # A block of width D saves about 16 D values per token, D of which are its input; patches and losses remain.
    assert kept_bytes(thrifty, *inputs) < 0.25 * kept_bytes(plain, *inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", MODES)
def test_compiled_blocks_are_equal_and_compile_once(mode: str) -> None:
    """The number of images and the lengths of contexts, targets and rows change from step to step."""
    model, teacher = general_model()
    compiled, compiled_teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    # Only the front end decides what is traced and how often; generating code would take a minute.
    compile_blocks(compiled, compiled_teacher, backend="aot_eager")
    warm, lengths = 0, set()
    for i in range(8):
        pixels, seed = images(random.randint(2, 6)), random.randrange(2**32)
        got = step(compiled, compiled_teacher, pixels, seed, mode)
        wanted = step(model, teacher, pixels, seed, mode)
        assert relative(got[0], wanted[0]) < 1e-5 and relative(got[1], wanted[1]) < 1e-5
        warm = warm or counters["stats"]["unique_graphs"]
        lengths.add((len(pixels), seed % 100))
        assert counters["stats"]["unique_graphs"] == warm, f"recompiled at step {i}"
    assert 0 < warm <= 6 and not counters["graph_break"] and len(lengths) > 3


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_sizes_that_are_equal_by_chance_compile_once() -> None:
    block = Block(8, 2, 2.0)
    compile_blocks(block, backend="aot_eager")
    for images, patches, wanted in ((6, 6, 6), (6, 9, 6), (5, 6, 4)):
        x, rows = torch.randn(images, patches, 8, requires_grad=True), torch.randn(images, wanted, 8)
        block(x, rows).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_generated_code_of_a_block_is_equal() -> None:
    block = Block(8, 2, 2.0)
    compiled = copy.deepcopy(block)
    compile_blocks(compiled)
    for _ in range(3):
        x = torch.randn(random.randint(2, 5), random.randint(6, 20), 8, requires_grad=True)
        dy = torch.randn_like(x)
        for got, wanted in zip(
            *([y, *torch.autograd.grad(y, [x, *b.parameters()], dy)] for b in (compiled, block) for y in [b(x)]),
            strict=True,
        ):
            assert relative(got, wanted) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


def test_compilation_is_refused_where_weights_come_and_go() -> None:
    with pytest.raises(ConfigError, match=r"engine\.compile.*zero_stage 3"):
        small_config("engine.compile=true", "engine.zero_stage=3")
    assert not small_config("engine.zero_stage=3").compiles("cuda")


def fake(x: object, mode: FakeTensorMode) -> object:
    if isinstance(x, Tensor):
        return mode.from_tensor(x)
    if not isinstance(x, tuple):
        return x
    parts = [fake(y, mode) for y in x]
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["predictions", "context"])
def test_nothing_in_a_step_asks_for_a_value(mode: str, where: str) -> None:
    """Forward and backward on tensors with shapes but no values: anything that would wait for a GPU raises."""
    overrides = (mode, f"loss.vicreg_on={where}")
    config = small_config(*DEPTHS, *overrides)
    masks = sample_masks(config.mask_spec, seed=1, step=random.randrange(99), first=0, batch=5)
    rows, (model, teacher) = lay_out(masks, config, torch.device("cpu")), general_model(*overrides)
    fakes = FakeTensorMode()
    for module in (*model.modules(), *teacher.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(fakes.from_tensor(p.detach()), p.requires_grad))
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, fakes.from_tensor(b))
    pixels, contexts = fakes.from_tensor(images()), [fake(context, fakes) for context in rows.contexts]
    groups, target, places = (fake(x, fakes) for x in (rows.computed, rows.target_MBK, rows.places_MBK))
    with fakes:
        with torch.no_grad():
            features = teacher(pixels, rows=groups)
        model([pixels], Layout(contexts, target, groups, places, rows.kept), features).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


class Reads(TorchDispatchMode):
    """Records every read of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append("".join(traceback.format_stack(limit=6)))
        return op(*args, **(kwargs or {}))


def whole_steps(stage: int, bf16: bool, clip: str) -> list[str]:
    """Where the host reads a value in a real training step, from the masks to the teacher, except for loading data."""
    config = small_config(f"engine.zero_stage={stage}", f"meta.use_bfloat16={bf16}", f"optimization.clip_grad={clip}")
    ranks = distributed.Ranks(dist.get_rank(), dist.get_world_size(), CPU, dist.HashStore(), dist.group.WORLD)
    model_engine, teacher = jepa.train.step.start_model(config, CPU)
    table = ScheduleTable(Schedules(config, 10), 0, 9, zero.schedule_device(model_engine))
    made = {s: model_engine.module.layout(config, Place(s, 0, ranks.rank, ranks.world_size), CPU) for s in range(3)}
    model_engine.module.layout = lambda config, place, *_: made[place.step]
    with Reads() as reads:
        for step in range(3):
            zero.schedule(model_engine, table.next())
            batches = iter([(step, 0, Batch([images(4)], []))])
            table.count(jepa.train.step.take_step(config, ranks, model_engine, teacher, batches, step).applied)
    # These do not read values on a GPU.
    return [where for where in reads.found if not re.search("in (check_index|_check_options)", where)]


@pytest.mark.ranks
@pytest.mark.parametrize("clip", ["null", "0.5"])
@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, False), (1, True), (2, True)])
def test_no_step_waits_for_the_device(stage: int, bf16: bool, clip: str) -> None:
    """Two ranks. The masks are made and read on the CPU."""
    for found in run_ranks(2, whole_steps, stage, bf16, clip):
        assert not found, found[0]


class Casts(TorchDispatchMode):
    """Records every dtype conversion of a tensor with at least `limit` elements."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype and out.numel() >= self.limit:
            self.found.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("mode", MODES)
def test_the_residual_stream_stays_in_bfloat16(mode: str) -> None:
    model, teacher = general_model()
    for parameter in model.parameters():  # like DeepSpeed, which leaves buffers as they are
        parameter.data = parameter.data.bfloat16()
    inputs = model, teacher.bfloat16(), images(16), random.randrange(2**32), mode
    with Casts(limit=16 * 10 * 16) as casts:  # smaller than any token stream, larger than any table
        step(*inputs)
    assert not casts.found
