"""The README's snippets of the kernels, run as a reader would: top to bottom, in one session."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import jepa_kernels

README = Path(__file__).resolve().parents[1] / "README.md"


def commented_shapes(snippet: str) -> Iterator[tuple[str, str]]:
    """The names that a snippet assigns, and what the comment behind the assignment says of each: `[B, D]` or scalar."""
    lines = snippet.splitlines()
    for node in ast.parse(snippet).body:
        if isinstance(node, ast.Assign) and node.end_lineno is not None:
            comment = lines[node.end_lineno - 1].partition("  # ")[2]
            shapes = re.findall(r"scalar(?!s)|\[[^\]]*\]", comment) if comment[:1] in "[s" else []
            names = [ast.unparse(name) for name in getattr(node.targets[0], "elts", node.targets)]
            yield from zip(names, shapes, strict=True) if shapes else ()


def test_the_snippets_run_and_show_every_op():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    session: dict[str, object] = {}
    checked = []
    for block in blocks:
        if "from jepa_kernels import" in block:
            exec(compile(block, str(README), "exec"), session)
            for name, shape in commented_shapes(block):
                wanted = () if shape == "scalar" else tuple(eval(shape, dict(session)))
                assert tuple(session[name].shape) == wanted, f"{name}: the README says {shape}"
                checked.append(name)
    assert set(jepa_kernels.__all__) <= session.keys()
    assert {"y", "rows", "tokens", "loss", "block_losses"} <= set(checked)
