"""Says whether this machine and what is installed can train, what will be used, and what to do about what is wrong.

    python engine/doctor.py                                   a minute at most
    python engine/doctor.py --data PATH [--list FILE.txt]     looks at every image of a data set instead

Every line is ok, note (worth knowing) or wrong, with the cure. A scan reads and decodes all images on all cores, goes
on after an interruption, and then knows which cannot be read and which are the same; --list writes the others to a list
that data.root_path takes. --json prints the same for programs, --debug also all that the parts print.

Exit codes: 0 nothing is wrong, 1 something is, 2 the command cannot be understood, 130 interrupted.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from jepa.ranks import machine
from jepa.ranks.machine import Finding, contained
from jepa.ranks.program import Parser, run_program
from jepa.ranks.terminal import require_shown

ENGINE = Path(__file__).resolve().parent
SECONDS = 60  # for all parts together, on a machine that does nothing else
WIDTH = 120
PARTS = {
    "packages": "what is installed",
    "kernels": "the kernels against their references",
    "step": "a training step",
    "jpeg": "a JPEG",
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "OMPI_", "PMI_", "PMIX_", "TORCHELASTIC_")
SHOWN = 5  # names of each kind; --json has all


def examine(device: str, debug: bool) -> Iterator[Finding]:
    """The machine first, in this process; then the parts, each in a process of its own, all at the same time."""
    children = {part: start(part, device, debug) for part in PARTS}
    try:
        for name, check in (
            ("system", machine.system),
            ("processor", machine.processor),
            ("Python", machine.python),
            ("open files", machine.open_files),
        ):
            yield from contained(name, check)
        busy = os.getloadavg()[0] / len(os.sched_getaffinity(0))
        end = time.monotonic() + SECONDS * min(10.0, max(1.0, busy))
        for part, child in children.items():
            yield from results(part, child, end)
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def start(part: str, device: str, debug: bool) -> subprocess.Popen[str]:
    """A process that looks at one part: one that hangs or crashes takes nothing else with it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    words = [
        sys.executable,
        "-X",
        "faulthandler",
        str(ENGINE / "doctor.py"),
        "--part",
        part,
        "--device",
        device,
        *["--debug"] * debug,
    ]
    said = None if debug else subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=said, text=True, errors="replace")


def results(part: str, child: subprocess.Popen[str], end: float) -> Iterator[Finding]:
    """What a part's process found, and how it ended, if not well."""
    try:
        found, said = child.communicate(timeout=max(1.0, end - time.monotonic()))
        how = None if child.returncode == 0 else ending(child.returncode)
    except subprocess.TimeoutExpired:
        child.kill()
        found, said = child.communicate()
        how = "did not end in time"
    last = part
    for line in found.splitlines():
        try:
            finding = Finding(*json.loads(line))
        except (ValueError, TypeError):
            continue
        last = finding.name
        yield finding
    if how:
        lines = (said or "").strip().splitlines() or [""]
        frames = (
            [line for line in lines if line.startswith('  File "')] if child.returncode < 0 else []
        )  # faulthandler's
        reason = (frames or lines[-1:])[0].strip()[:160]
        after = "" if last == part else f" (after: {last})"
        cure = "what is checked next after that line is broken, or the machine is overloaded; --debug shows all of it"
        yield Finding(
            "wrong", part, f"{PARTS[part]}: its process {how}{after}" + (f": {reason}" if reason else ""), cure
        )


def ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def be_part(part: str, device: str, debug: bool) -> NoReturn:
    """In a part's own process: prints its findings, a JSON list a line. What else is printed goes to stderr."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def check() -> Iterable[Finding]:
        if part == "packages":
            from jepa.train.packages import examine as look
        else:
            from jepa.train.selftest import PARTS as TESTS

            look = TESTS[part]
        return shown(look(device)) if debug else look(device)

    for finding in contained(part, check):
        print(json.dumps(finding), file=lines, flush=True)
    os._exit(0)  # what is imported may take long to end, or crash


def shown(findings: Iterable[Finding]) -> Iterator[Finding]:
    """With a traceback of what ends them."""
    try:
        yield from findings
    except Exception:
        traceback.print_exc()
        raise


def open_data(args: argparse.Namespace) -> Any:
    """The images of --data. Raises ValueError if there are none, or none that --list can name."""
    from jepa.data import scan
    from jepa.data.sources import open_images

    source = open_images(args.data)
    if args.list:
        scan.refuse_tars(source)
    return source


def look_at_data(args: argparse.Namespace, source: Any) -> tuple[list[Finding], dict[str, Any]]:
    """The scan of a data set: what is said, and everything that was counted."""
    from tqdm import tqdm

    from jepa.data import scan

    kept = kept_file(args.data)
    if args.fresh:
        kept.unlink(missing_ok=True)
    workers = args.workers or min(16, len(os.sched_getaffinity(0)))
    with tqdm(total=len(source), unit=" images", disable=None, smoothing=0.02) as bar:
        found = scan.scan(source, kept, workers, bar)
    counts = scan.count(source, found)
    lines = list(summary(counts))
    if args.list:
        unnamed = scan.write_list(args.list, source, found)
        said = f"{counts['usable'] - len(unnamed)} images in {args.list}; train with data.root_path={args.list}"
        lines.append(Finding("ok", "list", said))
        if unnamed:
            said = f"{len(unnamed)} names have a tab or a line break, which a list cannot hold, such as {unnamed[0]!r}"
            lines.append(Finding("note", "list", said, "rename them, and scan again"))
    return lines, counts


def kept_file(data: str) -> Path:
    """Where the scan of `data` is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(os.path.abspath(os.path.expanduser(data)))).hexdigest()[:16]
    return cache / "jepa-scan" / f"{name}.jsonl"


def summary(counts: dict[str, Any]) -> Iterator[Finding]:
    def of(kind: str) -> str:
        return ", ".join(f"{number} {name}" for name, number in counts[kind].items())

    def some(names: Iterable[str]) -> tuple[str, ...]:
        first = list(names)
        more = [f"and {len(first) - SHOWN} more: --json has all"] if len(first) > SHOWN else []
        return (*first[:SHOWN], *more)

    size = f"{counts['bytes'] / 2**30:.2f} GiB" if counts["bytes"] > 2**28 else f"{counts['bytes'] / 2**20:.1f} MiB"
    classes = f", {counts['classes']} classes" if counts["classes"] else ", no classes"
    yield Finding("ok", "images", f"{counts['images']} of {counts['path']}, {size}{classes}")
    if counts["decoder"] != "DALI":
        said = "DALI cannot be imported: Pillow decoded, which may judge differently"
        yield Finding("note", "decoder", said, "engine/doctor.py without --data says how to get it")
    if counts["formats"]:
        low, middle, high = counts["shorter side"]
        yield Finding("ok", "formats", f"{of('formats')}; {of('modes')}")
        yield Finding("ok", "shorter side", f"{low} to {high} pixels, median {middle}")
    if unreadable := counts["unreadable"]:
        cure = "remove or replace them, or train on --list FILE.txt without them"
        names = some(f"{name}: {why}" for name, why in unreadable.items())
        yield Finding("wrong", "unreadable", f"{len(unreadable)} cannot be used", cure, names)
    if copies := counts["copies"]:
        apart = len(counts["copies in another class"])
        said = f"{len(copies)} have the bytes of another" + (f", {apart} of them in another class" if apart else "")
        names = some(f"{name} = {first}" for name, first in copies.items())
        yield Finding("note", "copies", said, "--list FILE.txt keeps the first of each", names)
    if not unreadable and not copies:
        yield Finding("ok", "all of them", "can be decoded, and no two have the same bytes")


def show(findings: Iterable[Finding]) -> list[Finding]:
    """Prints each as it comes."""
    kept = []
    for finding in findings:
        kept.append(finding)
        head = f"{finding.level:<6} {finding.name:<13} "
        lines = textwrap.wrap(head + finding.says, WIDTH, subsequent_indent=" " * len(head), break_on_hyphens=False)
        lines += [" " * len(head) + detail for detail in finding.details]
        lines += [" " * len(head) + "-> " + finding.cure] if finding.cure else []
        print("\n".join(lines), flush=True)
    return kept


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="to test (default: %(default)s)"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="scan what data.root_path would be given: a folder, list or tars"
    )
    parser.add_argument("--list", type=Path, metavar="FILE.txt", help="write the usable images of --data to this list")
    parser.add_argument("--workers", type=int, metavar="N", help="processes of a scan (default: cores, at most 16)")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier scan of the same --data has seen")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list and not args.data:
        parser.error("--list needs --data PATH, whose images it lists")
    if args.list and args.list.suffix != ".txt":
        parser.error(f"--list: given {args.list}; wanted a name that ends in .txt, as data.root_path takes it")
    if args.list and not args.list.absolute().parent.is_dir():
        parser.error(f"--list: given {args.list}, but there is no folder {args.list.absolute().parent}; make it first")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers: given {args.workers}; wanted 1 or more")
    return args


class Senseless(ValueError):
    """A command that cannot be followed."""

    exit_code = 2


def work() -> int:
    args = arguments()
    if args.part:
        be_part(args.part, args.device, args.debug)
    print_now: Callable[[Iterable[Finding]], list[Finding]] = list if args.json else show
    counts: dict[str, Any] = {}
    if args.data:
        try:
            source = open_data(args)
        except ValueError as error:
            raise Senseless(str(error)) from error
        try:
            found, counts = look_at_data(args, source)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt("interrupted; the same command goes on") from stop
        found = print_now(found)
    else:
        found = print_now(examine(args.device, args.debug))
    wrong = [finding.name for finding in found if finding.level == "wrong"]
    if args.json:
        rows = [finding._asdict() for finding in found]
        print(json.dumps({"wrong": wrong, "findings": rows} | ({"data": counts} if args.data else {}), indent=2))
    else:
        print(f"wrong: {', '.join(wrong)}" if wrong else "nothing is wrong")
    require_shown()
    return 1 if wrong else 0


def main() -> int:
    # Any exception: a package that the scan needs is broken, the storage fails, the disk is full.
    return run_program(work, Exception)


if __name__ == "__main__":
    sys.exit(main())
