"""Reads a config's YAML and overrides, and reports unknown keys, duplicate keys and bad values, one line per key.

Files are untrusted: only plain data of bounded size is read.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from .conflicts import show
from .schema import Config, ConfigError, Loss, objectives, settings_of

Sections = Mapping[str, type[BaseModel]]
SECTIONS = cast(dict[str, type[BaseModel]], {name: field.annotation for name, field in Config.model_fields.items()})
MAX_CHARACTERS = 2**18  # of a config's file; a complete one has about 3000


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides, whose values are YAML. Raises ConfigError."""
    source = str(path)
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS)
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror or error}"], source) from error
    except ValueError as error:
        raise ConfigError([f"is not a text file: {error}"], source) from error
    try:
        if len(text) == MAX_CHARACTERS:
            raise ValueError(f"it has {MAX_CHARACTERS} characters or more; wanted fewer")
        mapping = _parse_yaml(text)
    except ValueError as error:
        raise ConfigError([f"is not YAML: {error}"], source) from error
    return parse_config(mapping, overrides, source)


def parse_config(mapping: object, overrides: Sequence[str] = (), source: str = "config") -> Config:
    """Validates nested mappings, as YAML gives them; `source` names them in errors. Raises ConfigError."""
    if not isinstance(mapping, Mapping):
        raise ConfigError([f"must map the sections {', '.join(SECTIONS)}; got {show(mapping)}"], source)
    # YAML reads a section without keys as null.
    given = {name: {} for name in SECTIONS} | {name: {} if body is None else body for name, body in mapping.items()}
    problems = [*_override(given, overrides), *_drop_others(given, overrides), *_drop_unknown(given)]
    try:
        config = Config.model_validate(given)
    except ValidationError as error:
        problems += [line for detail in error.errors() for line in _explain(detail)]
    if problems:
        raise ConfigError(problems, source)
    return config


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
                    problem = f"the key {key} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def to_yaml(config: Config) -> str:
    """All keys with their values, as `load_config` reads them back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Block style, but lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def _parse_yaml(text: str) -> object:
    """Raises ValueError, with a one-line message, for anything that is not YAML."""
    try:
        return yaml.load(text, _Loader)
    # PyYAML's constructors leak other exceptions, for example on `!!bool x` or a date in month 13.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _override(given: dict, overrides: Sequence[str]) -> Iterator[str]:
    """Applies the overrides to `given`, copying the sections it changes, and yields the problems."""
    for override in overrides:
        name, equals, text = override.partition("=")
        section, _, key = name.strip().partition(".")
        if not (equals and section and key):
            yield f"{show(override)}: an override must have the form section.key=value"
            continue
        try:
            value = _parse_yaml(text) if text.strip() else ""
        except ValueError as error:
            yield f"{show(override)}: the value is not YAML: {error}"
            continue
        body = given.get(section, {})
        if isinstance(body, Mapping):
            given[section] = {**body, key: value}


def _drop_others(given: dict, overrides: Sequence[str]) -> Iterator[str]:
    """Removes the keys of other methods from `loss`, and yields a line for each that an override gave: one file may
    hold the settings of several methods, of which `loss.objective` chooses one."""
    body = given.get("loss")
    if not isinstance(body, Mapping):
        return
    try:
        own = settings_of(body.get("objective"))
    except ValueError:
        return
    others = set().union(*(settings_of(name).model_fields for name in objectives())) - set(own.model_fields)
    given["loss"] = {key: value for key, value in body.items() if key not in others}
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name.removeprefix("loss.") in others and name.startswith("loss."):
            keys = ", ".join(f"loss.{key}" for key in own.model_fields)
            yield f"{name}: is no setting of this loss.objective, whose settings are {keys}"


def _section_of(loss: object) -> type[BaseModel]:
    """The section `loss` of the method that it names."""
    try:
        return settings_of(loss.get("objective") if isinstance(loss, Mapping) else None)
    except ValueError:
        return Loss


def _drop_unknown(given: dict) -> Iterator[str]:
    """Removes unknown keys from `given`, so that the rest can be checked, and yields a line for each."""
    sections = {**SECTIONS, "loss": _section_of(given.get("loss"))}
    for section, body in list(given.items()):
        known = sections[section].model_fields if section in sections else {}
        names = [f"{section}.{key}" for key in body if key not in known] if isinstance(body, Mapping) else []
        if section not in sections:
            del given[section]
            names = names or [str(section)]
        elif names:
            given[section] = {key: value for key, value in body.items() if key in known}
        yield from (f"{name}: unknown key; the nearest known key is {_nearest(name, sections)}" for name in _few(names))


def _few(names: list[str]) -> Iterator[str]:
    """The first 20, shortened: an arbitrary file may have any number of keys of any length."""
    for name in names[:20]:
        yield name if len(name) <= 80 else f"{name[:40]}...{name[-36:]}"


def _nearest(name: str, sections: Sections) -> str:
    """The known key most similar to `name`. The part after the dot counts most: it may belong in another section."""
    section, _, key = name.rpartition(".")

    def likeness(known: str) -> float:
        known_section, _, known_key = known.partition(".")
        same = SequenceMatcher(None, key.lower(), known_key).ratio() + (key == known_key)
        return same + 0.25 * SequenceMatcher(None, section.lower(), known_section).ratio()

    return max((f"{name}.{key}" for name, model in sections.items() for key in model.model_fields), key=likeness)


def _explain(detail: Any) -> Iterator[str]:
    """The ConfigError lines for one pydantic error."""
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ValidationError):  # of a section that is checked by itself
        for inner in cause.errors():
            yield from _explain({**inner, "loc": (*detail["loc"], *inner["loc"])})
        return
    if isinstance(cause, ConfigError):
        yield from cause.problems
        return
    section, *rest = detail["loc"]
    name = ".".join([section, *(str(part) for part in rest[:1])]) + "".join(f"[{i}]" for i in rest[1:])
    if detail["type"] == "missing":
        yield f"{name}: is missing and has no default"
        return
    reason = str(cause) if cause else detail["msg"].replace("Input should be", "must be")
    kinds = {
        "model_type": "must be a mapping of keys to values",
        "string_type": "must be a string; quote it if YAML reads it as another type",
        "tuple_type": "must be a list",
    }
    yield f"{name} = {show(detail['input'])}: {kinds.get(detail['type'], reason)}"
