"""README.md and docs/: every command is one that its program understands, and is run or says what it needs; links lead
somewhere; names in the text exist. `make walk` types the commands as they stand (tests/support/walk.py)."""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib

import pages
from jepa.config.file import SECTIONS
from jepa.config.schema import objectives, settings_of
from pages import PAGES, ROOT, Command

COMMANDS = [command for page in PAGES for command in pages.commands(page)]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
ELSEWHERE = {  # what takes longer than a test may, and where it runs
    "make setup": ".ci/run, before all that it does",
    "make demo": "make walk",
    "make demo DEVICE=cpu": "make walk",
    "make doctor": "tests/test_doctor.py",
    "make quick": "it is a part of make test",
    "make test": ".ci/run",
    "make test-cuda": ".ci/run",
    "make test-eval": ".ci/run",
    ". .venv/bin/activate": "it is the shell's",
}
SMALLER = {  # what the commands are run with instead, so that each takes seconds
    r"(engine/train\.py .*)": r"\1 engine.max_steps=2 data.num_workers=1",
    r"--replay-step \d+": "--replay-step 2",
    r"eval\.every=\d+": "eval.every=2",
    r"(plain_ijepa\.py) --batch 16": r"\1 --batch 2 --steps 2",
    r"(throughput\.py .*)": r"\1 --steps 2 --warmup 2 data.batch_size=8",
    r"(synthetic\.py data/demo .*)": r"\1 --train 128 --val 64",
    r"--epochs 2": "--epochs 1",
    r"--nproc_per_node 2": "--nproc_per_node 1",
}


# --- the programs behind the commands


class Program(NamedTuple):
    """A Python program, its words, and on how many ranks a launcher would start it."""

    script: str
    words: list[str]
    ranks: int = 1


def program_of(text: str) -> Program:
    """What a command starts. Launchers read their own words. Raises ValueError for a command of another kind."""
    head, *words = shlex.split(re.sub(r"^(\w+=\S+ )+", "", text))
    if head == "python":
        return Program(words[0], words[1:])
    if head == "deepspeed":
        from deepspeed.launcher.runner import fetch_hostfile, parse_args

        given = parse_args(words)
        hosts = fetch_hostfile(str(ROOT / given.hostfile)) if "--hostfile" in words else {}
        return Program(given.user_script, given.user_args, sum((hosts or {}).values()) or max(given.num_gpus, 1))
    if head == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words)
        return Program(given.training_script, given.training_script_args, int(given.nproc_per_node))
    if head == "mpirun":
        parser = argparse.ArgumentParser()
        parser.add_argument("-np", type=int)
        parser.add_argument("-x", action="append")
        parser.add_argument("rest", nargs=argparse.REMAINDER)
        given = parser.parse_args(words)
        return program_of(shlex.join(given.rest))._replace(ranks=given.np)
    if head == "sbatch":
        job = (ROOT / words[0]).read_text()
        nodes, tasks = (int(re.search(rf"--{name}=(\d+)", job)[1]) for name in ("nodes", "ntasks-per-node"))
        script, own = re.search(r'python (\S+) (.*) "\$@"', job).groups()
        return Program(script, [*own.split(), *words[1:]], nodes * tasks)
    raise ValueError(f"{head}: no program that this test knows")


@dataclass
class Checkout:
    """A copy of what the commands use, with the demo's images and a run on them, all smaller than `make demo`'s."""

    root: Path
    forks: subprocess.Popen[str]

    def run(self, program: Program) -> tuple[list[int], str]:
        """The exit codes of all ranks, and what the first one printed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": str(program.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(program.ranks)]
        outputs = [self.root / f"rank{rank}.out" for rank in range(program.ranks)]
        places = places if program.ranks > 1 else [{}]
        line = [[program.script, program.words, *one] for one in zip(places, map(str, outputs), strict=True)]
        assert self.forks.stdin and self.forks.stdout
        self.forks.stdin.write(json.dumps(line) + "\n")
        self.forks.stdin.flush()
        return json.loads(self.forks.stdout.readline()), outputs[0].read_text()

    def type(self, text: str, code: int = 0) -> str:
        """What a command prints, made smaller. It must end with 0, or with `code`."""
        for pattern, smaller in SMALLER.items():
            text = re.sub(pattern, smaller, text)
        codes, printed = self.run(program_of(os.path.expandvars(text.replace("~", str(self.root / "home")))))
        assert {*codes} <= {0, code}, f"{text}\nended with {codes}:\n{printed}"
        return printed


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("engine", "benchmarks", "docs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (root / "kernels").symlink_to(ROOT / "kernels")
    for page in PAGES:
        for name, text in pages.files(page).items():
            (root / name).write_text(text)
    removed = ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"HOME": str(root / "home"), "XDG_CACHE_HOME": str(root / "cache")}
    command, pipe = [sys.executable, str(ROOT / "tests/support/forks.py"), str(root)], subprocess.PIPE
    with subprocess.Popen(command, env=environment, cwd=root, text=True, stdin=pipe, stdout=pipe) as forks:
        made = Checkout(root, forks)
        made.type("python engine/jepa/data/synthetic.py data/demo --seed 1")
        shutil.copytree(root / "data/demo/train", root / "home/photos")
        made.type("python engine/train.py --config engine/configs/demo.yaml")
        yield made


# --- commands


def misunderstood(text: str, checkout: Checkout) -> str:
    """What is wrong with a command: unknown to make or pip, or what its program's own parser says; else nothing."""
    head, *words = shlex.split(text)
    if head == "make":
        names = [word.partition("=")[0] for word in words[1:]]
        return "" if words[0] in TARGETS and all(f"$({name})" in MAKEFILE for name in names) else "unknown to make"
    if head == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        known = words[0] == "install" and set(re.findall(r"[\w-]+", words[-1])) <= extras.keys()
        return "" if known else "unknown to pip"
    try:
        program = program_of(text)
    except SystemExit:
        return "unknown to its launcher"
    if program.script == "engine/train.py":  # it reads the whole config too
        words = [*program.words, "--dry-run", "--world-size", str(program.ranks)]
        program = program._replace(words=words, ranks=1)
    else:
        program = Program(str(ROOT / "tests/support/parses.py"), [program.script, *program.words])
    codes, printed = checkout.run(program)
    return printed if any(codes) else ""


@pytest.mark.ranks
@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if each.needs or each.text.startswith(("make ", "pip "))], ids=str
)
def test_what_is_not_run_is_understood(command: Command, checkout: Checkout) -> None:
    wrong = misunderstood(command.text, checkout)
    if command.needs == "torchvision" and "needs a package that cannot be imported" in wrong:
        pytest.skip("torchvision does not fit this torch")
    assert not wrong


@pytest.mark.ranks
def test_what_is_wrong_is_not_understood(checkout: Checkout) -> None:
    for text in (
        "make tset",
        "make demo DEVIZE=cpu",
        'pip install -e ".[egnine]"',
        "python engine/trian.py --config engine/configs/demo.yaml",
        "python engine/train.py --config engine/configs/dmeo.yaml",
        "python engine/train.py --config engine/configs/demo.yaml data.bacth_size=3",
        "python engine/train.py --config engine/configs/demo.yaml --resmue",
        "deepspeed --num_gsup 8 engine/train.py --config engine/configs/demo.yaml",
        "torchrun --nproc_per_node 3 engine/train.py --config engine/configs/in1k_vith14_ep300_ijepa.yaml",
        "python engine/evaluate.py knn runs/demo/jepa-latest --trian data/demo/train --val data/demo/val",
        "python benchmarks/memory.py --maesure",
    ):
        assert misunderstood(text, checkout), text


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_commands_run(page: Path, checkout: Checkout) -> None:
    """In the page's order. What is said to be printed is, but for numbers; of runs made shorter it is not."""
    printed: dict[tuple[str, ...], str] = {}
    shorter: set[tuple[str, ...]] = set()
    for command in pages.commands(page):
        if command.needs or command.text in ELSEWHERE:
            continue
        printed[command.prints] = printed.get(command.prints, "") + checkout.type(command.text, command.code)
        shorter |= {command.prints} if "engine/train.py" in command.text else set()
    for documented in printed.keys() - shorter:
        assert not pages.not_printed(documented, printed[documented]), printed[documented]


def test_what_runs_elsewhere_is_still_there() -> None:
    assert {command.text for command in COMMANDS} >= ELSEWHERE.keys()
    ci = (ROOT / ".ci/run").read_text()
    for text, where in ELSEWHERE.items():
        assert where != ".ci/run" or text in ci.splitlines()


def test_no_command_hides_outside_of_the_blocks() -> None:
    heads = "|".join(("make", "python3?", "deepspeed", "torchrun", "mpirun", "srun", "sbatch", "pip", "git", r"\."))
    for page in PAGES:
        hidden = re.findall(rf"^ {{4,}}(?:{heads}) .*$", pages.prose(page.read_text()), re.MULTILINE)
        kinds = {fence.kind for fence in pages.fences(page.read_text())}
        assert not hidden and kinds <= {"sh", "text", "yaml", "python", ""}, page


# --- links and names


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*/README.md"), ROOT / "CONTRIBUTING.md"], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in pages.links(page):
        assert file.exists(), file
        assert not anchor or anchor in pages.anchors(file), f"{file}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    assert {file for file, _ in pages.links(ROOT / "docs/README.md")} >= {*PAGES} - {ROOT / "docs/README.md"}


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_page_of_all_keys_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs/config.py"))["page"]
    assert (ROOT / "docs/config.md").read_text() == page(), "python docs/config.py > docs/config.md"


def keys() -> set[str]:
    sections = [*SECTIONS.items(), *(("loss", settings_of(name)) for name in objectives())]
    return {f"{section}.{key}" for section, model in sections for key in model.model_fields}


FLAGS = {flag for path in ROOT.glob("[eb]*/**/*.py") for flag in re.findall(r'"(--[a-z][a-z-]*)"', path.read_text())}
FLAGS |= {"--help", "--nproc_per_node", "--num_gpus", "--no-build-isolation", "--batch", "--steps"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_it_names_exists(page: Path) -> None:
    """Keys, options, targets of make and files, where they stand in the text as code."""
    known = keys()
    for code in re.findall(r"`([^`\n]+)`", pages.prose(page.read_text())):
        for key in re.findall(rf"(?<![\w./])((?:{'|'.join(SECTIONS)})\.[a-z]\w*)\b(?!\.)", code):
            assert key in known or (ROOT / "engine" / key).exists() or key.endswith((".yaml", ".py")), code
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
            assert flag in FLAGS, code
        if made := re.match(r"make ([\w-]+)$", code):
            assert made[1] in TARGETS, code
        for file in re.findall(r"(?<![\w.~$/])[\w-]+/[\w./-]+\.(?:py|yaml|sbatch|md)\b", code):
            assert (ROOT / file).exists(), code
