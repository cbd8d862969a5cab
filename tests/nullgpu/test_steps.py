"""Real steps of every shipped config and of every option, on the null GPU: no exception, no graph break, no graph
compiled again, and no wait for the GPU but those in the table of waits (benchmarks/README.md).

Models are cut to two blocks each, except one; batch, resolution and widths are the config's own.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import CONFIGS, SETTLED, Step, failures, load, take

from jepa.data.masks import sample_masks
from jepa.model.cost import Kept
from jepa.model.layout import target_rows
from jepa.ranks import distributed
from jepa.train.memory import memory_per_rank

CUT = ("meta.depth=2", "meta.pred_depth=2")
STEPS = range(5)
NONE: Counter[str] = Counter()
# DeepSpeed's own waits, per step, by (ZeRO stage, precision); at stages 1 and 2 there are none.
DEEPSPEED = {
    (0, "bf16"): Counter(stream_sync=83, pageable=5),  # grows with the number of parameters
    (0, "fp32"): NONE,
    (1, "bf16"): NONE,
    (1, "fp32"): NONE,
    (2, "bf16"): NONE,
    (2, "fp32"): NONE,
    (3, "bf16"): Counter(stream_sync=11, pageable=4),  # two of them for a second micro-batch
    (3, "fp32"): Counter(stream_sync=9, pageable=4),
}
ALSO_ON_ANY_GPU = ("in1k_vitl16_ep600_cjepa.yaml", "in22k_vitg16_ep44_ijepa.yaml", "demo.yaml")
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.stem != "base")
B16, H14 = "in1k_vitb16_ep600_cjepa.yaml", "in1k_vith14_ep300_ijepa.yaml"
# Each option at least once, spread over objectives, masks and stages.
OPTIONS = [
    "mask.mode=unbiased engine.zero_stage=0",
    "mask.mode=packed engine.zero_stage=1 loss.objective=ijepa",
    "mask.mode=packed engine.zero_stage=2 mask.token_budget=0.5 engine.gradient_accumulation_steps=2",
    "mask.mode=packed engine.zero_stage=3 loss.vicreg_on=context",
    "mask.num_enc_masks=2 engine.zero_stage=2 loss.regularizer=cosine",
    "engine.zero_stage=0 meta.use_bfloat16=false optimization.clip_grad=1.0",
    "engine.zero_stage=1 meta.use_bfloat16=false engine.gradient_accumulation_steps=2",
    "engine.zero_stage=3 meta.use_bfloat16=false mask.mode=unbiased",
    "engine.zero_stage=2 optimization.clip_grad=1.0 engine.activation_checkpointing=true",
    "engine.zero_stage=1 engine.activation_checkpointing=true mask.mode=packed",
    "engine.zero_stage=1 loss.vicreg_on=context optimization.clip_grad=1.0",
    "engine.zero_stage=3 engine.gradient_accumulation_steps=2",
    "engine.zero_stage=1 engine.skip_unread=false",
    "engine.zero_stage=1 engine.attention=math",
    "engine.zero_stage=2 engine.compile=false",
    "engine.zero_stage=1 engine.deterministic=true",
    "engine.zero_stage=1 engine.optimizer=torch",
    "engine.zero_stage=1 engine.target_precision=fp8",
]
ON_ANY_GPU = [0, 1, 3, 5, 8]  # of OPTIONS: also run at other compute capabilities and versions of torch


def allowed(*overrides: str, config: str = B16) -> Counter[str]:
    given = load(config, *overrides)
    waits = Counter(DEEPSPEED[given.engine.zero_stage, given.precision])
    if given.engine.optimizer == "torch":
        waits["stream_sync"] += 1
    return waits


def settings(index: int) -> list[str]:
    return [*CUT, "data.batch_size=32", *OPTIONS[index].split()]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.any_gpu if name in ALSO_ON_ANY_GPU else ()) for name in SHIPPED]
)
def test_shipped_configs(name: str, ranks: distributed.Ranks) -> None:
    assert failures(take(load(name, *CUT), ranks, STEPS), allowed(config=name)) == []


def run_option(index: int, ranks: distributed.Ranks) -> None:
    words = settings(index)
    if "engine.deterministic=true" in words:
        torch.use_deterministic_algorithms(True)
        determinism: Any = torch.utils.deterministic
        determinism.fill_uninitialized_memory = False
    assert failures(take(load(B16, *words), ranks, STEPS), allowed(*words)) == []


@pytest.mark.parametrize("index", ON_ANY_GPU, ids=[OPTIONS[i] for i in ON_ANY_GPU])
@pytest.mark.any_gpu
def test_options_on_any_gpu(index: int, ranks: distributed.Ranks) -> None:
    run_option(index, ranks)


REST = [i for i in range(len(OPTIONS)) if i not in ON_ANY_GPU]


@pytest.mark.parametrize("index", REST, ids=[OPTIONS[i] for i in REST])
def test_options(index: int, ranks: distributed.Ranks) -> None:
    run_option(index, ranks)


def steps_of_all_lengths(config_name: str, *overrides: str) -> list[int]:
    """The first step of an epoch with each (context, target) length that the epoch brings, in order."""
    config = load(config_name, *overrides)
    seen: dict[tuple[int, int], int] = {}
    for step in range(1_281_167 // 2048):
        masks = sample_masks(config.mask_spec, seed=0, step=step, first=0, batch=config.data.batch_size)
        seen.setdefault((masks.context.numel() // config.data.batch_size, masks.target.shape[-1]), step)
    return sorted(seen.values())


@pytest.mark.any_gpu
@pytest.mark.parametrize("run", [B16, H14, f"{B16} mask.mode=packed", f"{B16} mask.mode=unbiased"])
def test_a_whole_epoch_s_lengths_need_no_other_graph(run: str, ranks: distributed.Ranks) -> None:
    name, *words = run.split()
    steps = steps_of_all_lengths(name, *words)[:200]
    taken = take(load(name, *CUT, *words), ranks, steps)
    assert len({step.kept[0] % 8 for step in taken}) == 8
    assert failures(taken, NONE) == []


def test_the_whole_vit_h_14(ranks: distributed.Ranks) -> None:
    config = load(H14)
    taken = take(config, ranks, range(4))
    assert failures(taken, NONE) == []
    for step in taken[SETTLED:]:
        masks = sample_masks(config.mask_spec, seed=0, step=step.step, first=0, batch=config.data.batch_size)
        kept = Kept(*step.kept, target_rows(masks.target, config.grid**2)[2])
        assert memory_per_rank(config, 1, kept).total == pytest.approx(step.allocated, rel=0.05)


TWO_RANKS = {
    "engine.zero_stage=0 meta.use_bfloat16=false": NONE,
    "engine.zero_stage=1 engine.gradient_accumulation_steps=2": NONE,
    "engine.zero_stage=1 mask.cut=global loss.objective=ijepa": NONE,
    "engine.zero_stage=2 mask.mode=packed optimization.clip_grad=1.0": NONE,
    "engine.zero_stage=1 engine.overlap_comm=true": Counter(device_sync=1),
    "engine.zero_stage=3": Counter(stream_sync=7, device_sync=1, pageable=4),
}


@pytest.mark.parametrize("words", TWO_RANKS)
def test_two_ranks(words: str, tmp_path: Path) -> None:
    for taken, breaks in run_ranks(2, B16, *CUT, "data.batch_size=32", *words.split(), out=tmp_path):
        assert [*breaks, *failures(taken, TWO_RANKS[words])] == []


def run_ranks(number: int, name: str, *overrides: str, out: Path) -> list[tuple[list[Step], list[str]]]:
    """What `take` returns on each of `number` ranks of a machine with as many GPUs, and their graph breaks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    program = [str(Path(__file__).with_name("steps.py")), name, *overrides, "--steps", "0-4", "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        [*launch, *program], env=environment | {"NULLGPU_N": str(number)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    reports = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(number)]
    return [
        (
            [Step(**step | {"kept": tuple(step["kept"])}) for step in report["steps"]],
            [line for line in report["failures"] if line.startswith("graph break")],
        )
        for report in reports
    ]
