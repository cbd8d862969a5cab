"""The documentation's snippets of the kernels, run as a reader would: each page top to bottom, in one session."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jepa_kernels

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/kernels.md", "kernels/README.md")


def commented_shapes(snippet: str) -> Iterator[tuple[str, str]]:
    """The names that a snippet assigns, and what the comment behind the assignment says of each: `[B, D]` or scalar."""
    lines = snippet.splitlines()
    for node in ast.parse(snippet).body:
        if isinstance(node, ast.Assign) and node.end_lineno is not None:
            comment = lines[node.end_lineno - 1].partition("  # ")[2]
            shapes = re.findall(r"scalar(?!s)|\[[^\]]*\]", comment) if comment[:1] in "[s" else []
            names = [ast.unparse(name) for name in getattr(node.targets[0], "elts", node.targets)]
            yield from zip(names, shapes, strict=True) if shapes else ()


def run(page: str) -> tuple[dict[str, Any], set[str]]:
    """The session, and the names whose shapes the page says."""
    session: dict[str, Any] = {}
    checked = set()
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), session)
        for name, shape in commented_shapes(block):
            wanted = () if shape == "scalar" else tuple(eval(shape, dict(session)))
            assert tuple(session[name].shape) == wanted, f"{name}: {page} says {shape}"
            checked.add(name)
    return session, checked


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page):
    run(page)


def test_the_kernels_page_shows_every_op():
    session, checked = run("docs/kernels.md")
    assert set(jepa_kernels.__all__) <= session.keys()
    assert {"y", "rows", "tokens", "loss", "block_losses"} <= checked
