"""Weights from and to files: this engine's, the published I-JEPA code's, timm's and Hugging Face's.

`open_weights` reads a run's checkpoint, a safetensors file that `save_safetensors` wrote, or a file of the published
code, one tensor at a time; the writers take what it returns. No file can run code: safetensors holds none, and a
published file is unpickled by torch's `weights_only` loader, which creates only tensors and plain containers.
(jepa.state.foreign also reads the others' formats, to start a run from them.)

There are three parts, named as in the published code: `target_encoder`, `encoder` and `predictor`. Of a method without
an average of the encoder, the target encoder is the encoder. What else a method has, such as a projector, is used only
by its loss and is not exported. A writer needs memory for what it writes plus one parameter.
"""

import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from jepa.config.file import parse_config
from jepa.config.schema import Config
from jepa.data.masks import MAX_SIDE
from jepa.model.predictor import build_predictor
from jepa.model.vit import LAYER_NORM_EPS, build_encoder, sincos_positions

from .lock import try_folder
from .restore import CheckpointError, Reader, kinds_in, read_state, verify

PARTS = ("target_encoder", "encoder", "predictor")
ENCODERS = PARTS[:2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
METADATA = "jepa"  # the key in a safetensors file's metadata that holds the config and the counters


@dataclass(frozen=True)
class Weights:
    """A model's weights in a file; `shapes` lists what is there, by part and name.

    `trained` holds what the file says about its training: epoch, step, samples.
    """

    config: Config
    trained: dict[str, int]
    shapes: dict[str, dict[str, list[int]]]
    read: Callable[[str, str], Tensor]

    def tensors(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """Yields the names and fp32 values of one part. Raises ValueError if the file does not have it."""
        if part not in self.shapes:
            raise ValueError(f"given {part}; the file has {', '.join(self.shapes)}")
        for name in self.shapes[part]:
            yield name, self.read(part, name)


def open_weights(path: str | Path, config: Config | None = None) -> Weights:
    """The weights in a checkpoint folder, a safetensors file or a file of the published code.

    `config` describes the model of a published file, which holds no config; the other two hold theirs.
    Raises CheckpointError for a file that is damaged, of an unknown format or of another model; ConfigError for a
    config in it that this engine does not understand; ValueError if `config` is missing, or given but not needed.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; wanted a checkpoint folder or a weights file")
    published = path.is_file() and zipfile.is_zipfile(path)
    if published != (config is not None):
        wanted = (
            "a config is needed: the file does not say which model it holds"
            if published
            else "a config is given, but the file has its own config or is not a .pth.tar of the published code"
        )
        raise ValueError(f"{path}: {wanted}")
    if config is not None:
        return _open_published(path, config)
    return _open_checkpoint(path) if path.is_dir() else _open_safetensors(path)


def _open_checkpoint(path: Path) -> Weights:
    state = read_state(path)
    try:
        verify(path, state["files"])
    except OSError as error:
        raise CheckpointError(str(error)) from error
    config, reader = parse_config(state["config"], source=str(path / "state.json")), Reader(path, state)
    average = "ema" if "ema" in kinds_in(state) and "encoder" in state["averaged"] else "weight"
    places = {"target_encoder": (average, "encoder."), "encoder": ("weight", "encoder.")}
    if "predictor.predictor_embed.weight" in state["shapes"]:  # I-JEPA's; another method's may have its name
        places["predictor"] = ("weight", "predictor.")
    shapes = {
        part: {name.removeprefix(prefix): shape for name, shape in state["shapes"].items() if name.startswith(prefix)}
        for part, (_, prefix) in places.items()
    }
    check(path, config, shapes)

    def read(part: str, name: str) -> Tensor:
        kind, prefix = places[part]
        return reader.tensor(kind, prefix + name, shapes[part][name])

    trained = {"epoch": state["step"] // state["steps_per_epoch"], "step": state["step"], "samples": state["samples"]}
    return Weights(config, trained, shapes, read)


def _open_safetensors(path: Path) -> Weights:
    try:
        file = safetensors.safe_open(path, framework="pt")
        about = json.loads((file.metadata() or {})[METADATA])
        described, trained = about["config"], {str(k): int(v) for k, v in about["trained"].items()}
    except (safetensors.SafetensorError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {str(error)[:300]}") from error
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path} does not say which model it holds; wanted a file written by `engine/export.py --to safetensors`"
        ) from error
    config = parse_config(described, source=f"{path}, metadata")
    shapes: dict[str, dict[str, list[int]]] = {}
    for key in file.keys():  # noqa: SIM118
        part, _, name = key.partition(".")
        shapes.setdefault(part, {})[name] = file.get_slice(key).get_shape()
        if file.get_slice(key).get_dtype() not in ("F32", "BF16"):
            raise CheckpointError(f"{path}: {key} is {file.get_slice(key).get_dtype()}, wanted F32 or BF16")
    check(path, config, shapes)
    return Weights(config, trained, shapes, lambda part, name: file.get_tensor(f"{part}.{name}").float())


def _open_published(path: Path, config: Config) -> Weights:
    """A file of the published code: its tensors stay on disk until they are read."""
    content = unpickled(path)
    found = published_parts(path, content)
    if not found:
        given = f"the keys {list(map(str, content))[:8]}" if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: given {given}, wanted a dict of {', '.join(PARTS)}")
    for part, tensors in found.items():
        _take_positions(path, part, tensors, config)
    shapes = {part: {name: list(value.shape) for name, value in tensors.items()} for part, tensors in found.items()}
    check(path, config, shapes)
    epoch = content.get("epoch")
    trained = {"epoch": epoch} if isinstance(epoch, int) and epoch >= 0 else {}
    return Weights(config, trained, shapes, lambda part, name: found[part][name].float())


class _NumpyType:
    """Made in place of a numpy.dtype, whose state a file could set to anything: numpy would follow its pointers."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _numpy_scalar(*_: object) -> None:
    """Called in place of numpy's: a loss or learning rate beside the tensors, which nothing here reads."""


NUMPY = [(_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # before numpy 2, since


def unpickled(path: Path) -> Any:
    """What torch.save wrote: plain containers and tensors, which stay on disk until they are read. Numpy scalars become
    None. Raises CheckpointError for anything else."""
    try:
        with torch.serialization.safe_globals([*NUMPY, (_NumpyType, "numpy.dtype")]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # What torch's unpickler raises for a damaged file, besides its own error.
    except (
        pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError,
        ImportError, AssertionError, OverflowError,
    ) as error:  # fmt: skip
        reason = str(error).split("\n")[0].split("WeightsUnpickler error: ")[-1].strip()[:300]
        raise CheckpointError(f"{path} is not a file of plain tensors, and nothing else is loaded: {reason}") from error


def published_parts(path: Path, content: Any) -> dict[str, dict[str, Tensor]]:
    """The parts that the contents of a file of the published code have, by part and plain name."""
    parts = [part for part in PARTS if isinstance(content, dict) and isinstance(content.get(part), dict)]
    return {part: plain_tensors(f"{path}: {part}.", content[part]) for part in parts}


def plain_tensors(where: str, given: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without the prefixes that DistributedDataParallel and torch.compile give to names.
    Raises CheckpointError, which begins with `where`, if it holds anything else."""
    found: dict[str, Tensor] = {}
    for key, value in given.items():
        name = ".".join(word for word in str(key).split(".") if word not in ("module", "_orig_mod"))
        plain = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        if not plain or not value.is_floating_point():
            raise CheckpointError(f"{where}{name[:200]} is not a plain floating-point tensor")
        if name in found:
            raise CheckpointError(f"{where}{name[:200]} is there twice, with and without a prefix")
        found[name] = value
    return found


def _take_positions(path: Path, part: str, tensors: dict[str, Tensor], config: Config) -> None:
    """Removes the fixed position embeddings from a part: this engine computes its own, which must match."""
    name, (dim, *_) = positions_of(part), config.predictor if part == "predictor" else config.vit
    given = tensors.pop(name, None)
    if given is None:
        return
    wanted = [1, config.grid**2, dim]
    if list(given.shape) != wanted:
        raise CheckpointError(
            f"{path}: {part}.{name} is {list(given.shape)}, by the config it is {wanted}; check "
            "meta.model_name, data.crop_size and mask.patch_size"
        )
    side_of(f"{path}: {part}.{name}", given, dim)


def side_of(where: str, given: Tensor, dim: int) -> int:
    """The patches along a side of the square grid whose sine-cosine table `given` is.

    Raises CheckpointError, which begins with `where`, if it is no such table of width `dim`.
    """
    side = math.isqrt(given.shape[1]) if given.dim() == 3 else 0
    if list(given.shape) != [1, side**2, dim] or not 1 <= side <= MAX_SIDE or not given.is_contiguous():
        raise CheckpointError(f"{where} is {list(given.shape)}, wanted [1, N, {dim}] for a square grid of N patches")
    apart = float((given.float() - sincos_positions(dim, side)[None]).abs().max())
    rounded = any(torch.equal(given, given.to(low).to(given.dtype)) for low in (torch.bfloat16, torch.float16))
    if not apart <= (2**-8 if rounded else 1e-5):
        raise CheckpointError(f"{where} is not I-JEPA's sine-cosine table; it is off by {apart:.1e}")
    return side


def check(path: Path, config: Config, shapes: Mapping[str, dict[str, list[int]]]) -> None:
    """Raises CheckpointError if the shapes in a file do not match the model that the config describes."""
    if foreign := [part for part in shapes if part not in PARTS]:
        raise CheckpointError(f"{path} holds {foreign[0]!r}, wanted only {', '.join(PARTS)}")
    for part, found in shapes.items():
        depth = (config.predictor if part == "predictor" else config.vit).depth
        if depth > len(found):  # avoids building more blocks than the file can hold
            raise CheckpointError(f"{path}: {part} has {len(found)} tensors, too few for the config's {depth} blocks")
        with torch.device("meta"):
            module = build_predictor(config) if part == "predictor" else build_encoder(config)
        wanted = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
        if wrong := [name for name in [*wanted, *found] if wanted.get(name) != found.get(name)]:
            there, here = found.get(wrong[0], "missing"), wanted.get(wrong[0], "missing")
            raise CheckpointError(
                f"{path}: its {part} is not the one that the config describes; they differ in {len(set(wrong))} "
                f"tensors, such as {wrong[0][:200]}: {there} in the file, {here} in the model"
            )


def positions_of(part: str) -> str:
    return "predictor_pos_embed" if part == "predictor" else "pos_embed"


def save_safetensors(weights: Weights, parts: list[str], dtype: torch.dtype, out: Path) -> None:
    """Writes `{part}.{name}` for each of `parts`, with the config in the metadata, as `open_weights` reads it."""
    about = {"config": weights.config.model_dump(mode="json"), "trained": weights.trained}
    tensors = {f"{part}.{name}": value.to(dtype) for part in parts for name, value in weights.tensors(part)}
    with _new(out) as partial:
        safetensors.torch.save_file(tensors, partial, {"format": "pt", METADATA: json.dumps(about)})


def save_published(weights: Weights, dtype: torch.dtype, out: Path) -> None:
    """The published code's `.pth.tar`: all parts, names prefixed by `module.`, with fixed positions; no optimizer."""
    content: dict[str, Any] = {
        "opt": None,
        "scaler": None,
        "epoch": weights.trained.get("epoch", 0),
        "batch_size": weights.config.data.batch_size,
        "lr": weights.config.optimization.lr,
    }
    for part in PARTS:
        content[part] = {f"module.{name}": value for name, value in _with_positions(weights, part, dtype).items()}
    with _new(out) as partial:
        torch.save(content, partial)


def save_timm(weights: Weights, part: str, dtype: torch.dtype, out: Path) -> None:
    """A state dict of timm's VisionTransformer(class_token=False, global_pool="avg", fc_norm=False, num_classes=0)."""
    with _new(out) as partial:
        safetensors.torch.save_file(_with_positions(weights, part, dtype), partial, {"format": "pt"})


# Module names in the published code and at Hugging Face; those of a block follow blocks.N and encoder.layer.N.
HUGGINGFACE = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
HUGGINGFACE_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def save_huggingface(weights: Weights, part: str, dtype: torch.dtype, out: Path) -> None:
    """A folder for `IJepaModel.from_pretrained`: config.json, preprocessor_config.json, model.safetensors."""
    config, size = weights.config, weights.config.vit
    model = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": size.embed_dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": int(size.embed_dim * size.mlp_ratio),
        "mlp_ratio": size.mlp_ratio,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": config.data.crop_size,
        "patch_size": config.mask.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    images = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.data.crop_size, "width": config.data.crop_size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.data.mean,
        "image_std": config.data.std,
    }
    tensors: dict[str, Tensor] = {}
    for name, value in _with_positions(weights, part, dtype).items():
        tensors |= _huggingface_tensors(name, value)
    with _new(out) as partial:
        partial.mkdir()
        safetensors.torch.save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        (partial / "config.json").write_text(json.dumps(model, indent=2) + "\n")
        (partial / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")


def _huggingface_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """One of our tensors under Hugging Face's name, or three: there query, key and value are separate."""
    if name == "pos_embed":
        return {"embeddings.position_embeddings": value}
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return {f"{HUGGINGFACE[module]}.{kind}": value}
    _, number, inner = module.split(".", 2)
    layer = f"encoder.layer.{number}"
    if inner != "attn.qkv":
        return {f"{layer}.{HUGGINGFACE_BLOCK[inner]}.{kind}": value}
    thirds = zip(("query", "key", "value"), value.chunk(3), strict=True)
    return {f"{layer}.attention.attention.{which}.{kind}": third.clone() for which, third in thirds}


def _with_positions(weights: Weights, part: str, dtype: torch.dtype) -> dict[str, Tensor]:
    dim = (weights.config.predictor if part == "predictor" else weights.config.vit).embed_dim
    tensors = {name: value.to(dtype) for name, value in weights.tensors(part)}
    return {positions_of(part): sincos_positions(dim, weights.config.grid)[None].to(dtype), **tensors}


def refuse_out(out: Path) -> None:
    """Raises CheckpointError unless `out` is free and can be written."""
    if out.exists():
        raise CheckpointError(f"{out} already exists, and nothing is overwritten: choose another name")
    try:
        try_folder(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error


@contextmanager
def _new(out: Path) -> Iterator[Path]:
    """A temporary path next to `out`, renamed to it once all is written. Raises CheckpointError if that fails."""
    refuse_out(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        os.umask(umask := os.umask(0))
        for file in (partial, *partial.rglob("*")):  # safetensors creates files for the owner only
            file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
        os.rename(partial, out)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{out} could not be written: {error}") from error
