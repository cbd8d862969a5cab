"""The pages of the documentation as data: the commands that a reader types, what they are said to print, and links.

A command stands in an `sh` block. A comment at its end that begins with `needs` says what a machine may lack: then it
is not run. One that says `exit code N` says how it ends. A `text` block is what the commands of the `sh` block before
it print, in part. A `yaml` block that begins with a comment `# NAME.yaml` is that file.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md")))
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


class Command(NamedTuple):
    """`text`: one line, as typed, without its comment. `needs`: what it says that it needs, or nothing."""

    page: str
    text: str
    needs: str
    prints: tuple[str, ...]
    """The lines of the `text` block behind its own block."""
    code: int = 0
    """Its exit code."""

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


class Fence(NamedTuple):
    kind: str
    lines: list[str]


def fences(text: str) -> Iterator[Fence]:
    for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Fence(kind, body.splitlines())


def prose(text: str) -> str:
    """What is outside of fences."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(path: Path) -> Iterator[Command]:
    name = str(path.relative_to(ROOT))
    every = list(fences(path.read_text()))
    for at, fence in enumerate(every):
        if fence.kind != "sh":
            continue
        behind = every[at + 1] if at + 1 < len(every) and every[at + 1].kind == "text" else Fence("", [])
        for line in "\n".join(fence.lines).replace("\\\n", " ").splitlines():
            text, _, comment = re.split(r"(\s# |$)", line, maxsplit=1)[:3]
            needs = re.match(r"\s*needs (.*)", comment)
            code = re.search(r"exit code (\d+)", comment)
            yield Command(
                name,
                " ".join(text.split()),
                needs[1] if needs else "",
                tuple(behind.lines),
                int(code[1]) if code else 0,
            )


def files(path: Path) -> dict[str, str]:
    """The files that a page has its reader write, by name."""
    found = {}
    for fence in fences(path.read_text()):
        if fence.kind == "yaml" and (named := re.match(r"# (\S+\.yaml)$", fence.lines[0])):
            found[named[1]] = "\n".join(fence.lines) + "\n"
    return found


def not_printed(documented: Sequence[str], printed: str) -> list[str]:
    """The documented lines of which no line has all the words in this order, whatever their numbers are."""
    shapes = {shape(line) for line in printed.splitlines()}
    return [line for line in documented if shape(line) not in shapes]


def shape(line: str) -> str:
    """A line without its numbers, and without how its columns are aligned."""
    return " ".join(re.sub(rf"(?<![\w.]){NUMBER}", "0", line).split())


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(path.read_text()), re.MULTILINE)}


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """The files that a page links to, and the anchor in each; links to other sites are left out."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if not re.match(r"https?:", target):
            file, _, anchor = target.partition("#")
            yield (path.parent / file).resolve() if file else path, anchor
