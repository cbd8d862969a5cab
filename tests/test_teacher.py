"""The teacher equals the moving average of the fp32 weights, computed apart in float64, at every ZeRO stage.

Real DeepSpeed engines on one and two processes; a skipped step moves nothing.
"""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist

from jepa import zero
from jepa.masks import sample_masks
from jepa.objective import JepaModel
from jepa.teacher import Teacher
from small import run_ranks, small_config, whole_weights

STAGES = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16")))
MOMENTA = (0.9, 0.5, 0.99, 0.7, 1.0)
BAD_STEP = 2
ROUNDINGS = len(MOMENTA)  # one a step


def follow(stage: int, precision: str) -> list[str]:
    """Trains for a few steps, one of them poisoned; returns what was wrong."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = small_config(
        f"engine.zero_stage={stage}",
        f"meta.use_bfloat16={precision == 'bf16'}",
        "engine.gradient_accumulation_steps=2",
        "optimization.clip_grad=0.5",
    )
    torch.manual_seed(stage)
    model = JepaModel(config)
    started = {name: p.detach().clone() for name, p in model.named_parameters()}
    encoder = copy.deepcopy(model.encoder)
    engine = zero.start(model, config)
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    teacher = Teacher(encoder.to(low), engine)
    wrong = []

    weights = whole_weights(engine)
    for name, value in started.items():
        if not torch.equal(weights[name], value.to(low).float().flatten()):
            wrong.append(f"the map of fp32 weights misplaces {name}")
    average = {n: w.double() for n, w in weights.items() if n.startswith("encoder.")}
    for step, momentum in enumerate(MOMENTA):
        zero.schedule(engine, lr=0.01 * (step + 1), weight_decay=0.1, momentum=momentum)
        torch.manual_seed(100 * step + rank)
        for micro in range(2):
            images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
            masks = sample_masks(
                config.mask_spec, seed=1, step=step, first=(2 * micro + rank) * 4, batch=4, cut=(0, 16)
            )
            features = teacher(images)
            if step == BAD_STEP and micro == 1 and rank == world - 1:
                features = features * float("nan")
            output = engine(images, masks.context, masks.target, features)
            engine.backward(output.losses.total)
            applied, norm = zero.step(engine, config.optimization.clip_grad)
        before, weights = weights, whole_weights(engine)
        moved = any(not torch.equal(weights[n], before[n]) for n in weights)
        if (applied, moved) != (step != BAD_STEP,) * 2:
            wrong.append(f"step {step}: applied {applied}, moved {moved}, gradient norm {norm}")
        if applied:
            teacher.follow()
            for name in average:
                average[name] = momentum * average[name] + (1 - momentum) * weights[name].double()
        emas = whole_weights(engine, "ema")
        for name, parameter in teacher.encoder.named_parameters():
            ema, wanted = emas["encoder." + name], average["encoder." + name]
            error = (ema.double() - wanted).abs().max()
            if not error <= ROUNDINGS * torch.finfo(torch.float32).eps * wanted.abs().max():
                wrong.append(f"step {step}: the average of {name} is off by {error:.1e}")
            if not torch.equal(parameter.flatten(), ema.to(low)):
                wrong.append(f"step {step}: the teacher's {name} is not the rounded average on rank {rank}")
    counts = {float(engine.basic_optimizer.state[flat.weight]["step"]) for flat in zero.flats(engine) if flat.pieces}
    if counts != {len(MOMENTA) - 1.0}:
        wrong.append(f"the optimizer counted {counts} steps of {len(MOMENTA) - 1}")
    return wrong


def follow_all() -> dict[str, list[str]]:
    return {f"ZeRO-{stage} {precision}": follow(stage, precision) for stage, precision in STAGES}


@pytest.mark.parametrize("world_size", [1, 2])
def test_teacher_is_the_average_of_the_weights(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(world_size, follow_all)):
        for case, wrong in found.items():
            assert not wrong, f"{case}, rank {rank} of {world_size}: {wrong}"
