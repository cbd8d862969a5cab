"""A method is one file: tests/support/rotation.py and a short YAML are put into a copy of the engine, and everything
that the engine's programs and benchmarks do with a run works on it. Once without an average and once with one."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from processes import ROOT, rows, write_images

pytestmark = pytest.mark.ranks

CONFIG = """
base: base.yaml

meta:
  model_name: vit_tiny
  embed_dim: 24
  depth: 2
  num_heads: 2
  use_bfloat16: false

data:
  batch_size: 4
  crop_size: 32
  num_workers: 1

mask:
  patch_size: 16  # a grid of 2 x 2, in which I-JEPA's masks do not fit

optimization:
  epochs: 2
  warmup: 0.5

loss:
  objective: rotation
  confidence: 0.05

engine:
  device: cpu

logging:
  log_freq: 1
"""
STEPS, SAVED = 5, 3


@dataclass
class Copy:
    """A copy of the engine that has the method, and the process that runs its programs (forks.py)."""

    root: Path
    images: Path
    averages: bool
    forks: subprocess.Popen[str]

    def run(self, program: str, *words: object, ranks: int = 1, code: int = 0) -> str:
        """What the first rank prints. All must exit with `code`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        places: list[dict[str, str]] = [{}]
        if ranks > 1:
            group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            places = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        outputs = [self.root / f"rank{rank}.out" for rank in range(ranks)]
        given = [str(self.root / program), [*map(str, words)]]
        line = [[*given, place, str(output)] for place, output in zip(places, outputs, strict=True)]
        assert self.forks.stdin and self.forks.stdout
        self.forks.stdin.write(json.dumps(line) + "\n")
        self.forks.stdin.flush()
        codes, said = json.loads(self.forks.stdout.readline()), [output.read_text() for output in outputs]
        assert codes == [code] * ranks, "\n".join(said)
        return said[0]

    def train(self, folder: str, *words: object, ranks: int = 1) -> str:
        data = (f"data.root_path={self.images}", f"logging.folder={self.root / folder}", "logging.health_freq=2")
        data += ("eval.every=2", f"eval.train_path={self.images}", f"eval.val_path={self.images}")
        words = ("--config", self.root / "engine/configs/rotation.yaml", f"logging.save_every={SAVED}", *data, *words)
        return self.run("engine/train.py", *words, ranks=ranks)


@pytest.fixture(scope="module", params=["without averages", "with an average"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    root, averages = tmp_path_factory.mktemp("engine"), request.param == "with an average"
    for folder in ("engine", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    before = {path: path.read_bytes() for path in root.rglob("*.py")}
    text, without = (ROOT / "tests/support/rotation.py").read_text(), "averaged: ClassVar[tuple[str, ...]] = ()"
    assert without in text
    with_an_average = text.replace(without, 'averaged = ("encoder",)')
    (root / "engine/jepa/methods/rotation.py").write_text(with_an_average if averages else text)
    (root / "engine/configs/rotation.yaml").write_text(CONFIG)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command, pipe = [sys.executable, str(ROOT / "tests/support/forks.py"), str(root)], subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe) as forks:
        copy = Copy(root, write_images(root / "images"), averages, forks)
        copy.train("run", f"engine.max_steps={STEPS}")
        yield copy
    assert before == {path: path.read_bytes() for path in before}


def log(engine: Copy, folder: str = "run") -> list[dict[str, Any]]:
    """Without times."""
    clocks = ("images_per_second", "step_ms", "data_wait_ms", "cpu_ms")
    return [{key: value for key, value in row.items() if key not in clocks} for row in rows(engine.root / folder)]


def test_it_trains_and_is_logged_and_probed(engine: Copy) -> None:
    found = log(engine)
    assert [row["step"] for row in found] == list(range(STEPS))
    for row in found:
        assert row["loss"] == pytest.approx(row["turn"] + 0.05 * row["entropy"] + row["distance"], rel=1e-6)
        assert row["turn"] > 0 and 0 < row["entropy"] < 1.4 and (row["distance"] > 0) == engine.averages
        examined = row["step"] % 2 == 1
        assert ("turned_rank" in row) == ("turned_std" in row) == ("knn" in row) == ("linear" in row) == examined
        assert ("teacher_distance" in row) == (examined and engine.averages)
        assert ("momentum" in row) == engine.averages and "context_tokens" not in row
    assert (engine.root / "run/jepa-latest/state.json").exists()


def test_it_resumes_bit_for_bit(engine: Copy) -> None:
    engine.train("parts", f"engine.max_steps={SAVED}")
    engine.train("parts", f"engine.max_steps={STEPS}", "--resume")
    assert log(engine, "parts") == log(engine)


def test_a_step_is_replayed(engine: Copy) -> None:
    said = engine.train("run", "--replay-step", 4)
    (found,) = re.findall(r"^rank 0: (.*)", said, re.M)
    names, values = zip(*(part.split() for part in found.split("  ")), strict=True)
    row = log(engine)[4]
    assert names == ("total", "turn", "entropy", "distance")
    assert [float(value) for value in values] == pytest.approx([row["loss"], *(row[name] for name in names[1:])])
    assert re.search(r"gradient norm \S+: encoder \S+  head \S+\n", said) and "everything is finite" in said


def test_two_ranks_are_one_with_the_whole_batch(engine: Copy) -> None:
    engine.train("two", f"engine.max_steps={STEPS}", "data.batch_size=2", ranks=2)
    for two, one in zip(log(engine, "two"), log(engine), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4) and two.keys() == one.keys()
        assert two.get("knn") == one.get("knn") and two.get("linear") == one.get("linear")


def test_it_is_evaluated_exported_and_drawn(engine: Copy, tmp_path: Path) -> None:
    checkpoint, images, out = engine.root / "run/jepa-latest", engine.images, tmp_path / "pictures"
    engine.run("engine/export.py", checkpoint, "--to", "safetensors", "--out", tmp_path / "encoder")
    assert "target_encoder.norm.bias" in safetensors.torch.load_file(tmp_path / "encoder")
    said = engine.run("engine/export.py", checkpoint, "--to", "published", "--out", tmp_path / "p", code=1)
    assert "has no predictor; it has" in said and "Traceback" not in said
    name = "target encoder" if engine.averages else "encoder"
    for path in (checkpoint, tmp_path / "encoder"):
        said = engine.run("engine/evaluate.py", "knn", path, "--train", images, "--val", images, "--out", out / "eval")
        assert re.search(rf"^{name}  ", said, re.M)
    words = ("--images", images, "--log", engine.root / "run/jepa.jsonl", "--out", out, "--count", 2)
    drawn = engine.run("engine/visualize.py", checkpoint, *words).split()
    assert drawn == [str(out / f"{name}.png") for name in ("attention", "features", "curves")]
    assert all(Path(path).stat().st_size for path in drawn)


def test_its_needs_are_told_before_it_runs(engine: Copy) -> None:
    said = engine.train("nowhere", "--dry-run", "meta.embed_dim=1024")
    for line in ("encoder", "head", "total"):
        assert len(re.findall(rf"^  {line} +\d+\.\d+$", said, re.M)) >= 2
    (averages,) = re.findall(r"^  ema +(\S+)", said, re.M)
    assert (float(averages) > 0.05) == engine.averages and (averages == "0.000") != engine.averages
    assert "predictor" not in said.partition("DeepSpeed:")[2] and "in a context" not in said
    assert not (engine.root / "nowhere").exists()


def test_it_is_benchmarked(engine: Copy, tmp_path: Path) -> None:
    words = ("--config", engine.root / "engine/configs/rotation.yaml", "--device", "cpu", "--steps", 2, "--warmup", 2)
    words += ("--mode", "model", "--mode", "data", "--mode", "train", "--without", "all", "--out", tmp_path / "out")
    given = (f"data.root_path={engine.images}", f"logging.folder={tmp_path}")
    said = engine.run("benchmarks/throughput.py", *words, *given)
    result = json.loads((tmp_path / "out.json").read_text())
    names = {row["contender"] for row in result["model"]["rows"]}
    assert {"engine", "without optimizer", "without kernels", "without attention"} <= names
    assert not any("failed" in row for row in result["model"]["rows"]), said
    assert all(error < 1e-5 for error in result["model"]["loss_errors"].values())
