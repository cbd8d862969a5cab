"""What several tests of the kernels measure with, the layouts that they try, and where the interpreter is kinder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def rounding(exact: Tensor, dtype: torch.dtype, interpreted: bool = False) -> Tensor:
    """The error of merely rounding: what a kernel with float32 inside should come close to.

    interpreted: as Triton's interpreter does it, which cuts bfloat16 off instead.
    """
    if interpreted and dtype == torch.bfloat16:
        return cut_off(exact.float()).double() - exact
    return exact.to(dtype).double() - exact


def cut_off(x: Tensor) -> Tensor:
    """float32 values whose lower half is gone: what Triton's interpreter makes of bfloat16, where a GPU rounds."""
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32)


def strided_views(x: Tensor) -> list[Tensor]:
    """The values of x [A, R, D] behind other strides."""
    wide = torch.full((x.shape[0], 2 * x.shape[1], 3 * x.shape[2]), float("nan"), dtype=x.dtype)
    wide[:, ::2, ::3] = x
    return [x.transpose(0, 2).contiguous().transpose(0, 2), x.mT.contiguous().mT, wide[:, ::2, ::3]]


def far_apart(x: Tensor, file: Path) -> Tensor:
    """The 16-bit values of x [A, R, D] behind strides that 32 bits hold and whose multiples they do not.

    In a file of holes: only the pages of the values themselves are ever read or written.
    """
    strides = 2**30, 2**30 + 2**20, 1
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return torch.from_file(str(file), shared=True, size=size, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


def floats_as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's floating-point arguments reach it in float32; Triton's interpreter passes them on as they are."""
    convert = interpreter._implicit_cvt
    rounded = lambda x: convert(float(np.float32(x)) if isinstance(x, float) else x)  # noqa: E731
    monkeypatch.setattr(interpreter, "_implicit_cvt", rounded)
