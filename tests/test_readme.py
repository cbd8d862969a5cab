"""The README's kernel snippets, run as a reader would: top to bottom, in one session."""

import re
from pathlib import Path

import jepa_kernels

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_snippets_run_and_show_every_op():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    session: dict[str, object] = {}
    for block in blocks:
        if "from jepa_kernels import" in block:
            exec(compile(block, str(README), "exec"), session)
    assert set(jepa_kernels.__all__) <= session.keys()
