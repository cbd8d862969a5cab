"""What to run on a GPU that is there for minutes: tests first, then figures in order of worth, within a budget.

    python benchmarks/gpu.py [--budget 600] [--checkout PATH_TO_A_CHECKOUT_OF_facebookresearch/ijepa] [--out FOLDER]
    python benchmarks/gpu.py --plan    # prints the stages, their commands and estimates

Each stage is a program of its own, which writes its files into `--out` as it goes: what is done is kept, whatever
happens next. A stage is skipped if less time is left than it needs for a first result, stopped when the budget is
spent (`cut short`), and failed if it takes three times its estimate. A failure does not stop the stages after it.
gpu.json and gpu.md, written after each stage, say what became of it; gpu-logs/ holds what it printed. The exit code is
1 if a stage failed; skipped ones and those cut short are named.

The estimates are for an H200 with 16 cores: steps as modelled in results/step-model.md, and compilation, which takes
most of the time. It works in a Python that has nothing of this repository installed: the kernels are built if they are
not, and the wheels in `--wheels` (see `make bench-wheels`) are unpacked into build/.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

BEGIN = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("kernels", "engine")]

SITE = ROOT / "build/site"  # the unpacked wheels
LIBRARY = ROOT / "kernels/jepa_kernels/_C.abi3.so"
PUBLISHED = "the published code's contenders are left out: no --checkout"
TAIL = 15  # lines of a failed stage's log that are printed


@dataclass(frozen=True)
class Stage:
    """`seconds`: estimated; `least`: not begun with less left. Paths are relative to the root of the repository."""

    name: str
    what: str
    command: tuple[str, ...]
    seconds: int
    least: int


class Update(NamedTuple):
    stage: Stage
    outcome: str
    """ok, failed, cut short or skipped"""
    seconds: float
    said: str
    """The last line that it printed, or why it did not run."""


def tests_on_a_gpu() -> list[str]:
    """The files with them: others would be imported only to be deselected. The loader's need DALI and Pillow."""
    files = [
        path
        for path in ROOT.glob("tests/*/test_*.py")
        if path.parent.name != "data" and re.search(r"from numerics import|mark\.gpu", path.read_text())
    ]
    return [
        str(path.relative_to(ROOT)) for path in sorted(files, key=lambda path: (path.parent.name != "kernels", path))
    ]


def stages(args: argparse.Namespace, build: bool = False) -> list[Stage]:
    """All of them, in order of worth. `build`: the CPU kernels, which sample the masks, have to be built first."""
    found = []
    if args.wheels.is_dir():
        pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade")
        files = map(str, sorted(args.wheels.glob("*.whl")))
        found.append(Stage("packages", f"unpacks {args.wheels}", (*pip, "--target", str(SITE), *files), 10, 5))
    if build:
        found.append(Stage("build", "compiles csrc", ("setup.py", "-q", "build_ext", "--inplace"), 60, 30))
    workers = ("--numprocesses", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
    tests = tests_on_a_gpu()
    alone = argparse.Namespace(**vars(args) | {"checkout": None})  # the published code has no C-JEPA
    found += [
        Stage("tests", "every numeric test that uses a GPU", ("-m", "pytest", "-m", "gpu", *workers, *tests), 90, 30),
        kernels("vit_huge_14", args, 120),
        step("H/14", "in1k_vith14_ep300_ijepa", args, 150),
        blocks("vit_huge_14", args, 50),
        levers("H/14", "in1k_vith14_ep300_ijepa", args, 200),
        step("B/16", "in1k_vitb16_ep600_ijepa", args, 90),
        step("L/16", "in1k_vitl16_ep600_ijepa", args, 110),
        step("H/14, C-JEPA", "in1k_vith14_ep300_cjepa", alone, 70),
        kernels("vit_base_16", args, 100),
        blocks("vit_large_16", args, 45),
        blocks("vit_giant_16", args, 45),
        levers("B/16", "in1k_vitb16_ep600_ijepa", args, 120),
    ]
    return found


def kernels(size: str, args: argparse.Namespace, seconds: int) -> Stage:
    command = ("benchmarks/kernels.py", "--device", "cuda", "--size", size, "--seconds", "0.2", "--out", str(args.out))
    return Stage(f"kernels, {size}", "each op against its competitors", command, seconds, 30)


def blocks(model: str, args: argparse.Namespace, seconds: int) -> Stage:
    command = ("benchmarks/blocks.py", "--device", "cuda", "--model", model, "--seconds", "0.2", "--out", str(args.out))
    return Stage(f"blocks, {model}", "attention by backend, what lies between the products", command, seconds, 25)


def throughput(config: str, out: Path, *more: str) -> tuple[str, ...]:
    given = ("--device", "cuda", "engine.global_batch_size=null", "data.root_path=images")
    return ("benchmarks/throughput.py", "--config", f"engine/configs/{config}.yaml", *given, "--out", str(out), *more)


def step(name: str, config: str, args: argparse.Namespace, seconds: int) -> Stage:
    against = (f"reference={args.checkout}", "--reference-sdpa", "--reference-compile")
    more = ("--steps", "20", "--block", "5", *(("--against", *against) if args.checkout else ()))
    what = "the engine's step, beside the published code, eager and with SDPA and torch.compile"
    what = what if args.checkout else what.partition(",")[0]
    command = throughput(config, args.out / f"throughput-cuda-{config}", *more)
    return Stage(f"step, {name}", what, command, seconds, 60)


def levers(name: str, config: str, args: argparse.Namespace, seconds: int) -> Stage:
    more = ("--steps", "6", "--block", "3", "--warmup", "3", "--without", "all", "--with", "all")
    command = throughput(config, args.out / f"levers-cuda-{config}", *more)
    return Stage(f"levers, {name}", "what each lever is worth", command, seconds, 60)


def tiny(stage: Stage) -> Stage:
    """The same stage in seconds, to try the plan: its figures mean nothing."""
    command = stage.command
    if stage.name == "tests":
        command = ("-m", "pytest", "-m", "gpu", "tests/kernels/test_gather.py", "-k", "any_strides")
    elif stage.name.startswith("kernels"):
        command += ("--size", "vit_tiny_16", "--batch", "2", "--seconds", "0", "--op", "gather", "ema")
    elif stage.name.startswith("blocks"):
        command += ("--model", "vit_tiny_16", "--batch", "2", "--seconds", "0")
    elif stage.name.startswith(("step", "levers")):
        few = iter(("kernels", "packed"))
        command = tuple(next(few) if word == "all" else word for word in command)
        command += ("meta.model_name=vit_tiny", "meta.pred_depth=2", "data.batch_size=2")
        command += ("--steps", "2", "--block", "1", "--warmup", "2")
    return replace(stage, command=command)


def environment() -> dict[str, str]:
    """In which the stages run: the repository's own packages first, then the unpacked wheels."""
    paths = [str(ROOT / "kernels"), str(ROOT / "engine"), str(SITE), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def carry_out(stage: Stage, left: float, log: Path) -> Update:
    """Runs one stage, if it fits into the `left` seconds of the budget."""
    if left < stage.least:
        return Update(stage, "skipped", 0, f"{max(0, left):.0f} s left, it needs {stage.least}")
    log.parent.mkdir(parents=True, exist_ok=True)
    begin, limit = time.monotonic(), min(left, 3 * stage.seconds)
    with log.open("w") as out, running(stage, out) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
    seconds, text = time.monotonic() - begin, log.read_text(errors="replace")
    said = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "printed nothing")
    if code is None:
        outcome = "cut short" if limit == left else "failed"
        return Update(stage, outcome, seconds, f"stopped after {limit:.0f} s: {said}")
    return Update(stage, "failed" if code else "ok", seconds, said)


@contextlib.contextmanager
def running(stage: Stage, out: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The stage's process, which is ended at the end, with all that it started."""
    given = {"stdout": out, "stderr": subprocess.STDOUT, "env": environment(), "cwd": ROOT}
    process = subprocess.Popen([sys.executable, *stage.command], start_new_session=True, **given)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(outcomes: list[Update]) -> str:
    lines = ["| stage | outcome | s | estimate | |", "|---|---|---|---|---|"]
    for stage, outcome, seconds, said in outcomes:
        said = said.replace("|", "/")
        lines.append(f"| {stage.name} | {outcome} | {seconds:.0f} | {stage.seconds} | {said[:150]} |")
    return "\n".join(lines)


def write(out: Path, about: dict[str, Any], outcomes: list[Update]) -> str:
    """Writes what became of the stages so far; returns it as text."""
    rows = [
        {"stage": s.name, "command": relative(s.command), "estimate": s.seconds, "outcome": outcome} | {
            "seconds": seconds, "said": said
        }
        for s, outcome, seconds, said in outcomes
    ]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    driver = f", driver {about['driver']}" if about["driver"] else ""
    lines = [f"{about['hardware']}{driver}; {versions}; commit {about['commit']}", f"`{about['command']}`"]
    lines += ["", table(outcomes), *(["", about["left out"]] if about["left out"] else [])]
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(about | {"stages": rows}, indent=1) + "\n")
    (out / "gpu.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def relative(command: tuple[str, ...]) -> str:
    """A stage's command line, to be run in the root of the repository. Where a checkout lies is of no interest."""
    words = (w if not w.startswith("reference=") else "reference=CHECKOUT" for w in command)
    return " ".join(["python", *words]).replace(f"{ROOT}/", "")


def run(plan: list[Stage], out: Path, budget: float, about: dict[str, Any]) -> int:
    """Carries out the stages in order, within `budget` seconds from the start of this process. The exit code."""
    outcomes: list[Update] = []
    for number, stage in enumerate(plan):
        left = budget - (time.monotonic() - BEGIN)
        log = out / f"gpu-logs/{number:02}-{stage.name.replace(', ', '-').replace('/', '')}.log"
        print(f"{stage.name}: {stage.what}, about {stage.seconds} s of {left:.0f} s left", flush=True)
        outcomes.append(carry_out(stage, left, log))
        _, outcome, seconds, said = outcomes[-1]
        if outcome == "failed":
            print("\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-TAIL:]))
        print(f"{stage.name}: {outcome}, {seconds:.0f} s: {said[:200]}", flush=True)
        text = write(out, about, outcomes)
    print(f"\n{text}")
    return int(any(outcome.outcome == "failed" for outcome in outcomes))


def loads(torch: Any) -> bool:
    """Whether the library of CPU kernels, perhaps built on another machine, loads on this one."""
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=600, help="seconds, for everything (default: %(default)s)")
    parser.add_argument("--checkout", type=Path, help="of facebookresearch/ijepa, to be timed beside the engine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="default: %(default)s")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="used if there (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="print the stages and run nothing")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only stages with one of these words in their names")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the plan: figures that mean nothing")
    args = parser.parse_args()
    args.out, args.wheels = args.out.resolve(), args.wheels.resolve()
    if args.checkout:
        args.checkout = args.checkout.expanduser().resolve()
        if not (args.checkout / "src/models").is_dir():
            parser.error(f"--checkout {args.checkout}: not a checkout of facebookresearch/ijepa (no src/models)")
    build = not LIBRARY.exists()
    if not args.plan:
        import torch  # takes seconds, which --plan need not wait for

        build = build or not loads(torch)
    chosen = (stage for stage in stages(args, build) if not args.only or any(word in stage.name for word in args.only))
    plan = [tiny(stage) if args.quick else stage for stage in chosen]
    if args.plan:
        for stage in plan:
            print(f"{stage.name}: {stage.what}; about {stage.seconds} s, not begun with less than {stage.least} left")
            print(f"    {relative(stage.command)}")
        print(f"about {sum(stage.seconds for stage in plan)} s in all, budget {args.budget:.0f} s")
        return 0
    from machine import provenance

    from jepa.ranks.device import choose

    try:
        device = choose("cuda")
    except ValueError as error:
        print(f"benchmarks/gpu.py: {error}", file=sys.stderr)
        return 2
    about = provenance(device) | {"budget": args.budget, "left out": None if args.checkout else PUBLISHED}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage's processes are ended too
    return run(plan, args.out, args.budget, about)


if __name__ == "__main__":
    sys.exit(main())
