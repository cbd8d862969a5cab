"""Which method learns faster? Methods x seeds on the same encoder, images and number of steps, probed along the way.

    python benchmarks/learning.py benchmarks/learning.yaml --data cifar10 --budget-hours 2

The plan (benchmarks/learning.yaml) names the arms: a recipe and what changes in it. --data has labelled train/ and
val/. Each run is an engine/train.py on one processor, --jobs of them side by side; first all arms with one seed, then
the next. What --budget-hours cuts off, and what was killed, goes on where it was when the same command is typed again.

Accuracies are those of the run's own probes, k-NN and a linear classifier on frozen features of val/ fitted on train/
(eval.max_images of each); beside them those of an untrained encoder and of raw pixels. Hours are of processor time in
training steps, which other processes on the machine change little. Writes OUT.json, OUT.md and OUT.png after each run.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("engine", "kernels")]

import matplotlib
import torch
import yaml
from machine import ROOT, provenance
from matplotlib.figure import Figure

from jepa.config.file import load_config
from jepa.config.schema import Config
from jepa.data.sources import open_images
from jepa.model.vit import build_encoder
from jepa.pictures.style import PALETTE, STYLE, write
from jepa.probes.features import Pixels
from jepa.probes.online import OnlineProbe
from jepa.ranks import distributed
from jepa.ranks.program import Parser, run_program
from jepa.ranks.stop import STOPPED

SHOWN = {"knn": "k-NN", "linear": "linear"}
ALONE = dict(os.environ)  # before this process has a group of its own
HEALTH = ("rank", "std", "cov")  # of every kind of features that a method logs


@dataclass(frozen=True)
class Arm:
    name: str
    config: Path
    overrides: tuple[str, ...]
    seeds: int


@dataclass(frozen=True)
class Point:
    """A probe of a run: images seen, hours of processor time spent in steps, and what the log says there."""

    images: int
    hours: float
    row: Mapping[str, Any]


@dataclass
class Run:
    arm: Arm
    seed: int
    folder: Path
    points: list[Point] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Of processor time."""
        return self.points[-1].images / (3600 * self.points[-1].hours)


def read_plan(path: Path, more: Sequence[str] = ()) -> tuple[list[Arm], int]:
    """The arms, and the number of probes in a run. Raises ValueError for a key that is missing or unknown."""
    plan = yaml.safe_load(path.read_text())
    _refuse_others(str(path), plan, {"config", "overrides", "probes", "seeds", "arms"})
    arms = []
    for name, given in plan["arms"].items():
        _refuse_others(f"{path}: {name}", given, {"config", "objective", "overrides", "seeds"})
        recipe = str(given.get("config", plan["config"])).format(objective=given.get("objective", ""))
        overrides = (*plan.get("overrides", ()), *given.get("overrides", ()), *more)
        arms.append(Arm(name, path.parent / recipe, overrides, int(given.get("seeds", plan.get("seeds", 1)))))
    return arms, int(plan.get("probes", 10))


def _refuse_others(where: str, given: object, known: set[str]) -> None:
    if not isinstance(given, Mapping) or set(given) - known:
        raise ValueError(f"{where}: given {given}, wanted a mapping with keys of {', '.join(sorted(known))}")


def runs_of(arms: Sequence[Arm], folder: Path) -> Iterator[Run]:
    """All arms with seed 0, then those with more."""
    for seed in range(max(arm.seeds for arm in arms)):
        for arm in arms:
            if seed < arm.seeds:
                yield Run(arm, seed, folder / f"{arm.name.replace(' ', '-').replace(',', '')}-{seed}")


def words_of(run: Run, data: Path, probes: int) -> list[str]:
    """The overrides of a run: the arm's, its seed and folder, and a probe after every 1/`probes` of its steps."""
    words = [*run.arm.overrides, f"data.root_path={data / 'train'}", f"engine.seed={run.seed}", "engine.device=cpu"]
    words += [f"logging.folder={run.folder}", f"eval.train_path={data / 'train'}", f"eval.val_path={data / 'val'}"]
    config = load_config(run.arm.config, words)
    images = len(open_images(data / "train"))
    steps = config.engine.max_steps or config.optimization.epochs * (images // config.batch(1).global_batch)
    every = max(1, steps // probes)
    return [*words, f"eval.every={every}", f"logging.health_freq={every}"]


def train(run: Run, words: Sequence[str], minutes: float) -> bool:
    """Trains for so long at most, and says whether the run has ended. Raises ValueError with what it said last."""
    command = [sys.executable, str(ROOT / "engine/train.py"), "--config", str(run.arm.config), "--resume", "auto"]
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "output.txt").open("a") as output:
        done = subprocess.run(
            [*command, "--max-minutes", f"{minutes:.4f}", *words],
            stdout=output,
            stderr=output,
            env=ALONE | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
    if done.returncode not in (0, STOPPED):
        last = (run.folder / "output.txt").read_text().strip().splitlines()[-1:]
        raise ValueError(f"{run.arm.name}, seed {run.seed}: exit code {done.returncode}: {' '.join(last)}")
    return done.returncode == 0


def points_of(log: Path, global_batch: int) -> list[Point]:
    """The probes that a log has; its rows have the mean `cpu_ms` of the steps since the row before."""
    points, step, seconds = [], -1, 0.0
    for row in map(json.loads, log.read_text().splitlines()):
        seconds += row.get("cpu_ms", 0.0) / 1000 * (row["step"] - step)
        step = row["step"]
        if "linear" in row:
            points.append(Point((step + 1) * global_batch, seconds / 3600, row))
    return points


def baselines(config: Config) -> dict[str, dict[str, float]]:
    """The same probes of an untrained encoder and of raw pixels."""
    probe = OnlineProbe(config, distributed.start("cpu"))
    torch.manual_seed(config.engine.seed)
    return {"untrained encoder": probe(build_encoder(config).eval()), "pixels": probe(Pixels())}


def table(runs: Sequence[Run], base: Mapping[str, Mapping[str, float]], wanted: float) -> list[list[str]]:
    """A row for each arm at the last probe that all its seeds have, and two without training."""
    rows = []
    for arm, group in grouped(runs).items():
        last = min(len(run.points) for run in group) - 1
        ends = [run.points[last] for run in group]
        row = [arm, str(len(group)), f"{ends[0].images:,}", f"{mean(end.hours for end in ends):.2f}"]
        row += [_spread([100 * end.row[key] for end in ends]) for key in SHOWN]
        reached = [first for run in group if (first := _first(run.points, wanted))]
        whole = len(reached) == len(group)
        row.append(f"{mean(point.images for point in reached):,.0f}" if whole else "not reached")
        row.append(f"{mean(point.hours for point in reached):.2f}" if whole else "not reached")
        row.append(f"{mean(run.images_per_second for run in group):.0f}")
        row.append("; ".join(_health(ends, name) for name in _kinds(ends[0].row)))
        rows.append(row)
    for name, found in base.items():
        rows.append([name, "", "", "", *(f"{100 * found[key]:.1f}" for key in SHOWN), "", "", "", ""])
    return rows


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.points:
            groups.setdefault(run.arm.name, []).append(run)
    return groups


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _first(points: Sequence[Point], wanted: float) -> Point | None:
    return next((point for point in points if point.row["linear"] >= wanted), None)


def _kinds(row: Mapping[str, Any]) -> list[str]:
    return [key.removesuffix("_rank") for key in row if key.endswith("_rank")]


def _health(ends: Sequence[Point], kind: str) -> str:
    values = (mean(end.row[f"{kind}_{key}"] for end in ends) for key in HEALTH)
    return f"{kind} " + " / ".join(f"{value:.3g}" for value in values)


def report(result: Mapping[str, Any], rows: Sequence[Sequence[str]], picture: str) -> str:
    versions = result["versions"]
    goal = f"linear {100 * result['wanted']:.1f} %"
    head = ["arm", "seeds", "images", "hours", *(f"{name} (%)" for name in SHOWN.values())]
    head += [f"images to {goal}", f"hours to {goal}", "images/s", "effective rank / std / correlation of features"]
    lines = [
        "# Which method learns faster?",
        "",
        f"`{result['command']}` on {result['hardware']}; torch {versions['torch']}, DeepSpeed {versions['deepspeed']}, "
        f"commit {result['commit']}. Hours and images/s are of one processor's time in training steps; ± is the "
        "deviation over seeds.",
        "",
        f"![Accuracy over images and over hours]({picture})",
        "",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    unfinished = [name for name, ended in result["ended"].items() if not ended]
    if unfinished:
        lines += ["", f"Not at their end yet: {', '.join(unfinished)}. The same command goes on."]
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], base: Mapping[str, Mapping[str, float]], path: Path) -> Figure:
    """Linear accuracy over images and over hours: a line for an arm's mean, a band from its worst to its best seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.2), dpi=160, layout="constrained")
        over_images, over_hours = figure.subplots(1, 2, sharey=True)
        for color, (arm, group) in zip(PALETTE * 9, grouped(runs).items(), strict=False):
            count = min(len(run.points) for run in group)
            probes = [[100 * run.points[i].row["linear"] for run in group] for i in range(count)]
            hours = [mean(run.points[i].hours for run in group) for i in range(count)]
            for axes, x in ((over_images, [point.images for point in group[0].points[:count]]), (over_hours, hours)):
                axes.plot(x, [mean(seeds) for seeds in probes], color=color, label=arm, marker="o", markersize=3)
                if len(group) > 1:
                    axes.fill_between(x, *zip(*((min(s), max(s)) for s in probes), strict=True), color=color, alpha=0.2)
        for axes, label in ((over_images, "images seen"), (over_hours, "hours of one processor")):
            axes.set(xlabel=label, xlim=(0, None))
            for name, found in base.items():
                axes.axhline(100 * found["linear"], color="#666666", linestyle="--", linewidth=1)
                axes.annotate(
                    name, (0.99, 100 * found["linear"]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                    fontsize=8, color="#666666",
                )  # fmt: skip
        over_images.set(ylabel="linear probe (%)")
        figure.legend(*over_images.get_legend_handles_labels(), loc="outside right center")
        return write(figure, path)


def save(runs: Sequence[Run], ended: Mapping[str, bool], base: dict[str, dict[str, float]], args: Any) -> str:
    """Writes the JSON, the table and the figure of what there is so far, and returns the table."""
    groups = grouped(runs)
    # By default what the first arm has at its end: then the others' images and hours say how much faster they are.
    reference = next(iter(groups.values()))
    wanted = args.goal / 100 if args.goal else min(run.points[-1].row["linear"] for run in reference)
    found = {
        run.folder.name: [{"images": p.images, "hours": p.hours, **p.row} for p in run.points]
        for run in runs
        if run.points
    }
    result = provenance(torch.device("cpu")) | {
        "wanted": wanted,
        "ended": dict(ended),
        "baselines": base,
        "runs": found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, base, args.out.with_suffix(".png"))
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = report(result, table(runs, base, wanted), args.out.with_suffix(".png").name)
    args.out.with_suffix(".md").write_text(text)
    return text


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="such as benchmarks/learning.yaml")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with labelled train/ and val/")
    parser.add_argument("--budget-hours", type=float, default=1.0, metavar="H", help="of this call (default: 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once (default: one a processor)")
    parser.add_argument("--goal", type=float, metavar="PERCENT", help="linear accuracy to measure the way to")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="where to train")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/learning", help="without a suffix")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of every run")
    args = parser.parse_intermixed_args()
    deadline = time.monotonic() + 3600 * args.budget_hours
    arms, probes = read_plan(args.plan, args.overrides)
    runs = list(runs_of(arms, args.runs))
    words = {run.folder.name: words_of(run, args.data, probes) for run in runs}
    ended = dict.fromkeys(words, False)
    configs = {run.folder.name: load_config(run.arm.config, words[run.folder.name]) for run in runs}
    base = baselines(configs[runs[0].folder.name])

    def go_on(run: Run) -> Run:
        name, minutes = run.folder.name, (deadline - time.monotonic()) / 60
        if minutes > 0:
            print(f"{name}: {minutes:.0f} minutes are left", flush=True)
            ended[name] = train(run, words[name], minutes)
        log = run.folder / "jepa.jsonl"
        run.points = points_of(log, configs[name].batch(1).global_batch) if log.exists() else []
        return run

    text = "no run has been probed yet: give it more --budget-hours"
    with ThreadPoolExecutor(args.jobs) as pool:
        for run in pool.map(go_on, runs):
            if run.points:
                print(f"{run.folder.name}: linear {100 * run.points[-1].row['linear']:.1f} %", flush=True)
                text = save(runs, ended, base, args)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, ValueError, OSError))
