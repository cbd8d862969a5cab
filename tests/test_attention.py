"""Attention against its definition in float64, at the head dims of the published models; every backend that is here."""

import math
import random

import pytest
import torch
from torch import Tensor

from jepa.attention import FLASH, Sequences, _installed, attend, attend_packed, require
from jepa.config import ConfigError

HEAD_DIMS = (80, 88, 64, 32, 24)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
backends = pytest.mark.parametrize(
    "backend",
    [
        "sdpa",
        pytest.param(
            "flash_attn",
            marks=[pytest.mark.skipif(not any(map(_installed, FLASH)), reason="flash_attn is not installed"), cuda],
        ),
        pytest.param(
            "xformers",
            marks=[pytest.mark.skipif(not _installed("xformers"), reason="xformers is not installed"), cuda],
        ),
    ],
)


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, [Kq, H, C] and [K, H, C]."""
    heads = []
    for h in range(q.shape[1]):
        scores = (q[:, h] @ k[:, h].T / math.sqrt(q.shape[-1])).exp()
        heads.append(scores / scores.sum(1, keepdim=True) @ v[:, h])
    return torch.stack(heads, 1)


def sequences(lengths: list[int], device: str) -> Sequences:
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    return Sequences(ends.int(), max(lengths))


def with_gradients(y: Tensor, dy: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def compare(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert float((a.detach().double() - b.detach()).norm() / b.detach().norm()) < tolerance


def inputs_of(Kq: int, K: int, H: int, C: int, device: str, dtype: torch.dtype, lead: tuple[int, ...] = ()) -> list:
    """q, k, v (k and v as the model has them: parts of one matrix) and the output's gradient, exact in `dtype`."""
    kv = torch.randn(*lead, K, 2, H, C, device=device, dtype=dtype).unbind(-3)
    return [*(torch.randn(*lead, Kq, H, C, device=device, dtype=dtype) for _ in range(2)), *kv]


# The output is rounded once and the scores' weights are, before they meet v, another time: a few 2^-8 in bf16.
CASES = [("cpu", torch.float32, 2e-6), pytest.param("cuda", torch.bfloat16, 2**-6, marks=cuda)]


@backends
@pytest.mark.parametrize("C", HEAD_DIMS)
@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
def test_sequences_of_one_length(backend: str, C: int, device: str, dtype: torch.dtype, tolerance: float) -> None:
    if backend != "sdpa" and device == "cpu":
        pytest.skip(f"{backend} runs on a GPU only")
    q, dy, k, v = inputs_of(random.randint(1, 9), random.randint(1, 19), 3, C, device, dtype, lead=(2,))
    fast = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = torch.stack([definition(*one) for one in zip(*exact, strict=True)])
    compare(with_gradients(attend(*fast, backend), dy, fast), with_gradients(wanted, dy, exact), tolerance)


@backends
@pytest.mark.parametrize("C", HEAD_DIMS)
@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"), [*CASES, pytest.param("cuda", torch.float32, 2e-6, marks=cuda)]
)
def test_sequences_end_to_end(backend: str, C: int, device: str, dtype: torch.dtype, tolerance: float) -> None:
    if backend == "xformers" or (backend == "flash_attn" and dtype == torch.float32):
        pytest.skip(f"{backend} does not offer it")
    S = random.randint(1, 5)
    asking, asked = ([random.randint(1, n) for _ in range(S)] for n in (7, 40))
    q, dy, k, v = inputs_of(sum(asking), sum(asked), 3, C, device, dtype)
    fast = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = zip(exact[0].split(asking), exact[1].split(asked), exact[2].split(asked), strict=True)
    wanted = torch.cat([definition(*one) for one in parts])
    got = attend_packed(*fast, sequences(asking, device), sequences(asked, device), backend)
    compare(with_gradients(got, dy, fast), with_gradients(wanted, dy, exact), tolerance)


def test_means_of_sequences() -> None:
    lengths = [random.randint(1, 9) for _ in range(6)]
    x = torch.randn(sum(lengths), 5, requires_grad=True)
    got, wanted = sequences(lengths, "cpu").means(x), torch.stack([part.mean(0) for part in x.split(lengths)])
    torch.testing.assert_close(got, wanted)
    dy = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(got, x, dy)[0], torch.autograd.grad(wanted, x, dy)[0])


@pytest.mark.parametrize(("backend", "package"), [("flash_attn", FLASH), ("xformers", ("xformers",))])
def test_a_backend_that_is_missing_is_asked_for(backend: str, package: tuple[str, ...]) -> None:
    if any(map(_installed, package)):
        require(backend)
    else:
        with pytest.raises(ConfigError, match=r"engine\.attention.*pip install"):
            require(backend)
