"""`make soak`: breaks real runs of engine/train.py on purpose and counts what was lost, which must be nothing.

killed     a run on two ranks, of random ZeRO stage, precision and accumulation, is killed (-9, all ranks or one of
           them) at random moments and resumed each time, and in the end stopped by a signal; its weights, moments,
           average and log are compared with those of an undisturbed run
damaged    its newest checkpoints are corrupted, truncated or deleted; the newest intact one must be found
moved      a checkpoint of every (ranks, ZeRO stage) is resumed on every one of them, in fp32 and bf16; ten losses are
           compared

python tests/support/soak.py [--kills 30] [--damage 200] [--seed N]      prints a Markdown table
"""

import argparse
import contextlib
import io
import itertools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import yaml

from jepa.config.file import load_config
from jepa.data.sources import open_images
from jepa.methods import build
from jepa.state.checkpoint import Saver
from jepa.state.restore import KINDS, CheckpointError, Reader, candidates, read_state, verify, versions
from jepa.train import zero
from processes import Run, rows, start, write_config, write_images
from small import run_ranks, whole_weights

CLOCKS = ("images_per_second", "step_ms", "data_wait_ms", "cpu_ms")
Place = tuple[int, int]
PLACES: tuple[Place, ...] = tuple(itertools.product((1, 2), (0, 1, 2, 3)))  # ranks, ZeRO stage
UNFINISHED = ".jepa-step*.partial/*"  # what a kill leaves while a checkpoint is being written
CAMPAIGNS = 5  # runs among which the kills are divided
FIRST, LOSSES = 4, 10  # steps before the move, and steps compared after it
# The largest relative error of a loss after a move. fp32: eight roundings (2^-24 each) of every gradient of ten steps;
# bf16, whose gradients are rounded before the ranks sum them: one rounding of the loss.
BOUND = {"fp32": 1e-5, "bf16": 2**-8}


def say(message: str) -> None:
    print(message, flush=True)


def whole_checkpoints(folder: Path) -> list[int]:
    """The steps of the intact checkpoints in a folder, newest first."""
    steps = []
    for _, path in candidates(folder, "jepa", 5):
        try:
            state = read_state(path)
            verify(path, state["files"])
            steps.append(state["step"])
        except (CheckpointError, OSError):
            pass
    return steps


def bytes_that_differ(one: Path, other: Path) -> int:
    """How many bytes of the fp32 weights, moments and averages of two checkpoints differ."""
    states = [read_state(path) for path in (one, other)]
    readers = [Reader(path, state) for path, state in zip((one, other), states, strict=True)]
    assert states[0]["shapes"] == states[1]["shapes"]
    wrong = 0
    for name, shape in states[0]["shapes"].items():
        for kind in KINDS:
            if kind != "ema" or name.startswith("encoder."):
                a, b = (reader.tensor(kind, name, shape).view(torch.uint8) for reader in readers)
                wrong += int((a != b).sum())
    return wrong


def kill(run: Run, folder: Path, said: re.Pattern[str], rng: random.Random) -> str:
    """Kills all ranks or one at a random moment: while the run starts, within a second after it has saved, or while it
    writes the next checkpoint.

    Always all ranks during the start: ranks that have not joined have no watchdog and wait for each other for minutes.
    """
    victim, moment = rng.choice(["all", 0, 1]), rng.choice(["starting", "any", "any", "writing", "writing"])
    if moment == "starting":
        victim = "all"
        time.sleep(rng.uniform(0, 3))
    else:
        run.wait_for(said.pattern)
    if moment == "any":
        time.sleep(rng.uniform(0, 1))
    elif moment == "writing":
        while run.ranks[0].is_alive() and not any(folder.glob(UNFINISHED)):
            pass
        time.sleep(rng.uniform(0, 0.01))
    run.signal(signal.SIGKILL, *(() if victim == "all" else (victim,)))
    run.wait(seconds=60)  # surviving ranks notice it themselves
    return f"rank {victim}" if victim != "all" else "all ranks"


def campaign(rng: random.Random) -> tuple[str, ...]:
    """The random settings of a run that is to be killed."""
    stage, bf16, accumulation = rng.randrange(4), rng.random() < 0.5, rng.choice([1, 1, 2])
    return (
        f"engine.zero_stage={stage}",
        f"meta.use_bfloat16={bf16}",
        f"engine.gradient_accumulation_steps={accumulation}",
    )


def killed(folder: Path, config: Path, kills: int, words: tuple[str, ...], rng: random.Random) -> dict[str, int]:
    """The run is much longer than needed for its kills, so that on any machine it ends only when told to."""
    run_words = ("--config", config, *words, "engine.timeout_minutes=1")
    said, lost, latest, writing = re.compile(r"saved \S+-step0*(\d+)"), 0, 0, 0
    for done in range(kills + 1):
        run = start(2, folder / "killed", *run_words, "logging.save_every=1", "--resume", "auto")
        if done < kills:
            who = kill(run, folder / "killed", said, rng)
            writing += any((folder / "killed").glob(UNFINISHED))
        else:
            run.wait_for(rf"(?s)({said.pattern}.*){{4}}")
            run.signal(signal.SIGTERM)
            assert run.wait(seconds=600) == [75, 75], run.text()
        if resumed := re.search(r"resuming from \S+ at step (\d+)", run.text()):
            lost += max(0, latest - int(resumed[1]))
        latest = max([latest, *(int(step) for step in said.findall(run.text()))])
        found = (whole_checkpoints(folder / "killed") or [0])[0]
        lost += max(0, latest - found)  # what was reported as saved is there
        latest = max(latest, found)
        if done < kills:
            say(f"kill {done + 1} of {kills}: {who}; last intact checkpoint {found}")
    undisturbed = start(2, folder / "undisturbed", *run_words, "logging.save_every=99999", f"engine.max_steps={latest}")
    assert undisturbed.wait(seconds=600) == [0, 0], undisturbed.text()
    names = ("undisturbed", "killed")
    left = [path.name for path in (folder / "killed").glob(".*")]
    assert not left, left
    jsonl, csv = zip(*(log_of(folder / name) for name in names), strict=True)
    return {
        "kills": kills,
        "writing": writing,
        "steps lost": lost,
        "bytes wrong": bytes_that_differ(*(folder / name / "jepa-latest" for name in names)),
        "log rows wrong": sum(a != b for a, b in (*itertools.zip_longest(*jsonl), *itertools.zip_longest(*csv))),
    }


def log_of(folder: Path) -> tuple[list[dict], list[str]]:
    """The rows of a run's JSONL and CSV, without the times."""
    jsonl = [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows(folder)]
    return jsonl, [line.rpartition(",")[0] for line in (folder / "jepa_r0.csv").read_text().splitlines()]


def damage(path: Path, rng: random.Random) -> None:
    """Does something to a checkpoint that disks, kills or people might do."""
    file = rng.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    what = rng.choice(["bit", "bit", "cut", "zeros", "gone", "empty", "folder", "grown", "all gone"])
    if what == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del data[place:]
    elif what == "zeros":
        data[place : place + 4096] = bytes(len(data[place : place + 4096]))
        data[0] ^= 1  # all may have been zeros already
    elif what == "empty":
        data.clear()
    elif what == "grown":
        data += rng.randbytes(rng.randint(1, 100))
    elif what == "all gone":
        shutil.rmtree(path)
        return
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what != "gone":
        file.write_bytes(data)


def resume_damaged(folder: Path, config: Path, words: tuple[str, ...], number: int, seed: int) -> dict[str, int]:
    """On one rank: damages copies of the checkpoints that `killed` left, and resumes."""
    rng, copy = random.Random(seed), folder / "copy"
    counts = dict.fromkeys(("damaged", "wrong checkpoints", "bytes wrong"), 0)
    settings = load_config(config, [*words, f"logging.folder={copy}", "data.batch_size=8"])
    model_engine = zero.start(build(settings), settings)
    wanted = []  # of the intact checkpoints, newest first: folder, step, weights
    for _, path in candidates(folder / "killed", "jepa", 5):
        state = read_state(path)
        reader = Reader(path, state)
        wanted.append(
            (path.name, state["step"], {n: reader.tensor("weight", n, s) for n, s in state["shapes"].items()})
        )
    while counts["damaged"] < number:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "killed", copy, symlinks=True)
        bad = rng.choice([1, 1, 2])
        for name, _, _ in wanted[:bad]:
            damage(copy / name, rng)
        if link_too := rng.random() < 0.3:
            (copy / "jepa-latest").unlink()
        counts["damaged"] += bad + link_too
        with contextlib.redirect_stdout(io.StringIO()):
            progress = Saver(settings, model_engine, 5, open_images(settings.data.folder).fingerprint).resume("latest")
        _, step, weights = wanted[bad]
        counts["wrong checkpoints"] += progress.step != step
        found = whole_weights(model_engine)
        for name, values in weights.items():
            counts["bytes wrong"] += int((found[name].view(torch.uint8) != values.flatten().view(torch.uint8)).sum())
    return counts


def place_words(place: Place, precision: str) -> tuple[str, ...]:
    ranks, stage = place
    return (
        f"engine.zero_stage={stage}", f"data.batch_size={8 // ranks}", f"meta.use_bfloat16={precision == 'bf16'}",
        f"engine.max_steps={FIRST + LOSSES}", f"logging.save_every={FIRST}", "logging.keep_last=99",
    )  # fmt: skip


def moved(
    folder: Path,
    config: Path,
    precision: str,
    sources: tuple[tuple[int, int], ...],
    targets: tuple[tuple[int, int], ...],
) -> dict[str, float]:
    """Resumes a checkpoint of each source (ranks, ZeRO stage) on each target and compares the next ten losses."""
    counts = {"pairs": 0, "beyond": 0, "inexact": 0, "worst": 0.0}
    for source in sources:
        whole = folder / f"{precision}-{source[0]}-{source[1]}"
        run = start(source[0], whole, "--config", config, *place_words(source, precision))
        assert set(run.wait(seconds=300)) == {0}, run.text()
        wanted = [row["loss"] for row in rows(whole)][FIRST:]
        for target in targets:
            here, checkpoint = folder / "moved", whole / f"jepa-step{FIRST:08d}"
            run = start(target[0], here, "--config", config, *place_words(target, precision), "--resume", checkpoint)
            assert set(run.wait(seconds=300)) == {0}, run.text()
            found = [row["loss"] for row in rows(here)]
            error = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
            counts["pairs"] += 1
            counts["worst"] = max(counts["worst"], error)
            counts["beyond"] += error > BOUND[precision]
            counts["inexact"] += source == target and found != wanted
            shutil.rmtree(here)
        say(f"{precision}, from {source[0]} rank(s), ZeRO-{source[1]}: a loss off by at most {counts['worst']:.1e}")
    return counts


def soak_config(folder: Path) -> Path:
    """The tests' small run, thousands of epochs long, with masks that do not depend on the number of ranks."""
    config = write_config(folder / "config.yaml", write_images(folder / "images"))
    mapping = yaml.safe_load(config.read_text())
    mapping["optimization"]["epochs"], mapping["mask"]["cut"] = 4000, "global"
    mapping["logging"]["checkpoint_freq"] = 4000
    config.write_text(yaml.safe_dump(mapping))
    return config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--damage", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.monotonic()
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = soak_config(folder)
        shares = [args.kills // CAMPAIGNS + (i < args.kills % CAMPAIGNS) for i in range(CAMPAIGNS)]
        for i, kills in enumerate(share for share in shares if share):
            say(" ".join(words := campaign(rng)))
            total.update(killed(folder / str(i), config, kills, words, rng))
        damaged = run_ranks(1, resume_damaged, folder / str(i), config, words, args.damage, rng.getrandbits(32))[0]
        moves = {precision: moved(folder, config, precision, PLACES, PLACES) for precision in BOUND}
    print_table(args.seed, time.monotonic() - began, total, damaged, moves)
    wrong = [total["steps lost"], total["bytes wrong"], total["log rows wrong"], damaged["wrong checkpoints"]]
    wrong += [damaged["bytes wrong"], *(m["beyond"] + m["inexact"] for m in moves.values())]
    return int(any(wrong))


def print_table(
    seed: int, seconds: float, kills: dict[str, int], damaged: dict[str, int], moves: dict[str, dict[str, float]]
) -> None:
    say(f"\ncommit {versions().get('commit', 'unknown')}, seed {seed}, {os.cpu_count()} cores, {seconds:.0f} s\n")
    say("| tried | times | lost or wrong |\n|---|---|---|")
    say(
        f"| `kill -9` of all ranks or one, at random moments | {kills['kills']} | {kills['steps lost']} steps, "
        f"{kills['bytes wrong']} bytes of the final state, {kills['log rows wrong']} rows of the log |"
    )
    say(f"| of these, while a checkpoint was being written | {kills['writing']} | |")
    say(
        f"| files damaged, cut short or gone | {damaged['damaged']} | {damaged['wrong checkpoints']} times not the "
        f"newest intact checkpoint, {damaged['bytes wrong']} bytes |"
    )
    for precision, move in moves.items():
        say(
            f"| moves to 1 or 2 ranks, ZeRO 0 to 3, {precision} | {move['pairs']} | {move['beyond']} with one of ten "
            f"losses off by more than {BOUND[precision]:.0e} (largest {move['worst']:.1e}), {move['inexact']} not "
            "exact on the same ranks and stage |"
        )


if __name__ == "__main__":
    sys.exit(main())
