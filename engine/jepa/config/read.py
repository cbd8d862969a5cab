"""Reads a config's YAML file and the files that it is based on.

`base: other.yaml` names the file that holds the rest, by its path from the file that names it. Sections merge key by
key, lists are replaced whole, and a base may have a base. Files are untrusted: only plain data of bounded size is read,
and an error about one says where it went wrong, but quotes little of it.
"""

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .conflicts import show
from .schema import ConfigError
from .words import expanded

MAX_FILES = 8  # a config and its bases
MAX_CHARACTERS = 2**18  # of a file; a complete one has about 5000
MAX_PATH = 1000  # characters of a base


class Written(NamedTuple):
    """What a config and its bases say together."""

    mapping: dict[Any, Any]
    origin: dict[str, str]
    """The base in which a section, or `section.key`, stands, if it stands in one."""


def read(path: str | Path) -> Written:
    """The sections of a file, without `base`, merged with those of its bases. Raises ConfigError."""
    files: list[Path] = []
    bodies: list[dict[Any, Any]] = []
    file = Path(path)
    while True:
        files.append(file)
        try:
            body = _sections(file, is_base=len(files) > 1)
            bodies.append(body)
            if "base" not in body:
                return _merge([str(file) for file in files], bodies)
            file = _base(body.pop("base"), files)
        except ValueError as error:
            raise ConfigError([str(error)], " -> ".join(str(file) for file in files)) from error


def parse_yaml(text: str) -> object:
    """Raises ValueError, with a short message of one line, for anything that is not YAML."""
    try:
        return yaml.load(text, _Loader)
    # PyYAML's constructors leak other exceptions, for example on `!!bool x` or a date in month 13.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        reason, mark = str(error), getattr(error, "problem_mark", None)
        if isinstance(error, yaml.MarkedYAMLError) and mark:  # str(error) would quote the line
            reason = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        reason = " ".join(reason.split())
        raise ValueError(reason if len(reason) < 200 else f"{reason[:200]}...") from error


def _sections(file: Path, is_base: bool) -> dict[Any, Any]:
    """The file's own sections and `base`. Raises ValueError."""
    try:
        if is_base and not file.is_file():  # opening a pipe would wait for its writer
            raise ValueError("is a base, but there is no such file")
        with file.open(encoding="utf-8") as stream:
            text = stream.read(MAX_CHARACTERS)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except UnicodeError as error:
        raise ValueError(f"is not a text file: {error}") from error
    if len(text) == MAX_CHARACTERS:
        raise ValueError(f"has {MAX_CHARACTERS} characters or more; wanted fewer")
    try:
        body = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"is not YAML: {error}") from error
    if not isinstance(body, dict):
        held = "is empty" if body is None else f"holds a YAML {type(body).__name__}"
        raise ValueError(f"must map sections to their keys, but {held}")
    return body


def _base(base: object, files: list[Path]) -> Path:
    """The file that the last of `files` names as its base. Raises ValueError."""
    given = f"base = {show(base)}"
    if not (isinstance(base, str) and base.endswith((".yaml", ".yml")) and base.isprintable() and len(base) < MAX_PATH):
        raise ValueError(f"{given}: must be the path of a .yaml file, from the folder of the file that names it")
    file = files[-1].parent / expanded(base)
    if os.path.realpath(file) in map(os.path.realpath, files):
        raise ValueError(f"{given}: leads back to a file that is based on it")
    if len(files) == MAX_FILES:
        raise ValueError(f"{given}: a config and its bases may be {MAX_FILES} files, and this is one more")
    return file


def _merge(files: list[str], bodies: list[dict[Any, Any]]) -> Written:
    """Of files in order, each based on the next."""
    merged: dict[Any, Any] = {}
    origin: dict[str, str] = {}
    for file, body in zip(reversed(files), reversed(bodies), strict=True):
        for section, given in body.items():
            keys = {} if given is None else given  # YAML reads a section without keys as null
            below = merged.get(section, {})
            if not isinstance(below, dict):
                continue  # what is no section stays, to be refused
            origin[str(section)] = file
            if isinstance(keys, dict):
                keys = {**below, **keys}
                origin |= {f"{section}.{key}": file for key in given or ()}
            merged[section] = keys
    return Written(merged, {name: file for name, file in origin.items() if file != files[0]})


class _Loader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys, and merge keys (`<<`): a few nested ones would exhaust memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem="merge keys (<<) are not supported", problem_mark=key.start_mark)
        super().flatten_mapping(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    problem = f"the key {show(key)} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)
