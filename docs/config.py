"""Prints docs/config.md: every key of a config, from the schema, with what the shipped files say of it.

    python docs/config.py > docs/config.md

A key's values and default are those of engine/jepa/config/schema.py and, in the section `loss`, of the methods; its
meaning is the comment beside it in engine/configs/base.yaml and, of a method's own keys, in its ViT-B/16 recipe.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("engine", "kernels")]

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from jepa.config.file import SECTIONS
from jepa.config.schema import MODELS, Loss, objectives, settings_of
from jepa.config.words import expanded
from jepa.methods import DEFAULT, find

CONFIGS = ROOT / "engine/configs"
NO_LIMIT = (2**31, 2**63)  # of whole numbers, in the schema

HEAD = """\
# Every key of a config

`python docs/config.py > docs/config.md` writes this page from the schema and the shipped files. How keys are given, in
a file or on the command line, is in [training](training.md#configs).

Numbers may be written as `1e-3`, lists as `[0.3, 1.0]`. `null` unsets a key that can be unset. A path may begin with
`~` and name `$VARIABLES`. A key without a default must be given. Values that exclude each other are refused, with the
reason, before anything starts; `--dry-run` shows what a config resolves to.
"""


def page() -> str:
    """The whole page."""
    said = comments((CONFIGS / "base.yaml").read_text())
    parts = [HEAD]
    for name, model in SECTIONS.items():
        parts.append(f"## {name}\n\n{first_line(model)}\n")
        if name == "loss":
            parts += losses()
        else:
            parts.append(table(name, model, said))
        if name == "meta":
            parts.append(sizes())
    return "\n".join(parts)


def losses() -> Iterator[str]:
    """The section `loss`: what all methods have, and each method's own keys."""
    yield rows([("objective", values(Literal[tuple(objectives())]), f"`{DEFAULT}`", "the method")])
    for name in objectives():
        own, recipe = settings_of(name), recipe_of(name)
        summary = (sys.modules[find(name).__module__].__doc__ or "").partition("\n")[0]
        yield f"### {name}\n\n{summary}\n"
        keys = [key for key in own.model_fields if key not in Loss.model_fields]
        yield table("loss", own, comments(recipe.read_text()), keys) if keys else "It has no keys of its own.\n"


def recipe_of(method: str) -> Path:
    """The recipe that explains the method's own keys."""
    (path,) = CONFIGS.glob(f"in1k_vitb16_*_{method}.yaml")
    return path


def sizes() -> str:
    """The named models."""
    lines = ["| model_name | embed_dim | depth | num_heads | mlp_ratio |", "|---|---|---|---|---|"]
    for name, size in MODELS.items():
        ratio = f"{size.mlp_ratio:.4g}"
        lines.append(f"| `{name}` | {size.embed_dim} | {size.depth} | {size.num_heads} | {ratio} |")
    return "\n".join(lines) + "\n"


def table(section: str, model: type[BaseModel], said: dict[str, str], keys: Sequence[str] = ()) -> str:
    """One row for each key of a section, or for `keys`."""
    found = []
    for key in keys or model.model_fields:
        field = model.model_fields[key]
        kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        default = "required" if field.is_required() else f"`{written(field.default)}`"
        found.append((key, allowed := values(kind), default, meaning(said.get(f"{section}.{key}", ""), allowed)))
    return rows(found)


def rows(found: Sequence[tuple[str, str, str, str]]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, value, default, meaning in found:
        lines.append(f"| `{key}` | {value} | {default} | {meaning} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def meaning(comment: str, allowed: str) -> str:
    """A comment, without a list of the allowed values at its beginning."""
    head, _, rest = comment.partition("; ")
    is_list = all(word == "or" or f"`{word}`" in allowed for word in re.findall(r"[^\s,]+", head))
    return rest if is_list else comment


def first_line(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").partition("\n\n")[0].split())


def comments(text: str) -> dict[str, str]:
    """What a shipped file says of each `section.key`: the comment behind it and the lines of comment that follow, or of
    a key that is commented out, `# key: ...`, that."""
    found: dict[str, str] = {}
    section = last = ""
    for line in text.splitlines():
        if begun := re.match(r"(\w+):", line):
            section, last = begun[1], ""
        elif given := re.match(r"  (\w+): .*?  # (.*)", line):
            last = f"{section}.{given[1]}"
            found[last] = given[2]
        elif required := re.match(r"  # (\w+): (.*)", line):
            last = f"{section}.{required[1]}"
            found[last] = required[2]
        elif (more := re.match(r"  # (.*)", line)) and last:
            found[last] += f" {more[1]}"
        else:
            last = ""
    return found


def written(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(written, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def values(kind: Any) -> str:
    """The values that a type allows, in words."""
    *words, last = alternatives(kind)
    return f"{', '.join(words)} or {last}" if words else last


def alternatives(kind: Any, metadata: Sequence[Any] = ()) -> Iterator[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from alternatives(inner[0], (*inner[1:], *metadata))
    elif origin in (Union, UnionType):
        for one in inner:
            yield from alternatives(one, metadata)
    elif origin is Literal:
        yield from (f"`{one}`" for one in inner)
    elif origin is tuple and inner[-1] is Ellipsis:
        yield f"list of {values(inner[0]).replace('whole number', 'whole numbers')}"
    elif origin is tuple:
        ordered = any(isinstance(one, AfterValidator) for one in metadata)
        names = ("low", "high") if ordered else "abc"[: len(inner)]
        yield f"`[{', '.join(names)}]`, each {limits(get_args(inner[0])[1:])}"
    elif kind is bool:
        yield from ("`true`", "`false`")
    elif kind is str:
        is_path = any(isinstance(one, AfterValidator) and one.func is expanded for one in metadata)
        yield "path" if is_path else "text"
    elif kind is NoneType:
        yield "`null`"
    else:
        yield f"{ {int: 'whole number', float: 'number'}[kind] } {limits(metadata)}".strip()


def limits(metadata: Sequence[Any]) -> str:
    """A number's range, in words."""
    bounds: dict[str, float] = {}
    for one in metadata:
        for bound in one.metadata if isinstance(one, FieldInfo) else (one,):
            bounds |= {name: getattr(bound, name) for name in ("ge", "gt", "le", "lt") if hasattr(bound, name)}
    if "gt" in bounds:
        return f"above {bounds['gt']:g}" + (f", at most {bounds['le']:g}" if "le" in bounds else "")
    low = f"from {bounds['ge']:g}"
    if "le" in bounds:
        return f"{low} to {bounds['le']:g}"
    return f"{low}, below {bounds['lt']:g}" if bounds.get("lt", NO_LIMIT[0]) not in NO_LIMIT else low


if __name__ == "__main__":
    print(page(), end="")
