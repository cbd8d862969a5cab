"""Opens weights to start a run from, in anyone's format: this engine's, the published code's, Hugging Face's, timm's.

`open_initial` finds out which it is and checks that it holds the model of the run's config. Position embeddings are
verified to be I-JEPA's and dropped: this engine computes its own, so the file may be of another resolution.

Files are untrusted, as in jepa.state.interop. Nothing but positions is read before it is asked for.
"""

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from jepa.config.schema import MODELS, Config, ConfigError

from .interop import (
    ENCODERS,
    HUGGINGFACE,
    HUGGINGFACE_BLOCK,
    METADATA,
    PARTS,
    check,
    open_weights,
    plain_tensors,
    positions_of,
    published_parts,
    side_of,
    unpickled,
)
from .restore import CheckpointError, refuse_run

WANTED = (
    "wanted one of our checkpoints or exports, a .pth.tar of the published code, the Hugging Face folder of an "
    "IJepaModel or a timm state dict"
)


class Stored(NamedTuple):
    """A tensor in a file: its shape, and how to read its fp32 values."""

    shape: list[int]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Initial:
    """The weights in a file that the run can use, by part and name, without positions.

    `kind`: the format. `side`: the patches along a side of the images it was trained on; None if it does not say.
    `unread`: names of tensors that belong to no part, such as a classifier's. `heads`: of the attention, by part,
    where the file says (shapes do not tell).
    """

    kind: str
    parts: dict[str, dict[str, Stored]]
    side: int | None = None
    unread: list[str] = field(default_factory=list)
    heads: Mapping[str, Any] = field(default_factory=dict)


def open_initial(path: Path, config: Config, parts: tuple[str, ...] = PARTS) -> Initial:
    """The weights at `path` for the model of `config`, of which the run uses `parts`; data.crop_size may differ.

    Raises CheckpointError, which names the file, what is wanted and what was found: a file that is damaged, of an
    unknown format, without an encoder, with other positions than I-JEPA's, or of a model of another size.
    """
    try:
        initial = _open(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    initial = replace(initial, parts={part: initial.parts[part] for part in parts if part in initial.parts})
    if not initial.parts.keys() & set(ENCODERS):
        raise CheckpointError(f"{path}: found {', '.join(initial.parts) or 'nothing'}; wanted {' or '.join(ENCODERS)}")
    sides = {initial.side} - {None}
    for part, tensors in initial.parts.items():
        _refuse_other_size(path, part, tensors, config, initial.heads)
        name, width = positions_of(part), (config.predictor if part == "predictor" else config.vit).embed_dim
        if name in tensors:
            sides.add(side_of(f"{path}: {part}.{name}", tensors.pop(name).read(), width))
    check(path, config, {part: {name: t.shape for name, t in each.items()} for part, each in initial.parts.items()})
    if len(sides) > 1:
        raise CheckpointError(f"{path}: found positions for {sorted(map(str, sides))} patches a side; wanted one grid")
    return replace(initial, side=next(iter(sides), None))


def _open(path: Path) -> Initial:
    if (path / "state.json").is_file():
        return _open_own(path, "our checkpoint")
    if (path / "config.json").is_file():
        return _open_huggingface(path)
    refuse_run(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: found {'another folder' if path.is_dir() else 'no such file'}; {WANTED}")
    if not zipfile.is_zipfile(path):  # as torch.save writes it
        if METADATA in (_safe_open(path).metadata() or {}):
            return _open_own(path, "our export")
        return _encoder(path, _in_safetensors(path))
    content = unpickled(path)
    if published := published_parts(path, content):
        return Initial("in the published code's layout", {part: _stored(of_it) for part, of_it in published.items()})
    return _encoder(path, _in_pickle(path, content))


def _open_own(path: Path, kind: str) -> Initial:
    weights = open_weights(path)
    encoder, predictor, grid = weights.config.vit, weights.config.predictor, weights.config.grid

    def stored(part: str, name: str, shape: list[int]) -> Stored:
        return Stored(shape, lambda: weights.read(part, name))

    parts = {part: {n: stored(part, n, shape) for n, shape in names.items()} for part, names in weights.shapes.items()}
    heads = {**dict.fromkeys(ENCODERS, encoder.num_heads), "predictor": predictor.num_heads}
    return Initial(kind, parts, grid, heads=heads)


def _open_huggingface(path: Path) -> Initial:
    """A folder that `IJepaModel.save_pretrained` wrote, its weights in one file or in numbered ones."""
    about = path / "config.json"
    try:
        with about.open(encoding="utf-8") as file:
            content = json.loads(file.read(2**20))
        kind, act = content.get("model_type"), content.get("hidden_act", "gelu")  # IJepaConfig's defaults
        heads = content.get("num_attention_heads", 12)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{about} is not a model's config: {str(error)[:300]}") from error
    if (kind, act) != ("ijepa", "gelu"):
        given = f"model_type {str(kind)[:40]!r} and hidden_act {str(act)[:40]!r}"
        raise CheckpointError(f"{about}: found {given}; wanted 'ijepa' and 'gelu'")
    names = sorted(p.name for p in path.iterdir() if p.is_file())
    files = [name for name in names if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)]
    files = files or [name for name in names if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]
    tensors: dict[str, Stored] = {}
    for part in (path / name for name in files):
        held = _in_pickle(part, unpickled(part)) if part.suffix == ".bin" else _in_safetensors(part)
        if twice := tensors.keys() & held:
            raise CheckpointError(f"{path}: {min(twice)[:200]} is in two of {', '.join(files[:4])}")
        tensors |= held
    return replace(_encoder(path, tensors), heads={"encoder": heads})


def _safe_open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({str(error)[:300]}); {WANTED}") from error


def _in_safetensors(path: Path) -> dict[str, Stored]:
    file = _safe_open(path)

    def stored(name: str) -> Stored:
        found = file.get_slice(name)
        if found.get_dtype() not in ("F64", "F32", "BF16", "F16"):
            raise CheckpointError(f"{path}: {name[:200]} is {found.get_dtype()}, wanted F32, BF16 or F16")
        return Stored(found.get_shape(), lambda: file.get_tensor(name).float())

    return {name: stored(name) for name in file.keys()}  # noqa: SIM118


def _in_pickle(path: Path, content: Any) -> dict[str, Stored]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: found {type(content).__name__}, not a dict of tensors; {WANTED}")
    return _stored(plain_tensors(f"{path}: ", content))


def _stored(tensors: dict[str, Tensor]) -> dict[str, Stored]:
    return {name: Stored(list(value.shape), value.float) for name, value in tensors.items()}


def _encoder(path: Path, tensors: dict[str, Stored]) -> Initial:
    """An encoder alone, under timm's names, which are also the published code's, or under Hugging Face's."""
    theirs = any(name.startswith("embeddings.") for name in tensors)
    kind, after = ("Hugging Face's", r"pooler\.|embeddings\.mask_token$") if theirs else ("timm's", r"head\.")
    unread = [name for name in tensors if re.match(after, name)]
    tensors = {name: stored for name, stored in tensors.items() if name not in unread}
    if theirs:
        tensors = _renamed(path, tensors)
    if "pos_embed" not in tensors:
        named = ", ".join(name[:60] for name in list(tensors)[:3]) or "no tensor"
        raise CheckpointError(f"{path}: found {named}, no pos_embed; {WANTED}")
    return Initial(f"in {kind} layout", {"encoder": tensors}, unread=unread)


def _renamed(path: Path, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Hugging Face's tensors under our names, with query, key and value joined."""
    modules = {theirs: ours for ours, theirs in HUGGINGFACE.items()}
    inner = {theirs: ours for ours, theirs in HUGGINGFACE_BLOCK.items()}
    found: dict[str, Stored] = {}
    thirds: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module)
        third = re.fullmatch(r"attention\.attention\.(query|key|value)", block[2]) if block else None
        if name == "embeddings.position_embeddings":
            found["pos_embed"] = stored
        elif block and third:
            thirds.setdefault(f"blocks.{block[1]}.attn.qkv.{kind}", {})[third[1]] = stored
        elif block:
            found[f"blocks.{block[1]}.{inner.get(block[2], block[2])}.{kind}"] = stored
        else:
            found[f"{modules.get(module, module)}.{kind}"] = stored
    for name, each in thirds.items():
        shapes = {which: each[which].shape if which in each else [] for which in ("query", "key", "value")}
        shape, *others = shapes.values()
        if not shape or others != [shape, shape]:
            raise CheckpointError(f"{path}: found {shapes} for {name[:200]}; wanted three of one shape")
        found[name] = Stored([3 * shape[0], *shape[1:]], lambda each=each: _joined(each))  # type: ignore[misc]
    return found


def _joined(each: dict[str, Stored]) -> Tensor:
    return torch.cat([each[which].read() for which in ("query", "key", "value")])


def _refuse_other_size(
    path: Path, part: str, tensors: dict[str, Stored], config: Config, heads: Mapping[str, Any]
) -> None:
    """Raises CheckpointError if a part is of another width, depth or patch size; it says which settings would fit."""
    predicts = part == "predictor"
    prefix, embedding = ("predictor_", "predictor_embed") if predicts else ("", "patch_embed.proj")
    kernel, hidden = (tensors.get(n) for n in (f"{embedding}.weight", f"{prefix}blocks.0.mlp.fc1.weight"))
    if not (kernel and hidden and hidden.shape and len(kernel.shape) == (2 if predicts else 4) and kernel.shape[0]):
        named = ", ".join(name[:60] for name in list(tensors)[:3])
        raise CheckpointError(f"{path}: its {part} has {named} ...; wanted the published code's names and shapes")
    ours = config.predictor if predicts else config.vit
    keys = ["meta.pred_emb_dim", "meta.pred_depth", "meta.pred_num_heads"]
    keys = keys if predicts else ["meta.embed_dim", "meta.depth", "meta.num_heads"]
    width = kernel.shape[0]
    depth = len({name.split(".")[1] for name in tensors if name.startswith(f"{prefix}blocks.")})
    found = dict(zip(keys, (width, depth, heads.get(part, ours.num_heads)), strict=True))
    wanted: dict[str, Any] = dict(zip(keys, ours[:3], strict=True))
    if not predicts:
        found |= {"mask.patch_size": kernel.shape[-1], "meta.mlp_ratio": hidden.shape[0] / width}
        wanted |= {"mask.patch_size": config.mask.patch_size}
        wanted |= {"meta.mlp_ratio": int(ours.embed_dim * ours.mlp_ratio) / ours.embed_dim}
    differ = [key for key in found if found[key] != wanted[key]]
    if not differ:
        return
    fits = [name for name, size in MODELS.items() if not predicts and size[:2] == (width, depth)]
    other = bool(fits) and fits[0] != config.meta.model_name
    give = [f"meta.model_name={fits[0]}"] if other else []
    give += [f"{key}={found[key]}" for key in differ if not other or key == "mask.patch_size"]
    there = ", ".join(f"{key} {found[key]} (here {wanted[key]})" for key in differ)
    raise CheckpointError(f"{path}: its {part} has {there}. To start from it, give {' '.join(give)}"[:2000])
