"""The budget against the model: its parameters, the operations that torch counts, the tensors that autograd saves."""

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jepa.config.file import load_config, parse_config
from jepa.config.schema import Config
from jepa.data.masks import sample_masks
from jepa.methods import build
from jepa.methods.base import Method
from jepa.methods.ijepa import IJEPA
from jepa.model.cost import Kept
from jepa.model.vit import build_encoder
from jepa.train.budget import flops_per_image, longest_tokens, mean_tokens, parameters
from jepa.train.memory import memory_per_rank
from jepa.train.report import report
from small import every_row

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for path in (ROOT / "engine/configs").glob("*.yaml") if path.stem != "base")


def config(model: str = "vit_tiny", patch: int = 16, crop: int = 224, batch: int = 128, **sections: Any) -> Config:
    return parse_config(
        {
            "meta": {
                "model_name": model,
                "pred_depth": {"vit_large": 12, "vit_huge": 12, "vit_giant": 16}.get(model, 6),
            }
            | sections.pop("meta", {}),
            "data": {"root_path": "images", "batch_size": batch, "crop_size": crop},
            "mask": {"patch_size": patch} | sections.pop("mask", {}),
            "optimization": {"epochs": 100},
            "logging": {"folder": "runs/x"},
            **sections,
        }
    )


def small(**sections: Any) -> Config:
    rng = random.Random(seed := random.randrange(2**32))
    print("seed", seed)
    heads = rng.choice([1, 2])
    meta: dict[str, Any] = {"embed_dim": 4 * heads * rng.randint(2, 9), "depth": rng.randint(1, 3), "num_heads": heads}
    meta |= {"mlp_ratio": rng.choice([1.5, 4.0]), "pred_depth": rng.randint(1, 3), "pred_num_heads": 2}
    meta |= {"pred_emb_dim": 8 * rng.randint(2, 5), "use_bfloat16": False}
    return config(patch=8, crop=64, batch=3, meta=meta, **{"mask": {"min_keep": 4}, **sections})


@pytest.mark.parametrize(
    ("model", "patch", "million"),
    [
        ("vit_tiny", 16, 5.5),
        ("vit_small", 16, 21.6),
        ("vit_base", 16, 85.7),
        ("vit_large", 16, 303),
        ("vit_huge", 14, 630),
        ("vit_giant", 16, 1011),
    ],
)
def test_published_parameter_counts(model: str, patch: int, million: float) -> None:
    assert parameters(config(model, patch)).parts["encoder"] / 1e6 == pytest.approx(
        million, rel=0.01 if million < 10 else 1e-3
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_parameters_of_shipped_configs_are_the_models(path: Path) -> None:
    given = load_config(path)
    with torch.device("meta"):
        model = build(given)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    counted = parameters(given)
    assert counted.parts == parts
    assert counted.averaged == (parts["encoder"] if "encoder" in given.method.averaged else 0)
    assert counted.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("widths", [None, [24], [16, 40, 8, 12]])
def test_parameters_of_any_projector(widths: list[int] | None) -> None:
    given = small(loss={"objective": "cjepa", "projector": widths})
    assert parameters(given).total == sum(p.numel() for p in build(given).parameters())


def step(given: Config) -> tuple[Method, tuple[Any, ...], tuple[int, int, int]]:
    """A model, the inputs of one step, and the patches per context, per target and in the rows that targets need."""
    model, (B, N) = build(given), (given.data.batch_size, given.grid**2)
    kept = random.randint(5, 40), random.randint(2, 12), random.randint(12, 50)
    images = torch.randint(0, 256, (B, given.data.crop_size, given.data.crop_size, 3), dtype=torch.uint8)

    def indices(blocks: int, K: int) -> Tensor:
        return torch.rand(blocks, B, N).argsort(-1)[..., :K].sort(-1).values

    context, target = indices(given.mask.num_enc_masks, kept[0]), indices(given.mask.num_pred_masks, kept[1])
    with torch.no_grad():
        features = build_encoder(given)(images)
    return model, ([images], every_row(context, target), features), kept


@pytest.mark.parametrize("contexts", [1, 3])
@pytest.mark.parametrize("skip", [True, False])
def test_flops_are_those_that_torch_counts(contexts: int, skip: bool) -> None:
    mask = {"min_keep": 4, "num_enc_masks": contexts, "num_pred_masks": random.randint(1, 4)}
    given = small(mask=mask, engine={"skip_unread": skip, "attention": "math"})  # its products are visible
    model, inputs, kept = step(given)
    expected = flops_per_image(given, kept)
    counter = FlopCounterMode(display=False)
    with counter:
        model(*inputs).loss.backward()
    assert counter.get_total_flops() == given.data.batch_size * (expected["context"] + expected["predictor"])

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rows = torch.stack([torch.randperm(given.grid**2)[: kept[2]] for _ in range(given.data.batch_size)])
        model.encoder(inputs[0][0], rows=(rows,) if skip else ())
    assert counter.get_total_flops() == given.data.batch_size * expected["target"]


@pytest.mark.parametrize(
    ("model", "patch", "crop", "batch", "gflop"),
    [
        ("vit_tiny", 16, 224, 128, 26.6),
        ("vit_small", 16, 224, 128, 38),
        ("vit_base", 16, 224, 128, 84),
        ("vit_large", 16, 224, 128, 261),
        ("vit_huge", 14, 224, 128, 655),
        ("vit_huge", 16, 448, 16, 2399),
        ("vit_giant", 16, 224, 16, 835),
    ],
)
def test_flops_under_the_published_masks(model: str, patch: int, crop: int, batch: int, gflop: float) -> None:
    plain = config(model, patch, crop, batch, engine={"skip_unread": False})
    assert sum(flops_per_image(plain).values()) / 1e9 == pytest.approx(gflop, rel=0.015)


def test_mean_target_size_is_that_of_the_published_sampler() -> None:
    """Targets: area (15 to 20 %) and aspect ratio (0.75 to 1.5) grow together; both sides are rounded."""
    areas = []
    for i in range(10_000):
        r = (i + 0.5) / 10_000
        area, aspect = int(256 * (0.15 + 0.05 * r)), 0.75 + 0.75 * r
        areas.append(round(math.sqrt(area * aspect)) * round(math.sqrt(area / aspect)))
    assert mean_tokens(config("vit_huge", 14))[1] == pytest.approx(sum(areas) / len(areas), rel=0.02)


@pytest.mark.parametrize("skip", [True, False])
def test_saved_bytes_are_those_that_autograd_keeps(skip: bool) -> None:
    given = small(engine={"skip_unread": skip})
    model, inputs, kept = step(given)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {tensor.untyped_storage().data_ptr() for tensor in [*inputs[0], *inputs[1][:2], inputs[2], *model.buffers()]}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own and tensor.is_floating_point():
            found[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(*inputs).loss
    held = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    assert loss.requires_grad and issubclass(given.method, IJEPA)
    assert sum(given.method.saved(given, Kept(*kept), 4)) == pytest.approx(held, rel=0.1)


def test_the_longest_context_of_the_run_is_found_and_costs_more() -> None:
    given = config("vit_base")
    lengths = [sample_masks(given.mask_spec, seed=0, step=s, first=0, batch=128).context.shape[-1] for s in range(1024)]
    longest, mean = longest_tokens(given), mean_tokens(given)
    assert longest.context == max(lengths) and mean.context == pytest.approx(sum(lengths) / 1024)
    assert memory_per_rank(given, 1, longest).total > memory_per_rank(given, 1, mean).total


@pytest.mark.ranks
def test_memory_is_what_the_tensors_of_real_ranks_hold() -> None:
    """At every ZeRO stage, on two ranks; the program fails if the formula is off by more than 5 %."""
    command = [sys.executable, str(ROOT / "benchmarks/memory.py"), "--measure", "--quick", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_of_the_stages(precision: str) -> None:
    """Bytes per parameter, by hand: what each of four ranks holds whole, and what is sharded."""
    whole = {
        0: {"weights", "gradients", "master", "moments", "ema"},
        1: {"weights", "gradients"},
        2: {"weights"},
        3: set(),
    }
    size = 2 if precision == "bf16" else 4
    for stage, kept in whole.items():
        given = small(engine={"zero_stage": stage})
        given = parse_config(given.model_dump(), [f"meta.use_bfloat16={str(size == 2).lower()}"])
        memory, count = memory_per_rank(given, 4), parameters(given)
        bytes_each = {"weights": size, "gradients": size, "master": 4, "moments": 8, "ema": 4}
        if stage == 0 and precision == "fp32":
            bytes_each["master"] = 0
        for name, each in bytes_each.items():
            number = count.averaged if name == "ema" else count.total
            assert getattr(memory, name) == each * number / (1 if name in kept else 4)
        assert memory.teacher == size * count.averaged * (2 if stage == 3 else 1)
        assert memory.gathered == (size * count.total if stage == 3 else 0)
        assert memory.total > memory.weights + memory.moments


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_report_reads_back(path: Path, tmp_path: Path) -> None:
    given = load_config(path)
    whole = given.engine.global_batch_size
    text = report(given, 2 if whole is None else min(16, whole // given.data.batch_size))
    (tmp_path / "resolved.yaml").write_text(text[: text.index("DeepSpeed:")])
    assert load_config(tmp_path / "resolved.yaml") == given
