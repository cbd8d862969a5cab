"""Fused kernels for joint-embedding predictive pretraining. torch and triton, nothing else."""

from pathlib import Path

import torch

from .adamw_ema import AdamWEMA
from .ema import ema_
from .gather import gather_tokens
from .patchify import patchify
from .prediction_loss import prediction_loss
from .predictor_tokens import predictor_tokens
from .vicreg import vicreg

__all__ = [
    "AdamWEMA",
    "ema_",
    "gather_tokens",
    "patchify",
    "prediction_loss",
    "predictor_tokens",
    "vicreg",
]
__version__ = "0.1.0"

# Absent only where the package was built with JEPA_KERNELS_NO_EXT=1; one that is broken raises here.
for _library in Path(__file__).parent.glob("_C.*so"):
    torch.ops.load_library(str(_library))
