"""engine/train.py end to end: real processes, real JPEGs, real checkpoints."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ROOT, start, write_config, write_images
from soak import log_of

pytestmark = pytest.mark.ranks

TRAIN = str(ROOT / "engine/train.py")
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty noise JPEGs in two classes, and one file that is not an image."""
    folder = write_images(tmp_path_factory.mktemp("images"))
    (folder / "class0" / "broken.jpg").write_bytes(random.randbytes(500))
    return folder


@pytest.fixture
def config(images: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", images)


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


def train(config: Path, folder: Path, *words: object) -> list[dict]:
    """Trains on one rank and returns the log without its times."""
    done = start(1, folder, "--config", config, *words)
    assert done.wait() == [0], done.text()
    return log_of(folder)[0]


def test_an_interrupted_run_goes_on_bit_for_bit(config: Path, images: Path, tmp_path: Path) -> None:
    same = ("engine.gradient_accumulation_steps=2", "logging.save_every=2")
    whole = train(config, tmp_path / "whole", *same, "engine.max_steps=7")
    assert [row["step"] for row in whole] == list(range(7))
    assert sum(row["bad_images"] for row in whole) in (1, 2)  # one of 41 files is broken; an epoch uses 40
    train(config, tmp_path / "parts", *same, "engine.max_steps=3")
    # Other save, health and evaluation intervals must not change a bit.
    parts = train(
        config,
        tmp_path / "parts",
        *same,
        "engine.max_steps=7",
        "--resume",
        "logging.save_every=3",
        "logging.health_freq=2",
        "eval.every=2",
        f"eval.train_path={images}",
        f"eval.val_path={images}",
    )
    health = ("target_", "pred_", "teacher_", "knn", "linear")
    assert [{k: v for k, v in row.items() if not k.startswith(health)} for row in parts] == whole
    assert any("target_rank" in row for row in parts) and any("knn" in row for row in parts)
    columns, *rows = (tmp_path / "parts/jepa_r0.csv").read_text().splitlines()
    assert columns == "epoch,itr,loss,mask-A,mask-B,time (ms)"
    assert [f"{float(row.split(',')[2]):.5f}" for row in rows] == [f"{row['loss']:.5f}" for row in whole]


def test_launchers_agree(config: Path, tmp_path: Path) -> None:
    words = ("--config", config, "engine.max_steps=3", "engine.device=cpu", "mask.mode=packed")
    for name, launcher in {
        "deepspeed": (BIN / "deepspeed", "--num_accelerators", "2", "--master_port", "29555"),
        "launch": (sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port", "29557"),
        "torchrun": (BIN / "torchrun", "--nproc_per_node", "2", "--master_port", "29556"),
    }.items():
        done = run(*words, f"logging.folder={tmp_path / name}", launcher=launcher)
        assert done.returncode == 0, done.stdout + done.stderr
    assert start(2, tmp_path / "forked", *words).wait() == [0, 0]
    log = log_of(tmp_path / "forked")
    assert (
        log == log_of(tmp_path / "deepspeed") == log_of(tmp_path / "launch") == log_of(tmp_path / "torchrun")
        and len(log[0]) == 3
    )


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
    done = start(1, tmp_path / "run", "--config", config, *words)
    assert done.wait() == [1] and message in done.text() and "Traceback" not in done.text()
    assert not (tmp_path / "run").exists()


def without_loggers(_: int) -> None:
    sys.modules["wandb"] = sys.modules["tensorboard"] = None  # type: ignore[assignment]


@pytest.mark.parametrize(("key", "package"), [("wandb=x", "wandb"), ("tensorboard=true", "tensorboard")])
def test_a_logger_that_is_missing_is_named_before_the_model_is_built(
    key: str, package: str, config: Path, tmp_path: Path
) -> None:
    done = start(1, tmp_path / "run", "--config", config, f"logging.{key}", fault=without_loggers)
    assert done.wait() == [1] and f"pip install {package}" in done.text() and "Traceback" not in done.text()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_the_images_are_opened(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = (f"logging.folder={tmp_path / 'file' / 'run'}", "data.root_path=/nowhere")
    done = start(1, tmp_path / "run", "--config", config, *words)
    assert done.wait() == [1] and "Not a directory" in done.text() and "/nowhere" not in done.text()


def test_what_follows_resume_is_an_override_or_a_checkpoint(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lr=1e-3"
    train(config, folder, "engine.max_steps=2", "logging.save_every=1")
    for words in (
        ("--resume", "engine.max_steps=3", "logging.save_every=1"),
        ("--resume=jepa-step00000002", "engine.max_steps=3"),
        ("--resume", f"{folder}/jepa-step00000002", "engine.max_steps=3"),
        ("meta.load_checkpoint=true", "meta.read_checkpoint=jepa-step00000002", "engine.max_steps=3"),
    ):
        done = start(1, folder, "--config", config, *words)
        assert done.wait() == [0] and "resuming from" in done.text()
    for words in (
        ("--resume", f"{folder}/jepa-step9"),
        ("meta.load_checkpoint=true", "meta.read_checkpoint=jepa-step9"),
    ):
        done = start(1, folder, "--config", config, *words)
        assert done.wait() == [1] and f"{folder}/jepa-step9 does not exist" in done.text()
    done = start(1, folder, "--config", config, "--resume", "")
    assert done.wait() == [2] and "--resume: given no checkpoint's name" in done.text()


def test_a_run_that_diverges_stops_and_keeps_the_checkpoint_before(config: Path, tmp_path: Path) -> None:
    """The step with the absurd learning rate is finite, so its weights are saved, but all later steps are not."""
    folder, often = tmp_path / "run", ("logging.save_every=1", "logging.keep_last=1")
    train(config, folder, "engine.max_steps=2", *often)
    absurd = ("engine.max_skipped=3", "optimization.lr=1e30", "optimization.start_lr=1e30")
    done = start(1, folder, "--config", config, "--resume", *absurd, *often)
    assert done.wait() == [1] and "3 steps in a row" in done.text() and "Traceback" not in done.text()
    assert f"--resume: {folder}/jepa-step00000003 is from before these steps" in done.text()
    assert "optimization, lr 0.001, this run has 1e+30" in done.text()
    assert len(re.findall(r"step \d+ skipped: (its gradient|the loss of rank.*) is not finite", done.text())) == 3
    assert {path.name for path in folder.glob("jepa-step*")} == {"jepa-step00000002", "jepa-step00000003"}
    before = folder / "jepa-step00000002"
    assert [row["step"] for row in train(config, folder, "--resume", before, "engine.max_steps=4")] == [0, 1, 2, 3]
    assert '"step": 5' in (folder / "jepa.jsonl.aside").read_text()  # the log rows of the discarded steps


def test_a_run_that_is_stopped_while_steps_are_skipped_saves_and_deletes_nothing(config: Path, tmp_path: Path) -> None:
    folder, often = tmp_path / "run", ("logging.save_every=1", "logging.keep_last=1")
    train(config, folder, "engine.max_steps=2", *often)
    absurd = ("engine.max_steps=5", "optimization.lr=1e30", "optimization.start_lr=1e30")
    done = start(1, folder, "--config", config, "--resume", *absurd, *often)
    assert done.wait() == [0] and len(re.findall(r"step [34] skipped", done.text())) == 2
    assert re.findall(r"saved \S+step0+(\d+)", done.text()) == ["3", "5"]
    assert {int(path.name[-8:]) for path in folder.glob("jepa-step*")} == {2, 3, 5}


def test_deterministic_runs_are_alike_and_logging_changes_nothing(config: Path, tmp_path: Path) -> None:
    """On two ranks; the second run logs, saves and measures health at other steps."""
    words = ("--config", config, "engine.deterministic=true", "engine.max_steps=8", "data.num_workers=3")
    rarely = ("logging.log_freq=3", "logging.save_every=5", "logging.health_freq=7")
    one, other = start(2, tmp_path / "one", *words), start(2, tmp_path / "other", *words, *rarely)
    assert one.wait() == other.wait() == [0, 0], one.text() + other.text()
    often, seldom = ({row["step"]: row["loss"] for row in log_of(tmp_path / name)[0]} for name in ("one", "other"))
    assert list(often) == list(range(8)) and list(seldom) == [2, 4, 5, 6, 7]
    assert {step: often[step] for step in seldom} == seldom
    assert log_of(tmp_path / "one")[1] == log_of(tmp_path / "other")[1]  # the CSV has every step


def test_a_resume_that_would_change_the_loss_is_refused_until_it_is_accepted(config: Path, tmp_path: Path) -> None:
    """From two ranks to one with accumulation, which changes VICReg's statistics."""
    folder, words = tmp_path / "run", ("--config", config, "engine.global_batch_size=8", "--resume", "auto")
    assert start(2, folder, *words, "engine.max_steps=2", "mask.cut=global").wait() == [0, 0]
    run = start(1, folder, *words, "engine.max_steps=3", "mask.cut=global")
    assert run.wait() == [1] and "accumulation 1, this run has 2" in run.text() and "--accept-changes" in run.text()
    run = start(1, folder, *words, "engine.max_steps=3", "mask.cut=rank", "data.batch_size=8", "--accept-changes")
    assert run.wait() == [0] and "accepted: " in run.text() and "mask.cut global, this run has rank" in run.text()
    run = start(1, folder, *words, "engine.max_steps=4", "mask.cut=rank", "data.batch_size=8", "engine.zero_stage=3")
    assert run.wait() == [0] and "accepted" not in run.text() and "at step 3\n" in run.text()


def test_dry_run_tells_and_touches_nothing(config: Path, tmp_path: Path) -> None:
    done = run("--config", config, f"logging.folder={tmp_path / 'run'}", "--dry-run", "--world-size", 8)
    assert done.returncode == 0, done.stderr
    assert "train_batch_size" in done.stdout and "memory per rank" in done.stdout
    (counts,) = re.findall(r"^(\d+) images of .*: \1 \.jpg$", done.stdout, re.M)
    assert int(counts) > 0
    elsewhere = run("--config", config, "--dry-run", f"data.root_path={tmp_path / 'gone'}")
    assert elsewhere.returncode == 0 and f"'{tmp_path / 'gone'}', which does not exist" in elsewhere.stdout
    chosen = run("--config", config, "--dry-run", "data.suffixes=[.seg.png]")
    assert chosen.returncode == 1 and "contains no image (looked for .seg.png)" in chosen.stderr
    assert f"left out: {counts} .jpg" in chosen.stderr
    assert not (tmp_path / "run").exists()
