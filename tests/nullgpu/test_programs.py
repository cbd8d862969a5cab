"""The programs as users start them, on the null GPU: train, resume, replay, export, probe, evaluate.

The health metrics need cuSOLVER and visualize.py runs on a CPU: neither is here.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from steps import load

from jepa.data.sources import ImageSource
from jepa.model.vit import build_encoder
from jepa.probes import features, heads, job, knn, linear, online
from jepa.ranks import distributed

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "meta.model_name=vit_tiny", "meta.depth=2", "meta.pred_depth=2", "data.batch_size=16", "data.crop_size=64",
    "mask.patch_size=8", "optimization.epochs=4", "optimization.warmup=1", "logging.log_freq=2",
    "logging.health_freq=1000000", "engine.device=cuda",
    "engine.max_skipped=1000",  # what the null GPU's kernels leave is not always finite
]  # fmt: skip
TRAIN = ["engine/train.py", "--config", "engine/configs/cifar10_vits4_cjepa.yaml"]


def run(*command: str, code: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_train_resume_replay_export_without_dali(tmp_path: Path) -> None:
    here = [*TRAIN, *TINY, "data.synthetic=64", f"logging.folder={tmp_path}"]
    run(*here, "engine.max_steps=5")
    assert "steps 5 to 16" in run(*here, "--resume")
    run(*here, "--replay-step", "15")
    steps = [json.loads(line)["step"] for line in (tmp_path / "jepa.jsonl").read_text().splitlines()]
    assert max(steps) == 15
    run(
        "engine/export.py",
        str(tmp_path / "jepa-latest"),
        "--to",
        "safetensors",
        "--out",
        str(tmp_path / "x.safetensors"),
    )
    assert (tmp_path / "x.safetensors").stat().st_size > 100_000


def noise(source: ImageSource, **given: Any) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """In place of decoded images: DALI does not load beside the null GPU."""
    S = given["crop_size"]
    for index in given["indices"]:
        yield torch.randint(0, 256, (1, S, S, 3), dtype=torch.uint8).to(given["device"]), [int(index)]


NEAREST, LINEAR, WRITE = knn.nearest, linear.linear_probe, features.Store.write  # they need numbers to end


def store(where: Any, numbers: list[int], rows: list[torch.Tensor]) -> None:
    WRITE(where, numbers, [torch.randn(x.shape) for x in rows])


def neighbours(train: Any, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    cosine, index = NEAREST(train, *given)
    return torch.rand(cosine.shape), torch.randint(len(train), index.shape)


def half(*given: Any) -> float:
    LINEAR(*given)
    return 0.5


def test_probe_and_evaluate(tmp_path: Path, ranks: distributed.Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, index in itertools.product(("train", "val"), range(12)):
        place = tmp_path / split / "ab"[index % 2] / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (index, 0, 0)).save(place)
    here = [f"data.root_path={tmp_path}/train", f"eval.train_path={tmp_path}/train", f"eval.val_path={tmp_path}/val"]
    config = load("cifar10_vits4_cjepa.yaml", *TINY, *here, "eval.every=1", f"logging.folder={tmp_path}/run")
    monkeypatch.setattr(online, "dali", lambda: None)
    for module in (online, features, heads):
        monkeypatch.setattr(module, "eval_batches", noise)
    monkeypatch.setattr(features.Store, "write", store)
    for module in (knn, linear):
        monkeypatch.setattr(module, "check", lambda *sets: None)
    monkeypatch.setattr(knn, "nearest", neighbours)
    monkeypatch.setattr(linear, "linear_probe", half)
    monkeypatch.setattr(linear, "STEPS", 3)
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: (torch.ones(len(x)).to(x), torch.eye(len(x)).to(x)))  # cuSOLVER
    monkeypatch.setattr(online, "linear_probe", lambda *sets: float(all(x.is_cuda for x in sets)))  # labels are numbers
    during = online.OnlineProbe(config, ranks)
    found = during(build_encoder(config).to(ranks.device, config.dtype))
    assert 0 <= found["knn"] <= 1 and found["linear"] == 1

    run(*TRAIN, *TINY, "data.synthetic=64", "engine.max_steps=2", f"logging.folder={tmp_path}/run")
    for protocol, *words in ((knn, "--k", "3"), (linear,)):
        parser = argparse.ArgumentParser()
        job.arguments(parser)
        protocol.arguments(parser)
        given = [f"{tmp_path}/run/jepa-latest", "--train", f"{tmp_path}/train", "--val", f"{tmp_path}/val", *words]
        args = parser.parse_args([*given, "--out", f"{tmp_path}/out", "--precision", "bf16"])
        rows = protocol.run(job.open_job(args, ranks), args).rows
        assert [row["features"] for row in rows] == ["target encoder", "untrained encoder", "pixels"]
        assert all(0 <= float(str(row["class"])) <= 100 for row in rows)


def test_the_papers_heads_learn_on_the_device(ranks: distributed.Ranks) -> None:
    for norm in (False, True):
        group = heads.Group(1, norm, 24, 5, [(0.1, 0.0), (0.2, 0.1)]).to(ranks.device)
        x, y = torch.randn(8, 24).to(ranks.device), torch.randint(5, (8,)).to(ranks.device)
        group.learn(x, y, 1.0)
        assert group.logits(group.normalised(x)).shape == (8, 2, 5)
        assert all(value.is_cuda for value in group.state().values())
