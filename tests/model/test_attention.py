"""All installed attention backends against the definition in float64, at the head dims of the published models."""

import math
import random

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor
from torch.library import opcheck

from jepa.config.schema import ConfigError
from jepa.model.attention import FLASH, _installed, attend, require
from jepa.model.packed import Sequences, attend_packed
from numerics import GPU

HEAD_DIMS = (80, 88, 64, 32, 24)
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")  # autograd is a Function around the op


def case(backend: str, device: str, dtype: torch.dtype, packages: tuple[str, ...] = ()) -> ParameterSet:
    """In bf16 the output and the attention weights are rounded: an error of a few 2^-8."""
    missing = [f"{backend} is not installed"] if packages and not any(map(_installed, packages)) else []
    marks = [pytest.mark.skipif(bool(missing), reason=", ".join(missing)), *(GPU if device == "cuda" else [])]
    tolerance = 2e-6 if dtype == torch.float32 else 2**-6
    return pytest.param(backend, device, dtype, tolerance, marks=marks, id=f"{backend} {device} {dtype}")


ANYWHERE = [
    case("sdpa", "cpu", torch.float32),
    case("math", "cpu", torch.float32),
    case("sdpa", "cuda", torch.bfloat16),
    case("flash_attn", "cuda", torch.bfloat16, FLASH),
]
OF_ONE_LENGTH = [*ANYWHERE, case("xformers", "cuda", torch.bfloat16, ("xformers.ops",))]
END_TO_END = [*ANYWHERE, case("sdpa", "cuda", torch.float32)]


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one sequence; q [Kq, H, C], k and v [K, H, C]."""
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
    """Relative to the largest of output and gradients, as with a single key the gradients of q and k are zero."""
    scale = max(float(b.detach().norm()) for b in wanted)
    for a, b in zip(got, wanted, strict=True):
        assert float((a.detach().double() - b.detach()).norm()) < tolerance * scale


def inputs_of(Kq: int, K: int, H: int, C: int, device: str, dtype: torch.dtype, lead: tuple[int, ...] = ()) -> list:
    """q, output gradient, k and v, exact in `dtype`; k and v are views of one matrix, as in the model."""
    kv = torch.randn(*lead, K, 2, H, C, device=device, dtype=dtype).unbind(-3)
    return [*(torch.randn(*lead, Kq, H, C, device=device, dtype=dtype) for _ in range(2)), *kv]


@pytest.mark.parametrize(("backend", "device", "dtype", "tolerance"), OF_ONE_LENGTH)
def test_sequences_of_one_length(backend: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    require(backend)
    for C in HEAD_DIMS:
        q, dy, k, v = inputs_of(random.randint(1, 9), random.randint(1, 19), 3, C, device, dtype, lead=(2,))
        fast = [x.detach().requires_grad_() for x in (q, k, v)]
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        wanted = torch.stack([definition(*one) for one in zip(*exact, strict=True)])
        compare(with_gradients(attend(*fast, backend), dy, fast), with_gradients(wanted, dy, exact), tolerance)


@pytest.mark.parametrize(("backend", "device", "dtype", "tolerance"), END_TO_END)
def test_sequences_end_to_end(backend: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    require(backend)
    for C in HEAD_DIMS:
        S = random.randint(1, 5)
        asking, asked = ([random.randint(1, n) for _ in range(S)] for n in (7, 40))
        q, dy, k, v = inputs_of(sum(asking), sum(asked), 3, C, device, dtype)
        fast = [x.detach().requires_grad_() for x in (q, k, v)]
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        parts = zip(exact[0].split(asking), exact[1].split(asked), exact[2].split(asked), strict=True)
        wanted = torch.cat([definition(*one) for one in parts])
        got = attend_packed(*fast, sequences(asking, device), sequences(asked, device), backend)
        compare(with_gradients(got, dy, fast), with_gradients(wanted, dy, exact), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_op_keeps_its_promises(dtype: torch.dtype) -> None:
    """Schema, fake, strides and autograd registration, forward and backward; permuted inputs, as in the model."""
    q, dy, k, v = (x.transpose(1, 2) for x in inputs_of(5, 7, 3, 24, "cpu", dtype, lead=(2,)))
    opcheck(torch.ops.jepa.attention, (q, k, v), test_utils=CHECKS)
    y, logsumexp = torch.ops.jepa.attention(q, k, v)
    opcheck(torch.ops.jepa.attention_backward, (dy, q, k, v, y, logsumexp), test_utils=CHECKS)


def test_gradients_in_float64() -> None:
    q, _, k, v = inputs_of(4, 6, 2, 8, "cpu", torch.float64, lead=(2,))
    assert torch.autograd.gradcheck(lambda *x: attend(*x), [x.detach().requires_grad_() for x in (q, k, v)])


@pytest.mark.slow
def test_compiled_for_all_lengths_at_once() -> None:
    """One graph serves lengths of every residue modulo 8."""
    torch._dynamo.reset()
    compiled = torch.compile(attend, dynamic=True, fullgraph=True)
    for step, length in enumerate(random.sample(range(17, 97), 12)):
        q, dy, k, v = inputs_of(length - 8, length, 3, 24, "cpu", torch.float32, lead=(2,))
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            got = with_gradients(compiled(*inputs), dy, inputs)
        for a, b in zip(got, with_gradients(attend(*inputs), dy, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_means_of_sequences() -> None:
    lengths = [random.randint(1, 9) for _ in range(6)]
    x = torch.randn(sum(lengths), 5, requires_grad=True)
    got, wanted = sequences(lengths, "cpu").means(x), torch.stack([part.mean(0) for part in x.split(lengths)])
    torch.testing.assert_close(got, wanted)
    dy = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(got, x, dy)[0], torch.autograd.grad(wanted, x, dy)[0])


@pytest.mark.parametrize(("backend", "package"), [("flash_attn", FLASH), ("xformers", ("xformers.ops",))])
def test_a_backend_that_is_missing_is_asked_for(backend: str, package: tuple[str, ...]) -> None:
    if any(map(_installed, package)):
        require(backend)
    else:
        with pytest.raises(ConfigError, match=r"engine\.attention.*pip install"):
            require(backend)
