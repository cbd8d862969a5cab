"""Shared by the numeric tests: the devices they run on, error measures, memory layouts, and where Triton's interpreter
differs from a GPU.

`pytest -m gpu` selects the tests that use a GPU; without one they are skipped. Triton's kernels are compiled where
there is a GPU, and interpreted where there is none (conftest.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

CUDA = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")]
INTERPRETED = [pytest.mark.skipif(CUDA, reason="where there is a GPU, Triton compiles for it")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
KERNELS_RUN = [
    "cpu", "reference", pytest.param("triton", marks=INTERPRETED), pytest.param("cuda", marks=GPU)
]  # fmt: skip


def needs_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test that can only run on a GPU."""
    for mark in GPU:
        test = mark(test)
    return test


needs_interpreter = INTERPRETED[0]


def implementations(in_cpp: Any, reference: Any, triton: Any) -> list[Any]:
    """(function, device) for each implementation of an op: Triton's interpreted on the CPU, or compiled on a GPU."""
    return [
        pytest.param(in_cpp, "cpu", id="cpu"),
        pytest.param(reference, "cpu", id="reference"),
        pytest.param(triton, "cpu", id="triton", marks=INTERPRETED),
        pytest.param(triton, "cuda", id="cuda", marks=GPU),
    ]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def rounding(exact: Tensor, dtype: torch.dtype, interpreted: bool = False) -> Tensor:
    """The error of rounding `exact` to dtype: a kernel that computes in float32 should come close to it.

    interpreted: as Triton's interpreter does it, which truncates to bfloat16.
    """
    if interpreted and dtype == torch.bfloat16:
        return cut_off(exact.float()).double() - exact
    return exact.to(dtype).double() - exact


def cut_off(x: Tensor) -> Tensor:
    """float32 values truncated to bfloat16, as Triton's interpreter does; a GPU rounds."""
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32)


def strided_views(x: Tensor) -> list[Tensor]:
    """The values of x [A, R, D] with other strides."""
    wide = torch.full((x.shape[0], 2 * x.shape[1], 3 * x.shape[2]), float("nan"), dtype=x.dtype)
    wide[:, ::2, ::3] = x
    return [x.transpose(0, 2).contiguous().transpose(0, 2), x.mT.contiguous().mT, wide[:, ::2, ::3]]


def far_apart(x: Tensor, file: Path) -> Tensor:
    """The 16-bit values of x [A, R, D] with strides that fit in 32 bits and offsets that do not.

    In a sparse file: only the pages that hold the values are ever read or written.
    """
    strides = 2**30, 2**30 + 2**20, 1
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return torch.from_file(str(file), shared=True, size=size, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


def floats_as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Triton's interpreter round a kernel's floating-point arguments to float32, as compiled kernels get them."""
    convert = interpreter._implicit_cvt
    rounded = lambda x: convert(float(np.float32(x)) if isinstance(x, float) else x)  # noqa: E731
    monkeypatch.setattr(interpreter, "_implicit_cvt", rounded)
