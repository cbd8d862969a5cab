"""The optimizations of a step (levers), each with its own switch: config overrides or a context manager."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from jepa.config.file import parse_config
from jepa.config.schema import Config, ConfigError
from jepa.data import masks
from jepa.model import fp8
from jepa.model.attention import require
from jepa.ranks.distributed import Ranks
from jepa.train.optimizer import foreign
from jepa_kernels import OPS


@contextlib.contextmanager
def deterministically(_device: torch.device) -> Iterator[None]:
    """As ranks.distributed.start sets; on a GPU cuBLAS needs CUBLAS_WORKSPACE_CONFIG=:4096:8 before it is loaded."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = before


@dataclass(frozen=True)
class Lever:
    """Switched by `overrides` of the config, or by `context`, a context manager around every step.

    `mode`: the mode of throughput.py in which it has an effect. `same`: whether the losses stay the same.
    """

    what: str
    overrides: tuple[str, ...] = ()
    context: Callable[[torch.device], contextlib.AbstractContextManager[None]] | None = None
    mode: str = "model"
    same: bool = True


def definitions() -> dict[str, Callable[..., object]]:
    """The reference of each op, x_ref for x or x_; not of AdamWEMA's, which the lever `optimizer` switches."""
    modules = [module for name, module in sys.modules.items() if name.startswith("jepa_kernels.")]
    named = {name: x for module in modules for name, x in vars(module).items()}
    return {op: named[f"{op.removesuffix('_')}_ref"] for op in OPS if not op.startswith("adamw_ema")}


@contextlib.contextmanager
def references(device: torch.device) -> Iterator[None]:
    """Replaces the ops of jepa_kernels with their plain PyTorch definitions."""
    library = torch.library.Library("jepa_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the overridden kernel
        for op, definition in definitions().items():
            library.impl(op, definition, device.type.upper(), allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def specification(_device: torch.device) -> Iterator[None]:
    """Samples masks with the Python specification."""
    library = torch.library.Library("jepa_masks", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("sample", masks._sample_ref, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


# Used by the engine; `--without` turns them off.
LEVERS = {
    "optimizer": Lever(
        "AdamW, EMA and teacher weights in one pass; without: torch's fused AdamW, then the EMA",
        ("engine.optimizer=torch",),
    ),
    "kernels": Lever("the ops of jepa_kernels; without: their plain PyTorch definitions", context=references),
    "sampler": Lever("masks sampled in C++; without: by the Python specification", context=specification),
    "prefetch": Lever("batches prefetched; without: made on demand", mode="train"),
    "compile": Lever("torch.compile; without: eager", ("engine.compile=false",)),
    "attention": Lever("attention scores not materialised; without: plain matrix products", ("engine.attention=math",)),
    "skip_unread": Lever("rows that no loss reads are skipped; without: computed", ("engine.skip_unread=false",)),
}
# Optional; `--with` turns them on.
EXTRAS = {
    "checkpointing": Lever("blocks recomputed in the backward", ("engine.activation_checkpointing=true",)),
    "deterministic": Lever("engine.deterministic: only bitwise reproducible algorithms", context=deterministically),
    "overlap_comm": Lever("gradient reduction overlapped with the backward", ("engine.overlap_comm=true",)),
    "global_cut": Lever("contexts of one length on all ranks", ("mask.cut=global",), same=False),
    "packed": Lever("packed contexts of unequal length, nothing cut", ("mask.mode=packed",), same=False),
    "token_budget": Lever(
        "packed contexts padded or thinned to half of all patches",
        ("mask.mode=packed", "mask.token_budget=0.5"),
        same=False,
    ),
    "fp8_target": Lever("target encoder's forward in fp8", ("engine.target_precision=fp8",), same=False),
    "flash_attn": Lever("FlashAttention 4, 3 or 2", ("engine.attention=flash_attn",)),
    "xformers": Lever("xformers' attention", ("engine.attention=xformers",)),
    "deepspeed_adam": Lever("DeepSpeed's FusedAdam, then the EMA", ("engine.optimizer=deepspeed",)),
    "apex_adam": Lever("apex's FusedAdam, then the EMA", ("engine.optimizer=apex",)),
}


def switchable(config: Config, mode: str, ranks: Ranks) -> dict[str, Lever]:
    """The levers that are on in this config on this device and that `mode` exercises."""
    off = {"compile": not config.compiles(ranks.device.type)}
    if not config.method.masked:
        off |= {"sampler": True, "skip_unread": True}
    return {
        name: lever
        for name, lever in LEVERS.items()
        if lever.mode == mode and not off.get(name, bool(lever.overrides) and changed(config, [lever]) == config)
    }


def addable(config: Config, ranks: Ranks) -> dict[str, Lever]:
    """The extras that are off in this config, have an effect here, and whose packages are installed."""
    idle = {"overlap_comm"} if ranks.world_size == 1 or config.engine.zero_stage not in (1, 2) else set()
    idle |= {"global_cut"} if ranks.world_size == 1 or config.cut == "global" else set()
    idle |= set() if config.method.masked else {"global_cut", "packed", "token_budget"}
    idle |= {"fp8_target"} if ranks.device.type == "cpu" else set()  # emulated there: no speed
    idle |= {"deterministic"} if ranks.device.type == "cuda" and "CUBLAS_WORKSPACE_CONFIG" not in os.environ else set()
    return {name: lever for name, lever in EXTRAS.items() if name not in idle and _is_new_here(config, lever, ranks)}


def _is_new_here(config: Config, lever: Lever, ranks: Ranks) -> bool:
    try:
        moved = changed(config, [lever])
        require(moved.engine.attention)
        if moved.engine.target_precision == "fp8":
            fp8.require(ranks.device)
        if moved.engine.optimizer in ("deepspeed", "apex"):
            foreign(moved.engine.optimizer, ranks.device)
    except ConfigError:
        return False
    if moved == config:
        return lever.context is not None
    return moved.engine.attention == config.engine.attention or ranks.device.type == "cuda"


def changed(config: Config, levers: list[Lever]) -> Config:
    return parse_config(config.model_dump(), [override for lever in levers for override in lever.overrides])
