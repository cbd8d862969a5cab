"""What the ops compute in: float32 or wider, whatever their input and autocast."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """The dtype that x is accumulated in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast would compute matrix products in 16 bits, where float32 results are expected."""
    # Not asked of is_autocast_available, which torch.compile cannot trace in torch 2.11: only "meta" has none.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
