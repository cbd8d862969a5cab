"""benchmarks/learning.py at toy size: it goes on where it was cut off; its figure and table say what the logs do."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from PIL import Image

from processes import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import learning

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

PLAN = """
config: {configs}/cifar10_vits4_{{objective}}.yaml
overrides: [meta.embed_dim=24, meta.depth=2, meta.num_heads=2, meta.pred_depth=1, meta.pred_emb_dim=24,
  meta.pred_num_heads=2, meta.use_bfloat16=false, data.num_workers=1, data.batch_size=8, optimization.warmup=1,
  optimization.epochs=2, logging.log_freq=2]
probes: 4
arms:
  I-JEPA: {{objective: ijepa, seeds: 2}}
  SimSiam, small: {{objective: simsiam, overrides: [loss.projector=16, loss.bottleneck=8]}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(random.getrandbits(32))
    for split in ("train", "val"):
        for label, colour in (("a", 60), ("b", 180)):
            (root / split / label).mkdir(parents=True)
            for i in range(32):
                pixels = rng.integers(0, 60, (32, 32, 3)) + colour
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{i}.png")
    return root


def test_it_goes_on_and_draws_what_it_measured(data: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "out/learning"
    plan.write_text(PLAN.format(configs=ROOT / "engine/configs"))
    words = [sys.executable, ROOT / "benchmarks/learning.py", plan, "--data", data, "--runs", tmp_path / "runs"]
    words += ["--out", out, "--jobs", "2", "--goal", "1"]

    def type_it(hours: str, *more: str) -> str:
        done = subprocess.run([*map(str, words), "--budget-hours", hours, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert type_it("0.1", "engine.max_steps=8").count("| I-JEPA |") == 1
    first = json.loads(out.with_suffix(".json").read_text())
    said = type_it("0.1")
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["ended"] == {"I-JEPA-0": True, "SimSiam-small-0": True, "I-JEPA-1": True}
    for name, points in result["runs"].items():
        images = [point["images"] for point in points]
        assert images == sorted(images) and len(set(images)) == len(images) and images[-1] == 2 * 64
        hours = [point["hours"] for point in points]
        assert hours == sorted(hours) and hours[0] > 0
        before = first["runs"][name]
        assert [p["loss"] for p in points[: len(before)]] == [p["loss"] for p in before]

    logs = {n: learning.points_of(tmp_path / f"runs/{n}/jepa.jsonl", 8) for n in result["runs"]}
    for name, points in logs.items():
        assert [p.images for p in points] == [p["images"] for p in result["runs"][name]]
    (row,) = re.findall(r"\| I-JEPA \| 2 \| 128 \| [\d.]+ \| [\d.]+ ± [\d.]+ \| ([\d.]+) ± ([\d.]+) \| (\S+) \|", said)
    ends = [100 * logs[f"I-JEPA-{seed}"][-1].row["linear"] for seed in (0, 1)]
    assert float(row[0]) == pytest.approx(mean(ends), abs=0.051)
    assert float(row[1]) == pytest.approx(abs(ends[0] - ends[1]) / 2**0.5, abs=0.051)
    assert int(row[2]) == mean(logs[f"I-JEPA-{seed}"][0].images for seed in (0, 1))  # one percent is reached at once
    for name in ("untrained encoder", "pixels"):
        assert f"| {name} | " in said and 0 <= result["baselines"][name]["linear"] <= 1

    arms, _ = learning.read_plan(plan)
    runs = list(learning.runs_of(arms, tmp_path / "runs"))
    for run in runs:
        run.points = logs[run.folder.name]
    figure = learning.draw(runs, result["baselines"], tmp_path / "again.png")
    over_images, over_hours = figure.axes
    for axes in (over_images, over_hours):
        drawn = {line.get_label(): line for line in axes.lines}
        y = np.mean([[100 * p.row["linear"] for p in logs[f"I-JEPA-{seed}"]] for seed in (0, 1)], axis=0)
        assert np.allclose(drawn["I-JEPA"].get_ydata(), y)
        assert np.allclose(
            drawn["SimSiam, small"].get_ydata(), [100 * p.row["linear"] for p in logs["SimSiam-small-0"]]
        )
        dashed = sorted(float(np.asarray(line.get_ydata())[0]) for line in axes.lines if line.get_linestyle() == "--")
        assert np.allclose(dashed, sorted(100 * found["linear"] for found in result["baselines"].values()))
    x = np.mean([[p.hours for p in logs[f"I-JEPA-{seed}"]] for seed in (0, 1)], axis=0)
    assert np.allclose({line.get_label(): line for line in over_hours.lines}["I-JEPA"].get_xdata(), x)
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_plan_that_is_wrong_is_named(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    for text, wanted in (("seeds: 1\narm: {}", "wanted a mapping with keys of arms"), ("arms: {A: {seed: 1}}", "A: ")):
        plan.write_text(text)
        with pytest.raises(ValueError, match=wanted):
            learning.read_plan(plan)
