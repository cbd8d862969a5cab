"""The encoder in a file of any format, ready to be probed or drawn."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from jepa.config.file import parse_config
from jepa.config.schema import MODELS, Config
from jepa.model.vit import VisionTransformer, build_encoder

from .foreign import open_initial
from .interop import ENCODERS, open_weights
from .restore import CheckpointError


def load_encoder(
    path: str | Path, which: str = "target_encoder", config: Config | None = None
) -> tuple[VisionTransformer, Config]:
    """`open_encoder` without the epochs."""
    return open_encoder(path, which, config)[:2]


def open_encoder(
    path: str | Path, which: str = "target_encoder", config: Config | None = None
) -> tuple[VisionTransformer, Config, int | None]:
    """The encoder at `path`, in fp32, the config it was trained with, and for how many epochs, if the file says so.

    `path`: a checkpoint, an exported safetensors file, a `.pth.tar` of the published code with its `config`, or the
    Hugging Face folder of an IJepaModel, whose only encoder stands for either. `which`: "target_encoder" (the EMA: what
    I-JEPA evaluates) or "encoder".
    Raises ValueError for another `which`, for a `config` that is not needed, and like jepa.state.interop.open_weights.
    """
    if which not in ENCODERS:
        raise ValueError(f"which: given {which!r}, wanted one of {list(ENCODERS)}")
    path = Path(path)
    tensors: Iterable[tuple[str, Tensor]]
    epochs = None
    if is_huggingface(path):
        if config is not None:
            raise ValueError(f"{path}: a config is given, but the folder has its own")
        config = _config_of(path)
        (stored,) = open_initial(path, config).parts.values()
        tensors = ((name, tensor.read()) for name, tensor in stored.items())
    else:
        weights = open_weights(path, config)
        if which not in weights.shapes:
            raise CheckpointError(f"{path} has no {which}; it has {', '.join(weights.shapes)}")
        config, tensors, epochs = weights.config, weights.tensors(which), weights.trained.get("epoch")
    encoder = build_encoder(config)
    parameters = dict(encoder.named_parameters())
    with torch.no_grad():
        for name, values in tensors:
            parameters[name].copy_(values)
    return encoder.eval(), config, epochs


def is_huggingface(path: Path) -> bool:
    """Whether it is a folder in Hugging Face's layout, which does not say how long its model was trained."""
    return (path / "config.json").is_file() and not (path / "state.json").is_file()


def _config_of(folder: Path) -> Config:
    """What a Hugging Face folder says of its model, as a config; the rest is its defaults."""
    about, images = folder / "config.json", folder / "preprocessor_config.json"
    try:
        model = json.loads(about.read_text(encoding="utf-8")[: 2**20])
        seen = json.loads(images.read_text(encoding="utf-8")[: 2**20]) if images.is_file() else {}
        width, depth, heads = (model[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        named = [
            name
            for name, size in MODELS.items()
            if (size.embed_dim, size.depth, size.num_heads) == (width, depth, heads)
        ]
        mapping = {
            "meta": {
                "model_name": named[0] if named else "vit_base",
                "embed_dim": width,
                "depth": depth,
                "num_heads": heads,
                "mlp_ratio": model["intermediate_size"] / width,
            },
            "data": {"root_path": str(folder), "batch_size": 64, "crop_size": model["image_size"]}
            | ({"mean": seen["image_mean"], "std": seen["image_std"]} if "image_mean" in seen else {}),
            "mask": {"patch_size": model["patch_size"]},
            "optimization": {"epochs": 1, "warmup": 0},
            "logging": {"folder": str(folder)},
        }
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            f"{about}: {type(error).__name__}: {str(error)[:300]}; wanted an IJepaModel's config"
        ) from error
    return parse_config(mapping, source=str(about))
