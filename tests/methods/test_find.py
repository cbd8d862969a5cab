"""Methods are found by their file's name, and one that lacks a part is refused by name."""

import random

import pytest

from jepa import methods

PARTS = {
    "forward": "    def forward(self, views, layout, targets): ...",
    "flops": "    @classmethod\n    def flops(cls, config, kept): ...",
    "activations": "    @classmethod\n    def activations(cls, config, kept, size, ranks): ...",
}


def test_names_are_the_files():
    for name in methods.names():
        assert methods.find(name).__module__ == f"jepa.methods.{name}"
    for name in ("base", "nothing", 3, None):
        with pytest.raises(ValueError, match=", ".join(methods.names())):
            methods.find(name)


@pytest.mark.parametrize("given", range(4))
def test_a_method_that_lacks_a_part(given, tmp_path, monkeypatch):
    has = random.sample(sorted(PARTS), given)
    name = f"toy{random.getrandbits(40)}"
    body = "\n".join(PARTS[part] for part in has) or "    pass"
    file = tmp_path / f"{name}.py"
    file.write_text(f"from jepa.methods.base import Method\n\n\nclass Toy(Method):\n{body}\n")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    if given == len(PARTS):
        assert methods.find(name).__name__ == "Toy"
        return
    lacking = ", ".join(sorted(PARTS.keys() - set(has)))
    with pytest.raises(TypeError, match=f"{file}: Toy lacks {lacking}: see jepa/methods/base.py"):
        methods.find(name)
