"""The schedules against the same curves built step by step; the cosines by rotation in the complex plane."""

import cmath
import math
import random

import pytest
import torch

from jepa.config.file import parse_config
from jepa.config.schema import Config
from jepa.train.schedules import Schedules, ScheduleTable


def config(**optimization: object) -> Config:
    return parse_config(
        {
            "meta": {"model_name": "vit_tiny"},
            "data": {"root_path": "images", "batch_size": 8, "crop_size": 64},
            "mask": {"patch_size": 8, "min_keep": 4},
            "optimization": optimization,
            "logging": {"folder": "runs/x"},
        }
    )


def close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("repeat", range(20))
def test_against_a_walk(repeat: int) -> None:
    rng = random.Random(seed := random.randrange(2**32))
    print("seed", seed)
    epochs, per_epoch, scale = rng.randint(1, 9), rng.randint(1, 40), rng.choice([1.0, 1.25, 2.0, 0.8])
    warmup = rng.uniform(0, epochs * scale)
    start, peak, final = rng.uniform(0, 1), rng.uniform(1, 2), rng.uniform(0, 1)
    decay, last_decay = rng.uniform(0, 1), rng.uniform(0, 1)
    ema = [rng.uniform(0.9, 0.99), rng.uniform(0.99, 1)]
    schedules = Schedules(
        config(
            epochs=epochs,
            warmup=warmup,
            ipe_scale=scale,
            lr=peak,
            start_lr=start,
            final_lr=final,
            weight_decay=decay,
            final_weight_decay=last_decay,
            ema=ema,
        ),
        per_epoch,
    )
    end, rise = int(epochs * per_epoch * scale), int(warmup * per_epoch)
    lr_angle, decay_angle, lr, momentum = 1 + 0j, 1 + 0j, start, ema[0]
    lr_turn = cmath.exp(1j * math.pi / max(1, end - rise))
    decay_turn = cmath.exp(1j * math.pi / max(1, end))
    for step in range(end):
        # The first step uses the second point of the curves, but the first of the momentum's.
        if step + 1 < rise:
            lr += (peak - start) / rise
        elif step + 1 == rise:
            lr = peak
        else:
            lr_angle *= lr_turn
            lr = final + (peak - final) * (1 + lr_angle.real) / 2
        decay_angle *= decay_turn
        assert close(schedules.lr(step), lr)
        assert close(schedules.weight_decay(step), last_decay + (decay - last_decay) * (1 + decay_angle.real) / 2)
        assert close(schedules.momentum(step), momentum)
        momentum += (ema[1] - ema[0]) / (epochs * per_epoch * scale)
    for step in (end, 3 * end + 7):
        assert close(schedules.lr(step), final) and close(schedules.weight_decay(step), last_decay)
    assert close(schedules.momentum(3 * end + 7), ema[1])


def test_published_landmarks() -> None:
    """ViT-H/14 on ImageNet, 2048 images per step: 625 steps per epoch, 40 of 300 epochs are warm-up."""
    schedules = Schedules(config(epochs=300), 625)
    assert close(schedules.lr(0), 2e-4 + 8e-4 / 25_000)
    assert close(schedules.lr(25_000 - 1), 1e-3)
    assert close(schedules.lr(25_000 - 1 + 162_500 // 2), (1e-3 + 1e-6) / 2)
    assert close(schedules.lr(187_500 - 1), 1e-6)
    assert close(schedules.weight_decay(93_750 - 1), 0.22)
    assert schedules.momentum(0) == 0.996 and close(schedules.momentum(93_750), 0.998)


def test_stopping_early_does_not_change_the_curves() -> None:
    whole = config(epochs=4, warmup=1)
    short = whole.model_copy(update={"engine": whole.engine.model_copy(update={"max_steps": 3})})
    for step in range(40):
        a, b = Schedules(whole, 10), Schedules(short, 10)
        assert (a.lr(step), a.weight_decay(step), a.momentum(step)) == (
            b.lr(step),
            b.weight_decay(step),
            b.momentum(step),
        )


def test_an_epoch_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="steps_per_epoch is 0"):
        Schedules(config(epochs=1, warmup=0), 0)


def test_the_pace_follows_the_steps_that_were_applied() -> None:
    schedules = Schedules(config(epochs=4, warmup=1.5, lr=1e-3, start_lr=1e-4), 10)
    applied, steps = random.randrange(10), 25
    table = ScheduleTable(schedules, applied, steps, torch.device("cpu"))
    for _ in range(steps):
        wanted = [schedules.lr(applied), schedules.weight_decay(applied), schedules.momentum(applied)]
        assert table.next().tolist() == wanted
        moved = random.random() < 0.7
        applied += moved
        table.count(torch.tensor(moved))
