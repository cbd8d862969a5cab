"""Every optimizer available here matches AdamWEMA in weights, moments and averages, at every ZeRO stage.

Real DeepSpeed engines on two processes, with clipping and one step with a non-finite gradient.
"""

import copy
import itertools
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jepa.config.schema import Config, ConfigError
from jepa.data.masks import sample_masks
from jepa.methods import build
from jepa.train import zero
from jepa.train.optimizer import make_optimizer
from jepa.train.teacher import Teacher
from jepa.train.zero import deepspeed_config
from small import every_row, run_ranks, small_config, whole_weights

pytestmark = pytest.mark.ranks

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
STEPS, BAD_STEP = 5, 3
FOREIGN = [name for name in ("deepspeed", "apex") if find_spec(name) and torch.cuda.is_available()]


def train(optimizer: str, stage: int, seed: int, *more: str) -> tuple[dict[str, torch.Tensor], list[float], list[bool]]:
    """The state after a few steps, by kind and parameter; the gradient norms; which steps were applied."""
    words = (f"engine.optimizer={optimizer}", f"engine.zero_stage={stage}", "loss.objective=ijepa")
    config = small_config(*words, *more)
    torch.manual_seed(seed)
    model = build(config)
    encoder = copy.deepcopy(model.encoder)
    model_engine = zero.start(model, config)
    teacher, norms, moved = Teacher({"encoder": encoder}, model_engine), [], []
    for step in range(STEPS):
        zero.schedule(model_engine, torch.tensor([1e-3 * (step + 1), 0.1, 0.9 - 0.1 * step], dtype=torch.float64))
        torch.manual_seed(seed + 10 * step + dist.get_rank())
        for micro in range(config.batch(dist.get_world_size()).accumulation):
            images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
            masks = sample_masks(
                config.mask_spec, seed=micro, step=step, first=4 * dist.get_rank(), batch=4, cut=(0, 8)
            )
            features = teacher(images) * (float("nan") if step == BAD_STEP else 1)
            output = model_engine([images], every_row(masks.context, masks.target), features)
            model_engine.backward(output.loss)
            outcome = zero.step(model_engine, clip_grad=0.05)
        teacher.follow()
        norms.append(float(outcome.grad_norm))
        moved.append(bool(outcome.applied))
    found = {f"{kind} of {n}": v for kind in KINDS for n, v in whole_weights(model_engine, kind).items()}
    found |= {f"teacher's {n}": p.flatten().clone() for n, p in teacher.averages["encoder"].named_parameters()}
    return found, norms, moved


def differences(names: tuple[str, ...], seed: int) -> list[str]:
    wrong = []
    for stage, name in itertools.product(range(4), names):
        (ours, our_norms, our_moves), (theirs, norms, moves) = (train(n, stage, seed) for n in ("adamw_ema", name))
        case = f"{name}, ZeRO-{stage}"
        if moves != our_moves or moves != [step != BAD_STEP for step in range(STEPS)]:
            wrong.append(f"{case}: moved {moves}, ours {our_moves}")
        pairs = [(a, b) for a, b, moved in zip(norms, our_norms, moves, strict=True) if moved]
        if not all(a == pytest.approx(b, rel=1e-4) for a, b in pairs):
            wrong.append(f"{case}: norms {pairs}")
        if ours.keys() != theirs.keys():
            wrong.append(f"{case}: states differ: {sorted(ours.keys() ^ theirs.keys())[:3]}")
            continue
        for key, value in ours.items():
            # Rounding changes the last bits; a wrong rule (decay, bias, momentum, clipping) is off by percents.
            error = (theirs[key] - value).norm() / value.norm().clamp_min(1e-12)
            if not error <= 2e-4:
                wrong.append(f"{case}: {key} differs by {error:.1e}")
    return wrong


def test_stock_optimizers_do_the_same() -> None:
    seed = int(torch.randint(2**20, ()))
    for wrong in run_ranks(2, differences, ("torch", *FOREIGN), seed):
        assert not wrong, (seed, wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines that lack them")
@pytest.mark.parametrize("name", ["deepspeed", "apex"])
def test_asking_for_what_is_missing_says_how_to_get_it(name: str) -> None:
    config = small_config(f"engine.optimizer={name}")
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "ema": True, "decays": True}]
    with pytest.raises(ConfigError, match=rf"engine\.optimizer = '{name}'.*CUDA"):
        make_optimizer(config, groups, torch.device("cpu"))


def deepspeeds_own(config: Config, *args: int) -> dict[str, Any]:
    settings = deepspeed_config(config, *args)
    return settings | {"zero_optimization": settings["zero_optimization"] | {"contiguous_gradients": True}}


def ours_and_deepspeeds_own(seed: int) -> list[str]:
    """Where the one-pass step, or a single rank's step without buckets, differs in any bit from DeepSpeed's own."""
    wrong, ways = [], (zero.join_passes, zero.send_nothing, zero.deepspeed_config)
    for stage, bf16, accumulation in itertools.product((1, 2), ("true", "false"), (1, 3)):
        words = (f"meta.use_bfloat16={bf16}", f"engine.gradient_accumulation_steps={accumulation}")
        zero.join_passes, zero.send_nothing, zero.deepspeed_config = ways
        ours = train("adamw_ema", stage, seed, *words)[0]
        zero.join_passes = zero.send_nothing = lambda _: None
        zero.deepspeed_config = deepspeeds_own
        theirs = train("adamw_ema", stage, seed, *words)[0]
        wrong += [f"ZeRO-{stage}, {words}: {name}" for name in ours if not torch.equal(ours[name], theirs[name])]
    return wrong


def with_and_without_overlap(seed: int) -> list[str]:
    wrong = []
    for stage, bf16 in itertools.product((1, 2), ("true", "false")):
        runs = [
            train("adamw_ema", stage, seed, f"engine.overlap_comm={overlap}", f"meta.use_bfloat16={bf16}")[0]
            for overlap in ("true", "false")
        ]
        wrong += [
            f"ZeRO-{stage}, bf16 {bf16}: {name}" for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])
        ]
    return wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_reducing_beside_the_backward_changes_no_bit(world_size: int) -> None:
    for wrong in run_ranks(world_size, with_and_without_overlap, int(torch.randint(2**31, ()))):
        assert not wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_leaves_deepspeeds_bits(world_size: int) -> None:
    for wrong in run_ranks(world_size, ours_and_deepspeeds_own, int(torch.randint(2**31, ()))):
        assert not wrong
