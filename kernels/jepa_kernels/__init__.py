"""Fused kernels for joint-embedding predictive pretraining. Depends on torch and triton only."""

from pathlib import Path

import torch

from .ema import ema_
from .gather import gather_tokens
from .optimizer import AdamWEMA
from .patchify import patchify
from .prediction_loss import prediction_loss
from .predictor_tokens import predictor_tokens
from .sigreg import sigreg, sigreg_slices
from .vicreg import vicreg

__all__ = [
    "AdamWEMA",
    "ema_",
    "gather_tokens",
    "patchify",
    "prediction_loss",
    "predictor_tokens",
    "sigreg",
    "sigreg_slices",
    "vicreg",
]
__version__ = "0.1.0"

# What the modules above have defined: everything that each op must have follows from this (tests/kernels/test_ops.py).
_registered = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
OPS = tuple(sorted(op for namespace, op in _registered if namespace == "jepa_kernels"))


def _load(folder: Path) -> None:
    """Registers the CPU kernels. Only a build made without them, which leaves a NO_EXT file, may lack the library."""
    library = folder / "_C.abi3.so"
    if (folder / "NO_EXT").exists():
        return
    build = "`pip install .`, or `python setup.py build_ext --inplace` in a source tree that is not installed"
    if not library.exists():
        raise ImportError(
            f"jepa_kernels: {library} is missing. Build the CPU kernels: {build}. With JEPA_KERNELS_NO_EXT=1 the same "
            "commands build the package without them, and plain PyTorch is used instead"
        )
    torch.ops.load_library(str(library))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [op for op in OPS if not has_kernel(f"jepa_kernels::{op}", "CPU")]
    if missing:
        raise ImportError(
            f"jepa_kernels: {library} was built from different sources and lacks {', '.join(missing)}. Rebuild: {build}"
        )


_load(Path(__file__).parent)
