"""The teacher equals the moving average of the fp32 weights, computed independently in float64, at every ZeRO stage.

Real DeepSpeed engines: the whole model on two processes, and models of any shape, drawn by hypothesis, on one to four.
A skipped step changes nothing.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jepa.data.masks import sample_masks
from jepa.methods import build
from jepa.state.partitions import flats
from jepa.train import zero
from jepa.train.teacher import Teacher
from small import every_row, run_ranks, small_config, whole_weights

pytestmark = pytest.mark.ranks

STAGES = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16")))
MOMENTA = (0.9, 0.5, 0.99, 0.7, 1.0)
BAD_STEP = 2


def deviations(
    model_engine: object, teacher: Teacher, average: dict[str, Tensor], roundings: int, where: str
) -> list[str]:
    """Where the fp32 average differs from the float64 one by more than a rounding per step, or the teacher is not the
    rounded average."""
    wrong, emas, rank = [], whole_weights(model_engine, "ema"), dist.get_rank()
    for name, parameter in teacher.averages["encoder"].named_parameters():
        ema, wanted = emas["encoder." + name], average["encoder." + name]
        error = (ema.double() - wanted).abs().max()
        if not error <= roundings * torch.finfo(torch.float32).eps * wanted.abs().max():
            wrong.append(f"{where}the average of {name} is off by {error:.1e}")
        if not torch.equal(parameter.flatten(), ema.to(parameter.dtype)):
            wrong.append(f"{where}the teacher's {name} is not the rounded average on rank {rank}")
    return wrong


def follow(stage: int, precision: str) -> list[str]:
    """Trains for a few steps, one of them with NaN features; returns what was wrong."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = small_config(
        f"engine.zero_stage={stage}",
        f"meta.use_bfloat16={precision == 'bf16'}",
        "engine.gradient_accumulation_steps=2",
        "optimization.clip_grad=0.5",
    )
    torch.manual_seed(stage)
    model = build(config)
    started = {name: p.detach().clone() for name, p in model.named_parameters()}
    encoder = copy.deepcopy(model.encoder)
    model_engine = zero.start(model, config)
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    teacher = Teacher({"encoder": encoder.to(low)}, model_engine)
    wrong = []

    weights = whole_weights(model_engine)
    for name, value in started.items():
        if not torch.equal(weights[name], value.to(low).float().flatten()):
            wrong.append(f"the map of fp32 weights misplaces {name}")
    average = {n: w.double() for n, w in weights.items() if n.startswith("encoder.")}
    for step, momentum in enumerate(MOMENTA):
        zero.schedule(model_engine, torch.tensor([0.01 * (step + 1), 0.1, momentum], dtype=torch.float64))
        torch.manual_seed(100 * step + rank)
        for micro in range(2):
            images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
            masks = sample_masks(
                config.mask_spec, seed=1, step=step, first=(2 * micro + rank) * 4, batch=4, cut=(0, 16)
            )
            features = teacher(images)
            if step == BAD_STEP and micro == 1 and rank == world - 1:
                features = features * float("nan")
            output = model_engine([images], every_row(masks.context, masks.target), features)
            model_engine.backward(output.loss)
            outcome = zero.step(model_engine, config.optimization.clip_grad)
        applied, norm = bool(outcome.applied), outcome.grad_norm
        before, weights = weights, whole_weights(model_engine)
        moved = any(not torch.equal(weights[n], before[n]) for n in weights)
        if (applied, moved) != (step != BAD_STEP,) * 2:
            wrong.append(f"step {step}: applied {applied}, moved {moved}, gradient norm {norm}")
        teacher.follow()
        if applied:
            for name in average:
                average[name] = momentum * average[name] + (1 - momentum) * weights[name].double()
        wrong += deviations(model_engine, teacher, average, roundings=len(MOMENTA), where=f"step {step}: ")
    counts = {
        float(model_engine.basic_optimizer.state[flat.weight]["step"]) for flat in flats(model_engine) if flat.fragments
    }
    if counts != {len(MOMENTA) - 1.0}:
        wrong.append(f"the optimizer counted {counts} steps of {len(MOMENTA) - 1}")
    return wrong


def follow_all() -> dict[str, list[str]]:
    return {f"ZeRO-{stage} {precision}": follow(stage, precision) for stage, precision in STAGES}


def test_the_models_teacher_is_the_average_of_its_weights() -> None:
    for rank, found in enumerate(run_ranks(2, follow_all)):
        for case, wrong in found.items():
            assert not wrong, f"{case}, rank {rank}: {wrong}"


class Parameters(nn.ModuleList):
    """Parameters of any shapes, each in its own module, as ZeRO-3 requires."""

    class One(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            slope = torch.cos(x * torch.arange(1, self.weight.numel() + 1)).view(self.weight.shape)
            return (self.weight.float() * slope).sum()

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__([self.One(shape) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([one(x) for one in self]).sum()


class Model(nn.Module):
    """Parameters with an average and without; the gradient depends on x alone."""

    averaged, constant_lr = ("encoder",), ()

    def __init__(self, encoder: list[tuple[int, ...]], rest: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.encoder, self.rest = Parameters(encoder), Parameters(rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) + self.rest(x)


# From a single element, fewer than there are ranks, to tensors that do not divide evenly among them.
SHAPES = st.lists(st.lists(st.integers(1, 13), min_size=1, max_size=3).map(tuple), min_size=1, max_size=7)
CASES = st.fixed_dictionaries(
    {
        "encoder": SHAPES,
        "rest": SHAPES,
        "bf16": st.booleans(),
        "accumulation": st.integers(1, 3),
        "clip": st.sampled_from([None, 0.01, 100.0]),
        "momenta": st.lists(st.sampled_from([0.0, 0.3, 0.9, 0.996, 0.99999, 1.0]), min_size=3, max_size=3),
        "bad_step": st.integers(0, 3),
        "persistent": st.booleans(),
    }
)


def follow_any(stage: int, case: dict[str, Any]) -> list[str]:
    """Like `follow`, for a model with the case's shapes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = small_config(
        f"engine.zero_stage={stage}",
        f"meta.use_bfloat16={case['bf16']}",
        f"engine.gradient_accumulation_steps={case['accumulation']}",
        f"optimization.clip_grad={case['clip'] or 'null'}",
    )
    torch.manual_seed(len(case["encoder"]))
    model = Model(case["encoder"], case["rest"])
    encoder = copy.deepcopy(model.encoder).to(torch.bfloat16 if case["bf16"] else torch.float32)
    original = zero.deepspeed_config
    if stage == 3 and not case["persistent"]:  # else ZeRO-3 does not shard parameters this small
        zero.deepspeed_config = lambda *args: (
            original(*args) | {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        )
    try:
        model_engine = zero.start(model, config)
    finally:
        zero.deepspeed_config = original
    teacher, wrong = Teacher({"encoder": encoder}, model_engine), []
    weights = whole_weights(model_engine)
    average = {n: w.double() for n, w in weights.items() if n.startswith("encoder.")}
    for step, momentum in enumerate(case["momenta"]):
        zero.schedule(model_engine, torch.tensor([0.1 * (step + 1), 0.1, momentum], dtype=torch.float64))
        assert teacher.averages  # a step begins with the teacher's features
        for micro in range(case["accumulation"]):
            x = torch.tensor(1.0 + step + 0.1 * micro + 0.01 * rank)
            if step == case["bad_step"] and micro == rank % case["accumulation"] and rank == world - 1:
                x = x * float("inf")
            model_engine.backward(model_engine(x))
            outcome = zero.step(model_engine, config.optimization.clip_grad)
        applied = bool(outcome.applied)
        before, weights = weights, whole_weights(model_engine)
        moved = any(not torch.equal(weights[n], before[n]) for n in weights)
        if (applied, moved) != (step != case["bad_step"],) * 2:
            wrong.append(f"step {step}: applied {applied}, moved {moved}")
        teacher.follow()
        if applied:
            for name in average:
                average[name] = momentum * average[name] + (1 - momentum) * weights[name].double()
            wrong += deviations(model_engine, teacher, average, roundings=len(case["momenta"]), where=f"step {step}: ")
    return wrong


def follow_many(examples: int, drawn_from: int) -> list[str]:
    """Runs the same cases on every rank; returns what any of them found."""
    found: list[str] = []

    @seed(drawn_from)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(CASES)
    def check(case: dict[str, Any]) -> None:
        for stage in range(4):
            everyones: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyones, follow_any(stage, case))
            found.extend(f"ZeRO-{stage} {case}: {wrong}" for wrong in itertools.chain(*everyones))

    check()
    return found


@pytest.mark.parametrize(("world_size", "examples"), [(1, 3), (2, 2), (3, 2), (4, 2)])
def test_any_teacher_is_the_average_of_any_weights(world_size: int, examples: int) -> None:
    for found in run_ranks(world_size, follow_many, examples, int(torch.randint(2**31, ()))):
        assert not found, found
