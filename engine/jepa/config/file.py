"""Makes a config of a file and overrides, and reports unknown keys and bad values, one line per key."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from .conflicts import show
from .read import parse_yaml, read
from .schema import Config, ConfigError, Loss, objectives, settings_of

Sections = Mapping[str, type[BaseModel]]
SECTIONS = cast(dict[str, type[BaseModel]], {name: field.annotation for name, field in Config.model_fields.items()})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and its bases (jepa.config.read), and applies `section.key=value` overrides, whose values are
    text for keys that take text, and YAML for others. Raises ConfigError."""
    mapping, origin = read(path)
    return parse_config(mapping, overrides, str(path), origin)


def parse_config(
    mapping: object,
    overrides: Sequence[str] = (),
    source: str = "config",
    origin: Mapping[str, str] | None = None,
) -> Config:
    """Validates nested mappings, as YAML gives them. Errors name them by `source`, and a `section.key` that stands
    elsewhere by its `origin`. Raises ConfigError."""
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
        overridden = {override.partition("=")[0].strip() for override in overrides}
        elsewhere = {name: file for name, file in (origin or {}).items() if name not in overridden}
        raise ConfigError([_locate(problem, elsewhere) for problem in problems], source)
    return config


def to_yaml(config: Config) -> str:
    """All keys with their values, as `load_config` reads them back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Block style, but lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def _override(given: dict, overrides: Sequence[str]) -> Iterator[str]:
    """Applies the overrides to `given`, copying the sections it changes, and yields the problems."""
    for override in overrides:
        name, equals, text = override.partition("=")
        section, _, key = name.strip().partition(".")
        if not (equals and section and key):
            yield f"{show(override)}: an override must have the form section.key=value"
            continue
        try:
            value = _value(section, key, text.strip() if name.endswith(" ") else text)
        except ValueError as error:
            yield f"{show(override)}: the value is not YAML: {error}"
            continue
        body = given.get(section, {})
        if isinstance(body, Mapping):
            given[section] = {**body, key: value}


def _value(section: str, key: str, text: str) -> object:
    """What an override's text means: the text itself, as it is typed, if the key takes text, and else YAML.

    A path may have a `#`, or be `*.tar` or `{a,b}.tar`, which YAML reads as something else. A text in quotes is YAML's,
    and `null` unsets a key that can be unset.
    """
    kinds = _kinds(section, key)
    if not kinds or kinds - {str, type(None)}:
        return parse_yaml(text) if text.strip() else ""
    if text.lower() == "null" and type(None) in kinds:
        return None
    return parse_yaml(text) if re.fullmatch(r"""'.*'|".*\"""", text) else text


def _kinds(section: str, key: str) -> set[object]:
    """The types that a key takes; empty if there is no such key."""
    models = [settings_of(name) for name in objectives()] if section == "loss" else [SECTIONS.get(section, BaseModel)]
    return {
        kind for model in models if key in model.model_fields for kind in _leaves(model.model_fields[key].annotation)
    }


def _leaves(annotation: Any) -> Iterator[object]:
    """The types in an annotation; of a literal, those of its values."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif get_origin(annotation) is Annotated:
        yield from _leaves(annotation.__origin__)
    elif get_origin(annotation) in (Union, UnionType):
        for each in get_args(annotation):
            yield from _leaves(each)
    else:
        yield annotation


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
        if sections.get(section) is Loss:
            continue  # of a method that there is not: that is the problem
        known = sections[section].model_fields if section in sections else {}
        names = [f"{section}.{key}" for key in body if key not in known] if isinstance(body, Mapping) else []
        if section not in sections:
            del given[section]
            names = names or [str(section)]
        elif names:
            given[section] = {key: value for key, value in body.items() if key in known}
        yield from (f"{name}: unknown key; the nearest known key is {_nearest(name, sections)}" for name in _few(names))


def _locate(problem: str, elsewhere: Mapping[str, str]) -> str:
    """The problem, with the file that its key stands in if that is not the config's own."""
    name = re.split(r" = |: |\[", problem, maxsplit=1)[0]
    return f"{problem} (in {elsewhere[name]})" if name in elsewhere else problem


def _few(names: list[str]) -> Iterator[str]:
    """The first 20, shortened: an arbitrary file may have any number of keys of any length."""
    for name in names[:20]:
        yield name if len(name) <= 80 else f"{name[:40]}...{name[-36:]}"


def _nearest(name: str, sections: Sections) -> str:
    """The known key most similar to `name`. The part after the dot counts most: it may belong in another section."""
    section, _, key = name.rpartition(".")

    def likeness(known: str) -> float:
        known_section, _, known_key = known.rpartition(".")
        same = SequenceMatcher(None, key.lower(), known_key).ratio() + (key == known_key)
        return same + (0.25 * SequenceMatcher(None, section.lower(), known_section).ratio() if section else 0)

    every = [*sections.items(), *(("loss", settings_of(method)) for method in objectives())]
    keys = list(dict.fromkeys(f"{name}.{key}" for name, model in every for key in model.model_fields))
    return max(keys if section else [*keys, "base"], key=likeness)


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
        "string_unicode": "is not in UTF-8; rename it, or give a link to it",
        "tuple_type": "must be a list",
    }
    yield f"{name} = {show(detail['input'])}: {kinds.get(detail['type'], reason)}"
