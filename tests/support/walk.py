"""`make walk`: types every command of README.md and docs/ on a bare clone, and compares what they print with the pages.

    python tests/support/walk.py [--in CHECKOUT] [--pages NAME ...] [--all]

Clones the last commit into a new folder and works there, from the front page on, as a reader would: each command in a
shell, with the clone's environment once there is one. Commands that need what this machine may lack are named and left
out; so are the test suites, which are typed by .ci/run, unless --all. What a page says that a command prints must be
printed, line by line, but for numbers: both are shown, and percentages may be 15 points apart. `--in` works in a
checkout that has the environment and the demo already, and none of the pages' other runs.

Takes an hour or more on two cores. Exit code 1 if a command failed or printed something else.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pages import NUMBER, PAGES, ROOT, Command, commands, files, not_printed, shape

SUITES = ("make test", "make quick", "make test-cuda", "make test-eval")
BEFORE = {"README.md": 0, "docs/install.md": 1}  # the pages that others suppose; then by name
READERS = {"~/photos": "data/photos"}  # what a reader has, and what is drawn here in its place
DRAW = "python engine/jepa/data/synthetic.py data/reader --train 300 --val 60 && ln -sfn reader/train data/photos"
POINTS = 15.0
LAST = 12  # lines of a failed command's output that are shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in", dest="where", type=Path, metavar="CHECKOUT", help="default: a new clone")
    parser.add_argument("--pages", nargs="+", metavar="NAME", help="as health or README; default: all")
    parser.add_argument("--all", action="store_true", help="the test suites too")
    args = parser.parse_args()
    where = args.where or Path(tempfile.mkdtemp(prefix="jepa-walk-")) / "clone"
    if not args.where:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(where)], check=True)
    print(f"in {where}", flush=True)
    ordered = sorted(PAGES, key=lambda page: (BEFORE.get(str(page.relative_to(ROOT)), 2), page.name))
    wrong = []
    for page in ordered:
        if args.pages and page.stem not in args.pages:
            continue
        for name, text in files(page).items():
            (where / name).write_text(text)
        wrong += walk(page, where, args.all)
    print("\n".join(["", f"{len(wrong)} wrong:", *wrong]) if wrong else "\nall as the pages say")
    return 1 if wrong else 0


def walk(page: Path, where: Path, whole: bool) -> list[str]:
    """Types a page's commands; returns what is wrong."""
    wrong: list[str] = []
    printed: dict[tuple[str, ...], str] = {}
    for command in commands(page):
        if command.needs or (command.text in SUITES and not whole):
            print(f"left out, needs {command.needs or 'time: .ci/run'}: {command}", flush=True)
            continue
        begun = time.monotonic()
        code, output = typed(command, where)
        print(
            f"{'ok' if code == command.code else f'exit {code}'} {time.monotonic() - begun:5.0f} s  {command}",
            flush=True,
        )
        printed[command.prints] = printed.get(command.prints, "") + output
        if code != command.code:
            wrong.append(f"{command}: exit code {code}")
            print("\n".join(output.splitlines()[-LAST:]), flush=True)
    for documented, output in printed.items():
        wrong += [f"{page.name}: not printed: {line}" for line in not_printed(documented, output)]
        wrong += [f"{page.name}: {line}" for line in compare(documented, output)]
    return wrong


def typed(command: Command, where: Path) -> tuple[int, str]:
    """Its exit code and what it printed. What a reader has is drawn first."""
    text = command.text
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if (where / ".venv/bin").exists():  # what `. .venv/bin/activate` does
        environment["PATH"] = f"{where / '.venv/bin'}:{environment['PATH']}"
    for theirs, drawn in READERS.items():
        if theirs in text:
            text = text.replace(theirs, drawn)
            if not (where / drawn).exists():
                subprocess.run(DRAW, shell=True, cwd=where, env=environment, check=True)
    run = subprocess.Popen(
        ["bash", "-c", text],
        cwd=where,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    output, _ = run.communicate()
    return run.returncode, output


def compare(documented: tuple[str, ...], output: str) -> list[str]:
    """Shows the numbers of documented lines beside the printed ones; returns the percentages that are far apart. Of
    lines with the same words the n-th is compared with the n-th."""
    far: list[str] = []
    seen: dict[str, int] = {}
    lines = output.splitlines()
    for line in documented:
        same = [found for found in lines if shape(found) == shape(line)]
        at = seen[shape(line)] = seen.get(shape(line), -1) + 1
        if at >= len(same) or same[at].split() == line.split():
            continue
        print(f"    page: {line}\n    here: {same[at]}", flush=True)
        said, found = (re.findall(rf"({NUMBER}) %", text) for text in (line, same[at]))
        if any(abs(float(a) - float(b)) > POINTS for a, b in zip(said, found, strict=True)):
            far.append(f"more than {POINTS:g} points apart: {line}")
    return far


if __name__ == "__main__":
    sys.exit(main())
