"""Configs in several files: what they say together, which file an error names, and what is refused."""

import itertools
import json
import os
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jepa.config.file import load_config, parse_config
from jepa.config.read import MAX_FILES
from jepa.config.schema import ConfigError
from small import MAPPING

# Keys whose values do not depend on one another's, and makers of such values.
VALUES: dict[str, Callable[[], Any]] = {
    "data.mean": lambda: [random.random() for _ in range(3)],
    "data.num_workers": lambda: random.randint(1, 99),
    "engine.seed": lambda: random.randrange(2**63),
    "engine.skip_unread": lambda: random.random() < 0.5,
    "eval.max_images": lambda: random.choice([None, random.randint(1, 99)]),
    "logging.wandb": lambda: random.choice([None, "one", "two"]),
    "loss.projector": lambda: random.choice([None, [8], [16, 8]]),
    "optimization.lr": lambda: random.random(),
}


def nested(said: dict[str, Any]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in said.items():
        section, key = name.split(".")
        mapping.setdefault(section, {})[key] = value
    return mapping


def write_chain(folder: Path, bodies: list[dict[str, Any]]) -> list[Path]:
    """Each body in a file of some folder, based on the next by a relative or absolute path, or one from $HOME."""
    files = [
        folder / random.choice(["", "here", "here/below", "there"]) / f"{random.randrange(10**9)}.yaml" for _ in bodies
    ]
    for file, body, base in zip(files, bodies, [*files[1:], None], strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        if base:
            spelt = [os.path.relpath(base, file.parent), str(base), f"~/{base.relative_to(folder)}"]
            body = {"base": random.choice(spelt), **body}
        file.write_text(yaml.safe_dump(dict(random.sample(list(body.items()), len(body)))))
    return files


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("count", [*range(1, MAX_FILES + 1)] * 3)
def test_the_nearest_file_wins_key_by_key_and_the_command_line_last(count: int, home: Path) -> None:
    said = [{name: VALUES[name]() for name in random.sample([*VALUES], random.randint(0, 5))} for _ in range(count)]
    bodies: list[dict[str, Any]] = [nested(keys) for keys in said]
    bodies[random.randrange(count)].setdefault("eval", None)  # a section without keys changes nothing
    bodies[-1] = {name: {**MAPPING.get(name, {}), **(bodies[-1].get(name) or {})} for name in {**MAPPING, **bodies[-1]}}
    files = write_chain(home, bodies)

    wanted = {f"{section}.{key}": value for section, body in MAPPING.items() for key, value in body.items()}
    for keys in reversed(said):
        wanted.update(keys)
    assert load_config(files[0]) == parse_config(nested(wanted))
    name = random.choice([*VALUES])
    value = VALUES[name]()
    assert load_config(files[0], [f"{name}={json.dumps(value)}"]) == parse_config(nested({**wanted, name: value}))


BAD = {
    "data.batch_size": -1,
    "data.mean": [0.5, 2, 0.5],
    "mask.patch_size": 7,  # does not divide the crop's size
    "optimization.lr": "fast",
    "optimization.leraning_rate": 0.1,
    "optim.lr": 0.1,
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("at", range(4))
def test_an_error_names_the_base_that_its_key_stands_in(name: str, at: int, home: Path) -> None:
    bodies: list[dict[str, Any]] = [{}, {}, {}, dict(MAPPING)]
    section, key = name.split(".")
    bodies[at] = {**bodies[at], section: {**bodies[at].get(section, {}), key: BAD[name]}}
    files = write_chain(home, bodies)
    with pytest.raises(ConfigError) as caught:
        load_config(files[0])
    (problem,) = caught.value.problems
    assert problem.startswith(name) and str(caught.value).startswith(f"{files[0]} is invalid")
    place = re.search(r" \(in (.*)\)$", problem)
    if at:
        assert place and Path(place[1]).expanduser().samefile(files[at])
    else:
        assert not place

    with pytest.raises(ConfigError) as caught:
        load_config(files[0], [f"{name}=[-3]"])
    assert " (in " not in str(caught.value)


@pytest.mark.parametrize("nearest", [True, False])
def test_what_is_no_section_is_refused_wherever_it_stands(nearest: bool, home: Path) -> None:
    other = {**MAPPING, "data": 5}
    files = write_chain(home, [other, MAPPING] if nearest else [MAPPING, other])
    with pytest.raises(ConfigError) as caught:
        load_config(files[0])
    (problem,) = caught.value.problems
    assert problem.startswith("data = 5: must be a mapping of keys to values")
    assert problem.endswith(")") != nearest


def refused(file: Path, names: list[str]) -> str:
    """Loads the file and returns the one problem, which must be blamed on a chain of these files."""
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    (problem,) = caught.value.problems
    source = str(caught.value).splitlines()[0].removesuffix(" is invalid:")
    assert [Path(part).name for part in source.split(" -> ")] == names
    return problem


@pytest.mark.parametrize("length", range(1, 5))
@pytest.mark.parametrize("linked", [True, False])
def test_a_cycle_is_refused(length: int, linked: bool, tmp_path: Path) -> None:
    names = [f"{i}.yaml" for i in range(6)]
    for name, base in zip(names, [*names[1:], names[6 - length]], strict=True):
        (tmp_path / name).write_text(f"base: {base}")
    if linked:
        (tmp_path / "link.yaml").symlink_to(names[6 - length])
        (tmp_path / names[-1]).write_text("base: link.yaml")
    assert "leads back" in refused(tmp_path / names[0], names)


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    names = [f"{i}.yaml" for i in range(MAX_FILES + 1)]
    for name, base in itertools.pairwise(names):
        (tmp_path / name).write_text(f"base: {base}")
    (tmp_path / names[-1]).write_text(yaml.safe_dump(MAPPING))
    assert f"may be {MAX_FILES} files" in refused(tmp_path / names[0], names[:-1])
    assert load_config(tmp_path / names[1]) == parse_config(MAPPING)


@pytest.mark.parametrize(
    "base",
    [None, 5, True, [], ["a.yaml"], {"a": "a.yaml"}, "", "a", "a.txt", "/etc/passwd", "/dev/stdin", "a\nb.yaml",
     "a\0.yaml", "a" * 10**5 + ".yaml"],
)  # fmt: skip
def test_what_cannot_be_a_base(base: object, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"base": base, **MAPPING}))
    problem = refused(tmp_path / "config.yaml", ["config.yaml"])
    assert problem.startswith("base = ") and "must be the path of a .yaml file" in problem and len(problem) < 200


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        ("folder", "no such file"),
        ("pipe", "no such file"),
        (b"", "is empty"),
        (b"[1, 2]", "holds a YAML list"),
        (b"word", "holds a YAML str"),
        (b"a: 1\nb: [", "is not YAML: line 2, column"),
        (b"a: 1\na: 2", "the key 'a' is given twice"),
        (b"\xff\xfe\x80\x81", "is not a text file"),
        (b"#" * 2**20, "characters or more"),
    ],
)
def test_a_base_that_is_no_config(content: bytes | str | None, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("base: middle.yaml")
    (tmp_path / "middle.yaml").write_text("base: ./base.yaml")
    if content == "folder":
        (tmp_path / "base.yaml").mkdir()
    elif content == "pipe":
        os.mkfifo(tmp_path / "base.yaml")
    elif isinstance(content, bytes):
        (tmp_path / "base.yaml").write_bytes(content)
    assert reason in refused(tmp_path / "config.yaml", ["config.yaml", "middle.yaml", "base.yaml"])


@pytest.mark.parametrize(
    "text",
    ["{}", "- {}", "password: {}", "data: {}", "a: {}\n b: [{}", "'{}", "{}\n{}\n", "x: [1, {}\ny: 2", "a: {}: b"],
)
def test_errors_do_not_quote_a_base(text: str, tmp_path: Path) -> None:
    secret = "".join(random.choices(string.ascii_letters, k=64))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"base": "secret.yaml", **MAPPING}))
    (tmp_path / "secret.yaml").write_text(text.replace("{}", secret))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml")
    assert "secret.yaml" in str(caught.value) and secret not in str(caught.value)
