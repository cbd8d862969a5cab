"""Argument checks: dtypes and shapes before a launch, the values of an index also in the kernel."""

import torch
from torch import Tensor
from torch.nn import Parameter

# The floating-point dtypes supported. torch's 8-bit ones are not: nothing is computed in them.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Launch options: Triton drops tl.device_assert unless debug is set, which would also enable overflow checks.
ASSERTING = {"debug": True, "sanitize_overflow": False}


def check_floats(op: str, name: str, x: Tensor, shape: str) -> None:
    """Raises `ValueError` unless `x` has a dtype in `FLOATS` and as many axes as `shape` names, e.g. "[B, N, D]"."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor {shape}; got {type(x).__name__}")
    if x.dtype not in FLOATS or x.ndim != shape.count(",") + 1:
        raise ValueError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16 {shape}; got {x.dtype} {list(x.shape)}"
        )


def check_index(op: str, name: str, index: Tensor, sizes: tuple[int | None, ...], rows: int, like: Tensor) -> None:
    """Raises `ValueError` unless `index` is int64 of these sizes (None: any), on `like`'s device, in 0..rows-1.

    Values are checked here on a CPU only: reading them from a GPU would synchronise, so there the kernel asserts. A
    compiled call does not check them here either; the CPU kernels check again.
    """
    if not isinstance(index, Tensor):
        raise ValueError(f"{op}: {name} must be an int64 tensor; got {type(index).__name__}")
    fits = index.ndim == len(sizes) and all(
        want is None or have == want for have, want in zip(index.shape, sizes, strict=True)
    )
    if index.dtype != torch.int64 or not fits or index.device != like.device:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(
            f"{op}: {name} must be int64 of shape [{wanted}] on {like.device}; "
            f"got {index.dtype} of shape {list(index.shape)} on {index.device}"
        )
    if torch.compiler.is_compiling() or index.device.type != "cpu" or type(index) not in (Tensor, Parameter):
        return  # a subclass is a placeholder used in tracing: it has no values
    if index.numel():
        low, high = (int(extreme) for extreme in index.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{op}: {name} contains {low if low < 0 else high}; it must be in 0..{rows - 1}")
