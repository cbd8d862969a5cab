"""What fp8 targets do to training, emulated on a CPU: the same run with targets in bf16 and in fp8, and another seed.

    python engine/jepa/synthetic.py data/demo --seed 1
    python benchmarks/fp8.py [--config engine/configs/demo.yaml] [--steps 300] [--out benchmarks/results/fp8-demo]

Two bf16 runs that differ in the seed alone show how far apart runs are anyway. Of the trained bf16 target encoder it
also compares the features in fp8 with those in bf16, each patch's by cosine, on validation images. Writes OUT.md,
OUT.json and OUT.png, the loss curves. Speed is not compared: only a GPU multiplies in fp8.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from machine import ROOT, provenance
from matplotlib.figure import Figure

from jepa.data import eval_batches
from jepa.figures import BLUE, GREEN, ORANGE, STYLE
from jepa.fp8 import Encoder
from jepa.interop import load_encoder
from jepa.sources import open_images

RUNS = {"bf16": ("bf16", 0), "fp8": ("fp8", 0), "bf16, another seed": ("bf16", 1)}
WINDOW = 20  # steps of a mean


def train(config: str, data: Path, steps: int, folder: Path, targets: str, seed: int) -> list[dict[str, Any]]:
    """Runs engine/train.py and returns its log, one row a step."""
    given = [f"logging.folder={folder}", f"data.root_path={data}", f"engine.max_steps={steps}", f"engine.seed={seed}"]
    given += ["meta.use_bfloat16=true", f"engine.target_precision={targets}", "engine.device=cpu"]
    given += [f"eval.every={steps}", f"eval.train_path={data / 'train'}", f"eval.val_path={data / 'val'}"]
    subprocess.run([sys.executable, str(ROOT / "engine/train.py"), "--config", config, *given], check=True)
    return [json.loads(line) for line in (folder / "jepa.jsonl").read_text().splitlines()]


@torch.no_grad()
def cosines(checkpoint: Path, data: Path, images: int = 256) -> list[float]:
    """Smallest, 1st percentile and mean cosine between a patch's layer-normed features in fp8 and in bf16."""
    encoder, config = load_encoder(str(checkpoint))
    encoder.to(torch.bfloat16)
    in_fp8 = Encoder(encoder)
    in_fp8.refresh()
    indices = list(range(images))
    batches = eval_batches(
        open_images(data / "val"), crop_size=config.data.crop_size, batch_size=images, indices=indices
    )
    pixels, _ = next(iter(batches))
    both = [F.layer_norm(forward(pixels).float(), (config.vit.embed_dim,)) for forward in (encoder, in_fp8)]
    cosine = F.cosine_similarity(*both, dim=-1).flatten()
    return [float(cosine.min()), float(cosine.quantile(0.01)), float(cosine.mean())]


def draw(losses: dict[str, list[float]], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        for (name, values), color in zip(losses.items(), (BLUE, ORANGE, GREEN), strict=True):
            smooth = np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")
            axes.plot(values, color=color, alpha=0.2, linewidth=0.8)
            axes.plot(np.arange(len(smooth)) + WINDOW - 1, smooth, color=color, label=f"{name} targets")
        axes.set(title=f"Loss, and its mean over {WINDOW} steps", xlabel="step")
        axes.legend()
        figure.savefig(path)


def report(result: dict[str, Any]) -> str:
    rows, versions = result["runs"], result["versions"]
    lines = [
        "# fp8 targets, emulated",
        "",
        f"`{result['command']}`: {result['config']}, {result['steps']} steps in bf16, on {result['hardware']}; torch "
        f"{versions['torch']}, DeepSpeed {versions['deepspeed']}, commit {result['commit']}. Nothing here is a speed.",
        "",
        f"| targets | loss, mean of the last {WINDOW} steps | mean gap of its {WINDOW}-step mean to bf16's | k-NN |",
        "|---|---|---|---|",
    ]
    lines += [f"| {n} | {r['loss']:.4f} | {100 * r['apart']:.2f} % | {100 * r['knn']:.1f} % |" for n, r in rows.items()]
    least, low, mean = result["cosines"]
    lines += [
        "",
        f"Features of the trained target encoder, fp8 against bf16, cosine of a patch: mean {mean:.5f}, 1st percentile "
        f"{low:.5f}, smallest {least:.5f}.",
        "",
        "![loss](fp8-demo.png)",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="engine/configs/demo.yaml")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="a folder with train/ and val/, labelled")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fp8-demo", help="without a suffix")
    args = parser.parse_args()
    logs = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (targets, seed)) in enumerate(RUNS.items()):
            logs[name] = train(args.config, args.data, args.steps, Path(folder) / str(i), targets, seed)
        found = cosines(Path(folder) / "0/jepa-latest", args.data)
    losses = {name: [row["loss"] for row in log] for name, log in logs.items()}
    means = {name: np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid") for name, values in losses.items()}
    runs = {
        name: {
            "loss": statistics.mean(losses[name][-WINDOW:]),
            "apart": float(np.mean(np.abs(means[name] / means["bf16"] - 1))),
            "knn": log[-1]["knn"],
            "losses": losses[name],
        }
        for name, log in logs.items()
    }
    result = {**provenance(torch.device("cpu")), "config": args.config, "steps": args.steps, "runs": runs}
    result["cosines"] = found
    draw(losses, args.out.with_suffix(".png"))
    args.out.with_suffix(".json").write_text(json.dumps(result) + "\n")
    args.out.with_suffix(".md").write_text(text := report(result))
    print(text)


if __name__ == "__main__":
    main()
