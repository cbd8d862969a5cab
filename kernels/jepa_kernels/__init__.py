"""Fused kernels for joint-embedding predictive pretraining. torch and triton, nothing else."""

from pathlib import Path

import torch

from .gather import gather_tokens
from .patchify import patchify
from .predictor_tokens import predictor_tokens

__all__ = ["gather_tokens", "patchify", "predictor_tokens"]
__version__ = "0.1.0"

# Absent only where the package was built with JEPA_KERNELS_NO_EXT=1; one that is broken raises here.
for _library in Path(__file__).parent.glob("_C.*so"):
    torch.ops.load_library(str(_library))
