"""What fp8 targets do to training, emulated on a CPU: the demo with targets in bf16 and in fp8, from several seeds.

    python engine/jepa/data/synthetic.py data/demo --seed 1
    python benchmarks/fp8.py [--config engine/configs/demo.yaml] [--steps 300] [--out benchmarks/results/fp8-demo]

Training amplifies rounding errors, so each seed also runs in bf16 with attention by plain matrix products. These differ
only in rounding, but are the coarser: their scores are bf16. It shows how far a change of rounding carries a run. Of
the trained target encoder, features in fp8 are compared with bf16's, and bf16's with fp32's. Writes OUT.md, OUT.json
and OUT.png, the loss curves.
Speed is not compared: only a GPU multiplies in fp8. Runs are kept in --runs and continued, not repeated.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from machine import ROOT, provenance
from matplotlib.figure import Figure

from jepa.data.loader import eval_batches
from jepa.data.sources import open_images
from jepa.model.fp8 import Encoder
from jepa.pictures.style import BLUE, GREEN, ORANGE, STYLE
from jepa.state.encoder import load_encoder

ARMS = {
    "bf16": ("bf16", BLUE, ()),
    "fp8": ("fp8", ORANGE, ("engine.target_precision=fp8",)),
    "math": ("bf16, coarser attention", GREEN, ("engine.attention=math",)),
}
RUNS = [(arm, seed) for seed in range(3) for arm in ARMS]


def train(config: str, data: Path, steps: int, folder: Path, seed: int, overrides: Sequence[str]) -> list[dict]:
    """Runs engine/train.py and returns its log: a row every `logging.log_freq` steps, each with their mean loss."""
    given = [f"logging.folder={folder}", f"data.root_path={data}", f"engine.max_steps={steps}", f"engine.seed={seed}"]
    given += ["engine.precision=bf16", "engine.device=cpu", *overrides]
    given += [f"eval.every={steps}", f"eval.train_path={data / 'train'}", f"eval.val_path={data / 'val'}"]
    command = [sys.executable, str(ROOT / "engine/train.py"), "--config", config, "--resume", "auto", *given]
    subprocess.run(command, check=True)
    return [json.loads(line) for line in (folder / "jepa.jsonl").read_text().splitlines()]


@torch.no_grad()
def compare(checkpoint: Path, data: Path, images: int = 256) -> dict[str, list[float]]:
    """Of layer-normed features, fp8's against bf16's and bf16's against fp32's: the smallest and the mean cosine of a
    patch, and the mean of what differs between images, without each position's mean."""
    exact, config = load_encoder(str(checkpoint))
    bf16 = copy.deepcopy(exact).to(torch.bfloat16)
    in_fp8 = Encoder(bf16)
    in_fp8.refresh()
    source, size = open_images(data / "val"), config.data.crop_size
    pixels, _ = next(iter(eval_batches(source, crop_size=size, batch_size=images, indices=list(range(images)))))
    features = [F.layer_norm(forward(pixels).float(), (config.vit.embed_dim,)) for forward in (in_fp8, bf16, exact)]
    found = {}
    for name, (a, b) in zip(("fp8, bf16", "bf16, fp32"), pairwise(features), strict=True):
        cosine = F.cosine_similarity(a, b, dim=-1)
        centred = F.cosine_similarity(a - a.mean(0), b - b.mean(0), dim=-1)
        found[name] = [float(cosine.min()), float(cosine.mean()), float(centred.mean())]
    return found


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.2), dpi=160, layout="constrained")
        every = figure.subplots(1, 3, sharey=True)
        for arm, seed in RUNS:
            label, color, _ = ARMS[arm]
            steps, losses = zip(*((row["step"], row["loss"]) for row in runs[f"{arm}-{seed}"]), strict=True)
            every[seed].plot(steps, losses, color=color, label=label)
        for seed, axes in enumerate(every):
            axes.set(title=f"Loss, seed {seed}", xlabel="step", ylim=(0, None))
        every[0].legend(title="targets")
        figure.savefig(path)


def report(result: dict[str, Any], picture: str) -> str:
    versions = result["versions"]
    lines = [
        "# fp8 targets, emulated",
        "",
        f"`{result['command']}`: {result['config']}, {result['steps']} steps in bf16, on {result['hardware']}; torch "
        f"{versions['torch']}, DeepSpeed {versions['deepspeed']}, commit {result['commit']}. Nothing here is a speed.",
        "",
        "| targets | seed | loss after 50 steps | 70 | 100 | 200 | end | k-NN of the target encoder |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, seed in RUNS:
        log = result["runs"][f"{arm}-{seed}"]
        losses = {row["step"] + 1: row["loss"] for row in log}
        shown = " | ".join(f"{losses[step]:.4f}" for step in (50, 70, 100, 200, result["steps"]))
        lines.append(f"| {ARMS[arm][0]} | {seed} | {shown} | {100 * log[-1]['knn']:.1f} % |")
    groups = {"bf16, either attention": ("bf16", "math"), "fp8": ("fp8",)}
    found = {
        n: [100 * result["runs"][f"{a}-{s}"][-1]["knn"] for a, s in RUNS if a in arms] for n, arms in groups.items()
    }
    means = "; ".join(f"{n} {mean(v):.1f} % (deviation {stdev(v):.1f}, {len(v)} runs)" for n, v in found.items())
    lines += ["", f"Mean k-NN: {means}. So few runs show only a large effect."]
    lines += ["", "| features of the trained target encoder | smallest cosine | mean | without position means |"]
    lines += ["|---|---|---|---|"]
    for name, values in result["cosines"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.5f}" for value in values) + " |")
    lines += ["", f"![loss curves]({picture})"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="engine/configs/demo.yaml")
    parser.add_argument(
        "--data", type=Path, default=Path("data/demo/images"), help="a folder with train/ and val/, labelled"
    )
    parser.add_argument("--steps", type=int, default=300, help="at least 200")
    parser.add_argument("--runs", type=Path, default=Path("runs/fp8"), help="where to train")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fp8-demo", help="without a suffix")
    args = parser.parse_args()
    logs = {}
    for arm, seed in RUNS:
        folder = args.runs / f"{arm}-{seed}"
        logs[folder.name] = train(args.config, args.data, args.steps, folder, seed, ARMS[arm][2])
    cosines = compare(args.runs / "bf16-0/jepa-latest", args.data)
    kept = ("step", "loss", "jepa", "sim", "std", "cov", "knn")
    runs = {folder: [{key: row[key] for key in kept if key in row} for row in log] for folder, log in logs.items()}
    result = {**provenance(torch.device("cpu")), "config": args.config, "steps": args.steps, "runs": runs}
    result["cosines"] = cosines
    draw(runs, args.out.with_suffix(".png"))
    args.out.with_suffix(".json").write_text(json.dumps(result) + "\n")
    args.out.with_suffix(".md").write_text(text := report(result, args.out.with_suffix(".png").name))
    print(text)


if __name__ == "__main__":
    main()
