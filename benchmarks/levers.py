"""What makes a step fast, each switchable alone: by a key of the config where there is one, else in the dispatcher."""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from jepa import masks
from jepa.config import Config, parse_config

OPS = ("patchify", "gather", "predictor_tokens", "prediction_loss", "vicreg")


@dataclass(frozen=True)
class Lever:
    """`overrides` of the config take it away, or `without`, a context in which a step runs without it."""

    what: str
    overrides: tuple[str, ...] = ()
    without: Callable[[torch.device], contextlib.AbstractContextManager[None]] | None = None
    mode: str = "model"


@contextlib.contextmanager
def references(device: torch.device) -> Iterator[None]:
    """The ops of jepa_kernels by their plain PyTorch definitions."""
    library = torch.library.Library("jepa_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for module in (importlib.import_module(f"jepa_kernels.{op}") for op in OPS):
            for definition in (name for name in vars(module) if name.endswith("_ref")):
                # x_ref defines the op x, or x_ where it works in place
                names = (definition.removesuffix("ref"), definition.removesuffix("_ref"))
                op = next((name for name in names if hasattr(torch.ops.jepa_kernels, name)), None)
                if op is not None:
                    library.impl(op, getattr(module, definition), device.type.upper())
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def specification(_device: torch.device) -> Iterator[None]:
    """The masks by their specification in Python."""
    library = torch.library.Library("jepa_masks", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("sample", masks._sample_ref, "CPU")
    try:
        yield
    finally:
        library._destroy()


LEVERS = {
    "optimizer": Lever(
        "AdamW, average and teacher's weights in one pass; without: torch's fused AdamW, then the average",
        ("engine.optimizer=torch",),
    ),
    "kernels": Lever("the ops of jepa_kernels; without: their definitions in plain PyTorch", without=references),
    "sampler": Lever("masks drawn by C++; without: by their specification in Python", without=specification),
    "prefetch": Lever("batches made ready ahead; without: when they are asked for", mode="train"),
    "compile": Lever("torch.compile; without: eager", ("engine.compile=false",)),
    "attention": Lever("attention that is not materialised; without: plain products", ("engine.attention=math",)),
    "dead_compute": Lever("rows that no loss reads are left out; without: computed", ("engine.dead_compute=true",)),
}


def switchable(config: Config, mode: str, device_type: str) -> dict[str, Lever]:
    """The levers that this config has on, on this kind of device, and `mode` exercises."""
    off = {"compile": not config.compiles(device_type)}
    return {
        name: lever
        for name, lever in LEVERS.items()
        if lever.mode == mode and not off.get(name, bool(lever.overrides) and without(config, [lever]) == config)
    }


def without(config: Config, levers: list[Lever]) -> Config:
    return parse_config(config.model_dump(), [override for lever in levers for override in lever.overrides])
