"""engine/train.py as people start it: real processes, real JPEGs, real checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from small import MAPPING

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "engine/train.py")
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty JPEGs of noise in two classes, and one file that is no image."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng()
    for i in range(40):
        path = folder / f"class{i % 2}" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60, 50), Image.Resampling.BICUBIC).save(path)
    (folder / "class0" / "broken.jpg").write_bytes(rng.bytes(500))
    return folder


@pytest.fixture
def config(images: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MAPPING | {"data": MAPPING["data"] | {"root_path": str(images)}}))
    return path


def run(*words: object, launcher: tuple[object, ...] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "kernels"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET"):
        environment.pop(name, None)
    return subprocess.run(
        [str(w) for w in (*launcher, TRAIN, *words)], env=environment, text=True, capture_output=True, timeout=300
    )


def train(config: Path, folder: Path, *words: object, launcher: tuple[object, ...] = (sys.executable,)) -> list[dict]:
    """Runs it and returns the log, without the times."""
    done = run("--config", config, f"logging.folder={folder}", *words, launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "jepa.jsonl").read_text().splitlines()]
    clocks = ("images_per_second", "step_ms", "data_wait_ms")
    return [{key: value for key, value in row.items() if key not in clocks} for row in rows]


def test_an_interrupted_run_goes_on_bit_for_bit(config: Path, tmp_path: Path) -> None:
    same = ("engine.gradient_accumulation_steps=2", "logging.save_every=2")
    whole = train(config, tmp_path / "whole", *same, "engine.max_steps=7")
    assert [row["step"] for row in whole] == list(range(7))
    train(config, tmp_path / "parts", *same, "engine.max_steps=3")
    # Other intervals of saving, health and logging must not change a bit.
    parts = train(
        config,
        tmp_path / "parts",
        *same,
        "engine.max_steps=7",
        "--resume",
        "logging.save_every=3",
        "logging.health_freq=2",
    )
    health = ("target_", "pred_", "teacher_")
    assert [{k: v for k, v in row.items() if not k.startswith(health)} for row in parts] == whole
    assert any("target_rank" in row for row in parts)
    columns, *rows = (tmp_path / "parts/jepa_r0.csv").read_text().splitlines()
    assert columns == "epoch,itr,loss,mask-A,mask-B,time (ms)"
    assert [f"{float(row.split(',')[2]):.5f}" for row in rows] == [f"{row['loss']:.5f}" for row in whole]


def test_launchers_agree(config: Path, tmp_path: Path) -> None:
    words = ("engine.max_steps=3", "engine.device=cpu", "mask.mode=packed")
    deepspeed = train(
        config,
        tmp_path / "a",
        *words,
        launcher=(BIN / "deepspeed", "--num_accelerators", "2", "--master_port", "29555"),
    )
    torchrun = train(
        config, tmp_path / "b", *words, launcher=(BIN / "torchrun", "--nproc_per_node", "2", "--master_port", "29556")
    )
    assert deepspeed == torchrun and len(torchrun) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.bath_size=3",), "data.batch_size"),
        (("data.root_path=/nowhere/at/all",), "/nowhere/at/all"),
        (("data.batch_size=64",), "fewer than the 64"),
        (("--resume",), "no checkpoint of 'jepa'"),
        (("engine.attention=xformers",), "pip install xformers"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else None,
)
def test_mistakes_are_named_and_nothing_is_written(
    words: tuple[str, ...], message: str, config: Path, tmp_path: Path
) -> None:
    done = run("--config", config, f"logging.folder={tmp_path / 'run'}", *words)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config, folder, "engine.max_steps=2")
    done = run(
        "--config", config, f"logging.folder={folder}", "--resume", "engine.max_skipped=3",
        "optimization.lr=1e30", "optimization.start_lr=1e30",
    )  # fmt: skip
    assert done.returncode == 1 and "3 steps in a row" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.count("skipped: its gradient is not finite") == 3
    assert [row["step"] for row in train(config, folder, "--resume", "engine.max_steps=4")] == [0, 1, 2, 3]


def test_dry_run_tells_and_touches_nothing(config: Path, tmp_path: Path) -> None:
    done = run("--config", config, f"logging.folder={tmp_path / 'run'}", "--dry-run", "--world-size", 8)
    assert done.returncode == 0, done.stderr
    assert "train_batch_size" in done.stdout and "memory per rank" in done.stdout
    assert not (tmp_path / "run").exists()
