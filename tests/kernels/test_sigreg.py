"""sigreg against the paper's integral in complex float64 arithmetic; its ops and slices in every implementation."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from jepa.data.masks import philox4x32
from jepa_kernels import sigreg, sigreg_slices
from jepa_kernels.sigreg import (
    _quadrature,
    sigreg_backward_ref,
    sigreg_backward_triton,
    sigreg_normals_ref,
    sigreg_normals_triton,
    sigreg_table_ref,
    sigreg_table_triton,
)
from numerics import DEVICES, KERNELS_RUN, needs_gpu, rms, rounding, strided_views

IN_CPP = torch._C._dispatch_has_kernel_for_dispatch_key("jepa_kernels::sigreg_table", "CPU")
OP = torch.ops.jepa_kernels
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # V, N, D, S: one of each; partial blocks of rows and slices; sums in parts
    (1, 1, 1, 1),
    (1, 2, 3, 5),
    (3, 1, 7, 64),
    (2, 67, 17, 33),
    (1, 131, 5, 9),
]
# Registered as the CPU kernels, to run under the same public functions; Triton's then run in the interpreter.
KERNELS = {
    "reference": (sigreg_table_ref, sigreg_backward_ref, sigreg_normals_ref),
    "triton": (sigreg_table_triton, sigreg_backward_triton, sigreg_normals_triton),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*operators may also be overridden")


@pytest.fixture(params=KERNELS_RUN)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in KERNELS:
        yield request.param
        return
    names = "sigreg_table", "sigreg_backward", "sigreg_normals_"
    with torch.library._scoped_library("jepa_kernels", "IMPL") as library:
        for name, function in zip(names, KERNELS[request.param], strict=True):
            library.impl(name, function, "CPU", allow_override=True)
        yield request.param


def on(kernel: str, *tensors: Tensor) -> list[Tensor]:
    return [x.to("cuda" if kernel == "cuda" else "cpu") for x in tensors]


def inputs(V: int, N: int, D: int, S: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Embeddings that are not standard normal: other means and variances, skewed; unit columns."""
    z = torch.randn(V, N, D) * (0.3 + 1.5 * torch.rand(V, 1, D)) + torch.randn(V, 1, D)
    slices = torch.randn(D, S)
    return (z + 0.2 * z.square()).to(dtype), slices / slices.norm(dim=0)


def oracle(z: Tensor, slices: Tensor, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """The integral over both signs of t, from the complex empirical characteristic function of every projection."""
    t = torch.linspace(-t_max, t_max, 2 * knots - 1, dtype=torch.float64)
    x = z.double() @ slices.double()
    off = torch.exp(1j * x[..., None] * t).mean(1) - torch.exp(-(t**2) / 2)
    return z.shape[1] * torch.trapezoid((off * off.conj()).real * torch.exp(-(t**2) / 2), t).mean()


def gradient(statistic: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(statistic, z)[0].cpu().double()


@pytest.mark.parametrize(
    ("shape", "knots", "t_max"),
    [*((shape, 17, 3.0) for shape in SHAPES), ((2, 9, 5, 70), 2, 1), ((2, 9, 5, 70), 38, 6.5)],
    ids=str,
)
def test_equals_the_papers_integral(kernel, shape, knots, t_max):
    z, slices = inputs(*shape, torch.float64)
    z_, slices_ = on(kernel, z, slices)
    expected = oracle(z.requires_grad_(), slices, knots, t_max)
    found = sigreg(z_.requires_grad_(), slices_, knots=knots, t_max=t_max)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-11, atol=1e-14)
    grad = gradient(expected, z)
    assert rms(gradient(found, z_) - grad) <= 1e-11 * rms(grad)
    with torch.no_grad():
        assert torch.equal(sigreg(z_, slices_, knots=knots, t_max=t_max), found)


def test_at_many_knots_it_is_the_closed_form_of_epps_and_pulley():
    """Of the integral over all t, of squares of sums of Gaussians."""
    z, slices = inputs(2, 29, 6, 11, torch.float64)
    x = z @ slices.double()
    pairs = torch.exp(-((x[:, :, None] - x[:, None]) ** 2) / 2).mean((1, 2)) * math.tau**0.5
    exact = 29 * (pairs - 2 * math.pi**0.5 * torch.exp(-(x**2) / 4).mean(1) + (math.tau / 3) ** 0.5)
    found = sigreg(z, slices, knots=121, t_max=9.0)
    torch.testing.assert_close(found, exact.mean(), rtol=1e-10, atol=0)


def test_normal_projections_have_the_expected_statistic():
    """N E|c + i s - phi|^2 = 1 - phi^2 if the rows are independent and standard normal."""
    z, slices, count = torch.randn(4, 50, 600), torch.eye(600), 4 * 600
    found = sigreg(z, slices).item()
    _, phi, weight = _quadrature(17, 3.0)
    expected = sum(w**2 * (1 - p**2) for w, p in zip(weight, phi, strict=True))
    assert abs(found - expected) <= 5 * expected / count**0.5  # its standard deviation is below its mean
    assert sigreg(1.5 * z, slices).item() > 2 * expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_precision(kernel, shape, dtype):
    """Computed in float32 for any input dtype; the gradient is rounded once."""
    z, slices = inputs(*shape, dtype)
    exact = z.double().requires_grad_()
    expected = oracle(exact, slices)
    scale = 2.0 ** (9 - gradient(expected, exact).abs().max().log2().floor().item())  # so that float16 holds it
    grad = scale * gradient(oracle(exact, slices), exact)
    z_, slices_ = on(kernel, z, slices)
    found = sigreg(z_.requires_grad_(), slices_)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.item(), expected.item(), rtol=1e-5, atol=0)
    # Terms that cancel in a gradient are as large as the gradient of 16 knots that do not.
    budget = 1.25 * rms(rounding(grad, dtype)) + 1e-5 * rms(grad) + 1e-6 * scale / shape[0]
    assert rms(gradient(scale * found, z_) - grad) <= budget


def test_slices_of_any_dtype(kernel):
    z, slices = inputs(2, 9, 6, 11)
    for dtype in (torch.float64, torch.bfloat16):
        found = sigreg(*on(kernel, z, slices.to(dtype)))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.item(), oracle(z, slices.to(dtype)).item(), rtol=1e-5, atol=0)


def test_autocast_does_not_reach_the_projections(kernel):
    """Autocast around the call or its backward must not lower the matrix products to 16 bits."""
    z, slices = on(kernel, *inputs(2, 31, 67, 40))
    z.requires_grad_()
    results = []
    for dtype in (None, torch.bfloat16):
        with torch.autocast(z.device.type, dtype, enabled=dtype is not None):
            found = sigreg(z, slices)
            results.append([found.detach(), gradient(found, z)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_any_strides(kernel):
    """Including rows-major embeddings, [N, V, D]."""
    z, slices = inputs(3, 11, 7, 20)
    expected = oracle(leaf := z.double().requires_grad_(), slices)
    grad = gradient(expected, leaf)
    slices = slices.T.contiguous().T
    for view in (z.transpose(0, 1).contiguous().transpose(0, 1), *strided_views(z)):
        view, across = on(kernel, view, slices)
        found = sigreg(view.detach().requires_grad_(), across)
        torch.testing.assert_close(found.item(), expected.item(), rtol=1e-5, atol=0)
        view = view.detach().requires_grad_()
        assert rms(gradient(sigreg(view, across), view) - grad) <= 1e-5 * rms(grad)


@pytest.mark.parametrize("size", [1e-12, 1e-4, 30.0, 1e3, 1e6])
def test_tiny_and_large_projections(kernel, size):
    """The angle is reduced exactly; torch's float32 product t x, in the reference, is off by its rounding."""
    step, phi, weight = _quadrature(17, 3.0)
    x, scale = torch.randn(2, 7, 67) * size, torch.ones(1)
    table = OP.sigreg_table(*on(kernel, x), step, phi, weight).cpu()
    exact = sigreg_table_ref(x.double(), step, phi, weight)
    slack = 3 * x.abs().max().item() * 2**-23 if kernel == "reference" else 0
    assert (table - exact).abs().max() <= 7 * (5e-6 + slack)
    grad = OP.sigreg_backward(*on(kernel, x, exact.float(), scale), step, weight).cpu()
    exact_grad = sigreg_backward_ref(x.double(), exact.float().double(), scale.double(), step, weight)
    assert (grad - exact_grad).abs().max() <= (5e-6 + slack) * exact.abs().sum((0, 1)).max()


def test_any_finite_projection_gives_a_finite_statistic_and_an_infinite_one_nan(kernel):
    step, phi, weight = _quadrature(17, 3.0)
    x = (torch.randn(1, 50, 70).sign() * torch.logspace(0, 38, 70)).clamp(-3.4e38, 3.4e38)
    x[0, 3, 69] = torch.inf
    table = OP.sigreg_table(*on(kernel, x), step, phi, weight).cpu()
    bound = 50 * torch.tensor([[w * (1 + p), w] for w, p in zip(weight, phi, strict=True)])
    assert (table[..., :69].abs() <= 1.001 * bound[:, :, None, None]).all()
    assert table[..., 69].isnan().all()


def test_a_nan_reaches_the_statistic_and_the_gradient_of_its_view(kernel):
    z, slices = inputs(3, 9, 5, 11)
    z[1, 6, 2] = torch.nan
    z, slices = on(kernel, z, slices)
    found = sigreg(z.requires_grad_(), slices)
    assert found.isnan()
    assert torch.equal(gradient(found, z).isnan().flatten(1).all(1), torch.tensor([False, True, False]))
    assert not gradient(sigreg(z, slices), z)[[0, 2]].isnan().any()


def test_at_a_collapse_to_zero_there_is_no_gradient_and_elsewhere_there_is(kernel):
    _, slices = inputs(1, 1, 6, 50)
    at_zero, beside = torch.zeros(1, 9, 6), torch.full((1, 9, 6), 0.3)
    for z, moves in ((at_zero, False), (beside, True)):
        z, slices = on(kernel, z, slices)
        found = sigreg(z.requires_grad_(), slices)
        torch.testing.assert_close(found.item(), oracle(z.cpu(), slices.cpu()).item(), rtol=1e-5, atol=0)
        assert gradient(found, z).any() == moves


def test_no_rows(kernel):
    """Of a rank of a group: its table is 0, and its gradient empty."""
    step, phi, weight = _quadrature(17, 3.0)
    x, scale = on(kernel, torch.empty(2, 0, 70), torch.ones(1))
    table = OP.sigreg_table(x, step, phi, weight)
    assert table.shape == (16, 2, 2, 70) and not table.any()
    assert OP.sigreg_backward(x, table, scale, step, weight).shape == x.shape


def test_same_bits_for_any_number_of_threads():
    step, phi, weight = _quadrature(17, 3.0)
    x, scale = torch.randn(2, 300, 170), torch.ones(1)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        table = OP.sigreg_table(x, step, phi, weight)
        drawn = torch.empty(170, 170)
        OP.sigreg_normals_(drawn, 5, 6)
        results.append((table, OP.sigreg_backward(x, table, scale, step, weight), drawn))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert not IN_CPP or all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_only_projections_and_table_are_kept(kernel):
    z, slices = on(kernel, *inputs(2, 40, 16, 150, torch.bfloat16))
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = sigreg(z.requires_grad_(), slices)
    assert found.requires_grad
    assert sum(sizes.values()) <= slices.nbytes + 4 * 2 * 150 * (40 + 2 * 16) + 64


@pytest.mark.parametrize("N", [64, 130])
def test_no_tensor_is_larger_than_the_projections(kernel, N):
    """Neither forward nor backward writes a value per projection and knot."""
    if kernel == "cuda":
        pytest.skip("the profiler counts memory of the CPU")
    z, slices = inputs(2, N, 16, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        sigreg(z.requires_grad_(), slices).backward()
    made = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(made) == 4 * 2 * N * 64


@pytest.mark.slow
def test_gradcheck(kernel):
    z, slices = on(kernel, *inputs(2, 4, 3, 5, torch.float64))
    assert torch.autograd.gradcheck(lambda z: sigreg(z, slices), (z.requires_grad_(),))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.clone, lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)])
def test_opcheck(kernel, layout: Callable[[Tensor], Tensor]):
    step, phi, weight = _quadrature(17, 3.0)
    x, table, scale = on(kernel, layout(torch.randn(2, 9, 70)), torch.randn(16, 2, 2, 70), torch.ones(1))
    opcheck(OP.sigreg_table, (x, step, phi, weight))
    opcheck(OP.sigreg_backward, (x, table, scale, step, weight))
    opcheck(OP.sigreg_normals_, (torch.empty(7, 9, device=x.device), 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device, dynamic, fresh_compiler):
    def step(z: Tensor, seed: int, step: int) -> Tensor:
        return sigreg(z, sigreg_slices(z.shape[2], 33, seed=seed, step=step, device=z.device))

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for i, shape in enumerate(((2, 9, 8), (3, 17, 12), (3, 5, 12))[:: 1 if dynamic else 2]):
        z = torch.randn(shape, device=device)
        results = []
        for function in (compiled, step):
            leaf = z.clone().requires_grad_()
            found = function(leaf, 2**40 + 3, 7 + i)
            found.backward()
            results.append((found, leaf.grad))
        torch.testing.assert_close(results[0], results[1])


def bad(**changes: Any) -> dict[str, Any]:
    return {"z": torch.randn(2, 4, 5), "slices": torch.randn(5, 7)} | changes


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("z", bad(z=torch.randn(4, 5))),
        ("z", bad(z=[1.0])),
        ("z", bad(z=torch.ones(2, 4, 5, dtype=torch.int64))),
        ("z", bad(z=torch.randn(2, 4, 5).to(torch.float8_e4m3fn))),
        ("z", bad(z=torch.randn(0, 4, 5))),
        ("z", bad(z=torch.randn(2, 0, 5))),
        ("z", bad(z=torch.randn(2, 4, 0), slices=torch.randn(0, 7))),
        ("slices", bad(slices=torch.randn(5))),
        ("slices", bad(slices=torch.randn(4, 7))),
        ("slices", bad(slices=torch.randn(5, 0))),
        ("slices", bad(slices=torch.ones(5, 7, dtype=torch.int32))),
        ("slices", bad(slices=torch.randn(5, 7, device="meta"))),
        ("slices", bad(slices=torch.randn(5, 7, requires_grad=True))),
        ("knots", bad(knots=1)),
        ("knots", bad(knots=17.0)),
        ("t_max", bad(t_max=0.0)),
        ("t_max", bad(t_max=float("inf"))),
        ("t_max", bad(t_max=float("nan"))),
    ],
)
def test_bad_input_is_refused(argument, arguments):
    with pytest.raises(ValueError, match=f"sigreg: {argument} "):
        sigreg(**arguments)


@needs_gpu
def test_addresses_beyond_32_bits():
    """More than 2^31 projections (17 GB with the gradient), 0 in all but the last rows."""
    N, S = 2**21 + 3, 1024
    step, phi, weight = _quadrature(3, 3.0)
    x, scale = torch.zeros(1, N, S, device="cuda"), torch.ones(1, device="cuda")
    x[:, -9:] = torch.randn(9, S)
    table = sigreg_table_triton(x, step, phi, weight).cpu().double()
    of_last = sigreg_table_ref(x[:, -9:].cpu().double(), step, phi, weight)
    of_zeros = torch.tensor([[w * (1 - p), 0] for w, p in zip(weight, phi, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(table, of_last + (N - 9) * of_zeros[:, :, None, None], rtol=1e-5, atol=1e-4)
    coefficients = torch.randn(2, 2, 1, S, device="cuda")
    grad = sigreg_backward_triton(x, coefficients, scale, step, weight)
    alone = sigreg_backward_triton(x[:, -9:], coefficients, scale, step, weight)
    assert torch.equal(grad[:, -9:], alone)
    torch.testing.assert_close(
        grad[0, :-9].amax(0), (coefficients[:, 1, 0] * torch.tensor(weight).cuda()[:, None]).sum(0)
    )


# --- slices


def test_slices_are_unit_vectors_of_normals_from_philox(kernel):
    D, S = 13, 21
    seed, step = (int(torch.randint(2**62, ())) for _ in range(2))
    low = 2**32 - 1
    normals = []
    for i in range(-(-D * S // 4)):
        words = philox4x32((i, 0x51C3, step & low, step >> 32), (seed & low, seed >> 32))
        for u, v in (words[:2], words[2:]):
            radius, angle = math.sqrt(-2 * math.log((u + 0.5) / 2**32)), math.tau * v / 2**32
            normals += [radius * math.cos(angle), radius * math.sin(angle)]
    expected = torch.tensor(normals, dtype=torch.float64)[: D * S].view(D, S)
    found = sigreg_slices(D, S, seed=seed, step=step, device="cuda" if kernel == "cuda" else None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), expected / expected.norm(dim=0), rtol=0, atol=2e-7)


def test_slices_point_everywhere():
    """Uniform on the sphere: no mean, covariance 1/D, normal kurtosis for large D; other ones for another step."""
    D, S = 64, 2000
    found = sigreg_slices(D, S, seed=1, step=2).double()
    torch.testing.assert_close(found.norm(dim=0), torch.ones_like(found[0]), rtol=0, atol=1e-6)
    scaled = found * D**0.5
    assert scaled.mean().abs() < 5 / (D * S) ** 0.5
    covariance = scaled @ scaled.T / S - torch.eye(D)
    assert covariance.abs().max() < 6 * (2 / S) ** 0.5
    assert abs(scaled.pow(4).mean().item() - 3 * D / (D + 2)) < 0.1
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 1 + 2**32, "step": 2}):
        assert (found * sigreg_slices(D, S, **other)).sum(0).abs().max() < 0.9


@pytest.mark.parametrize(
    "wrong", [{"D": 0}, {"S": 0}, {"D": 2**20, "S": 2**20}, {"seed": -1}, {"seed": 2**63}, {"step": -1}], ids=str
)
def test_slices_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="sigreg_slices: "):
        sigreg_slices(**{"D": 3, "S": 4, "seed": 0, "step": 0} | wrong)
