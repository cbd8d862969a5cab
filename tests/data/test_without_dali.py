"""Everything but decoding images works where DALI is not installed, and decoding says what is missing."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomllib
import torch

from jepa.data import decode
from jepa.state import restore
from processes import ROOT, rows, start, write_config, write_images

IMPORTS = """
import runpy, sys
sys.modules["nvidia.dali"] = None
sys.path[:0] = ["kernels", "engine", "benchmarks"]
for path in sys.argv[1:]:
    runpy.run_path(path, run_name="imported")
"""


def without_dali(rank: int = 0) -> None:
    """As if it were not installed, though the process that this one was forked from has imported it."""
    names = [name for name in sys.modules if name.startswith("nvidia.dali")]
    sys.modules.update(dict.fromkeys(["nvidia.dali", *names]))  # None: cannot be imported


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", Path("$replace_this"))


@pytest.mark.slow
def test_every_program_and_benchmark_can_be_imported() -> None:
    programs = [
        str(path.relative_to(ROOT)) for folder in ("engine", "benchmarks") for path in ROOT.glob(f"{folder}/*.py")
    ]
    assert {"engine/train.py", "benchmarks/kernels.py", "benchmarks/throughput.py"} <= set(programs)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *programs], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.ranks
def test_a_run_on_synthetic_images_trains_resumes_and_replays(config: Path, tmp_path: Path) -> None:
    """Two ranks with two micro-batches each see the images that four ranks see."""
    words = ("--config", config, "data.synthetic=300", "logging.save_every=2", "mask.cut=global", "data.batch_size=2")
    twice = (*words, "engine.gradient_accumulation_steps=2", "loss.objective=ijepa")
    whole = start(2, tmp_path / "whole", *twice, "engine.max_steps=4", fault=without_dali)
    assert whole.wait() == [0, 0] and "300 images of data.synthetic" in whole.text(), whole.text()
    for steps in (2, 4):
        given = (*words, "loss.objective=ijepa", f"engine.max_steps={steps}", "--resume", "auto")
        parts = start(4, tmp_path / "parts", *given, fault=without_dali)
        assert parts.wait() == [0] * 4, parts.text()
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "parts")]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-6)

    again = start(2, tmp_path / "whole", *twice, "--replay-step", 3, fault=without_dali)
    assert again.wait() == [0, 0] and "everything is finite" in again.text()
    found = [float(loss) for loss in re.findall(r"rank \d: total (\S+)", again.text())]
    assert sum(found) / 2 == pytest.approx(losses[0][3], rel=1e-6)
    other = start(2, tmp_path / "whole", *twice, "data.synthetic=301", "--resume", fault=without_dali)
    assert other.wait() == [1, 1] and "images 300, this run has 301" in other.text()


@pytest.mark.ranks
def test_a_run_or_probe_that_needs_images_says_what_to_install(config: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    probing = ("data.synthetic=50", "eval.every=9", f"eval.train_path={images}", f"eval.val_path={images}")
    for words in ((f"data.root_path={images}",), probing):
        run = start(1, tmp_path / "run", "--config", config, *words, fault=without_dali)
        assert run.wait() == [1] and "DALI" in run.text() and "pip install" in run.text(), run.text()
        assert "Traceback" not in run.text() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("cuda", "package"), [("12.8", "cuda120"), ("13.0", "cuda130"), (None, "cuda130")])
def test_the_extra_to_install_fits_torch(monkeypatch: pytest.MonkeyPatch, cuda: str | None, package: str) -> None:
    for name in ["nvidia.dali", *(name for name in sys.modules if name.startswith("nvidia.dali"))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ValueError, match=r"data\.synthetic") as caught:
        decode.dali()
    (extra,) = re.findall(r'"\.\[(.+)\]"', str(caught.value))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not any("dali" in one for one in extras["engine"])
    rest, dali = extras[extra]
    assert rest == "jepa-kernels[engine]" and dali.startswith(f"nvidia-dali-{package}>=")
    assert re.search(f"^nvidia-dali-{package}==", (ROOT / "constraints.txt").read_text(), re.M)


@pytest.mark.parametrize("name", ["nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda140"])
def test_whichever_dali_is_installed_is_recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    packages = [SimpleNamespace(name=package, version="9.9") for package in ("torch", name, "nvidia-nccl-cu13")]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: packages)
    found = restore.versions.__wrapped__()
    assert found[name] == "9.9" and "nvidia-nccl-cu13" not in found
