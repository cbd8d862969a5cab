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
from jepa.probes import features, job, knn, linear, online
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
    indices, S = given.get("indices"), given["crop_size"]
    for index in range(len(source)) if indices is None else indices:
        yield torch.randint(0, 256, (1, S, S, 3), dtype=torch.uint8).to(given["device"]), [int(index)]


def test_probe_and_evaluate(tmp_path: Path, ranks: distributed.Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, index in itertools.product(("train", "val"), range(12)):
        place = tmp_path / split / "ab"[index % 2] / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (index, 0, 0)).save(place)
    here = [f"data.root_path={tmp_path}/train", f"eval.train_path={tmp_path}/train", f"eval.val_path={tmp_path}/val"]
    config = load("cifar10_vits4_cjepa.yaml", *TINY, *here, "eval.every=1", f"logging.folder={tmp_path}/run")
    monkeypatch.setattr(online, "dali", lambda: None)
    for module in (online, features):
        monkeypatch.setattr(module, "eval_batches", noise)
    # What a kernel would have written is not there, so numbers are drawn where they are needed to go on.
    for module, probe in ((online, "knn"), (online, "linear_probe"), (linear, "linear_probe")):
        monkeypatch.setattr(module, probe, lambda *sets, **given: 0.5)
    search, write = knn.nearest, features.Store.write
    monkeypatch.setattr(knn, "nearest", lambda *given: [torch.zeros_like(found) for found in search(*given)])
    monkeypatch.setattr(
        features.Store, "write", lambda self, numbers, rows: write(self, numbers, [torch.randn(x.shape) for x in rows])
    )
    during = online.OnlineProbe(config, 0, 1, ranks.device)
    assert 0 <= during(build_encoder(config).to(ranks.device, config.dtype))["knn"] <= 1

    run(*TRAIN, *TINY, "data.synthetic=64", "engine.max_steps=2", f"logging.folder={tmp_path}/run")
    words = ["--train", f"{tmp_path}/train", "--val", f"{tmp_path}/val", "--out", f"{tmp_path}/out"]
    for protocol in (knn, linear):
        parser = argparse.ArgumentParser()
        job.arguments(parser)
        protocol.arguments(parser)
        args = parser.parse_args([f"{tmp_path}/run/jepa-latest", *words])
        rows = protocol.run(job.open_job(args, ranks), args).rows
        assert [row["features"] for row in rows] == ["target encoder", "untrained encoder", "pixels"]
        assert all(0 <= float(row["class"]) <= 100 for row in rows)
