"""vicreg against the criterion written out pair by pair in float64; its three ops in every implementation."""

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_kernels import vicreg
from jepa_kernels.covariance import (
    vicreg_backward_ref,
    vicreg_backward_triton,
    vicreg_moments_ref,
    vicreg_moments_triton,
    vicreg_products_ref,
    vicreg_products_triton,
)
from numerics import (
    DEVICES,
    GPU,
    INTERPRETED,
    KERNELS_RUN,
    far_apart,
    needs_gpu,
    needs_interpreter,
    rms,
    rounding,
    strided_views,
)

OP = torch.ops.jepa_kernels
SHAPES = [  # N, M, D: more and fewer rows than channels, partial tiles, sums in parts
    (2, 2, 1),
    (2, 3, 5),
    (3, 2, 2),
    (7, 4, 5),
    (31, 3, 67),
    (131, 2, 71),
    (70, 5, 64),
    (64, 4, 96),
    (5, 2, 577),
    (1021, 2, 3),
]
# Registered as the CPU kernels, to run under the same public function; Triton's then run in the interpreter.
KERNELS = {
    "reference": (vicreg_moments_ref, vicreg_products_ref, vicreg_backward_ref),
    "triton": (vicreg_moments_triton, vicreg_products_triton, vicreg_backward_triton),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*operators may also be overridden")


@pytest.fixture(params=KERNELS_RUN)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in KERNELS:
        yield request.param
        return
    names = "vicreg_moments", "vicreg_products", "vicreg_backward"
    with torch.library._scoped_library("jepa_kernels", "IMPL") as library:
        for name, function in zip(names, KERNELS[request.param], strict=True):
            library.impl(name, function, "CPU", allow_override=True)
        yield request.param


def on(kernel: str, x: Tensor) -> Tensor:
    return x.to("cuda" if kernel == "cuda" else "cpu")


def embeddings(N: int, M: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Views of an image are similar; channels are correlated, with nonzero means and stds below and above gamma."""
    shared, own, mixing = torch.randn(N, 1, D), torch.randn(N, M, D), torch.randn(D, D) / D**0.5
    return ((shared + 0.5 * own) @ (mixing + torch.eye(D)) * (0.2 + 1.5 * torch.rand(D)) + torch.randn(D)).to(dtype)


def criterion(a: Tensor, b: Tensor, gamma: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """VICReg's three terms for two views, each [N, D]."""
    N, D = a.shape
    similarity = (a - b).pow(2).mean()
    std = cov = 0
    for x in (a, b):
        x = x - x.mean(0)
        C = x.T @ x / (N - 1)
        std = std + torch.relu(gamma - (C.diagonal() + eps).sqrt()).mean() / 2
        cov = cov + C.masked_select(~torch.eye(D, dtype=torch.bool)).pow(2).sum() / D
    return similarity, std, cov


def pairwise(z: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> list[Tensor]:
    M = z.shape[1]
    pairs = [criterion(z[:, i], z[:, j], gamma, eps) for i, j in permutations(range(M), 2)]
    return [sum(term) / (M * (M - 1)) for term in zip(*pairs, strict=True)]


def gradients(terms: list[Tensor] | tuple[Tensor, ...], z: Tensor) -> list[Tensor]:
    return [torch.autograd.grad(term, z, retain_graph=True)[0].cpu().double() for term in terms]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_mean_over_ordered_pairs(kernel, shape):
    z = embeddings(*shape, torch.float64)
    z_ = on(kernel, z).requires_grad_()
    z.requires_grad_()
    expected, terms = pairwise(z, 0.9, 1e-3), vicreg(z_, gamma=0.9, eps=1e-3)
    for a, b in zip(terms, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-14)
    for a, b in zip(gradients(terms, z_), gradients(expected, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    with torch.no_grad():
        for a, b in zip(vicreg(z_, gamma=0.9, eps=1e-3), terms, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(9, 1, 4), (4, 1, 9)], ids=str)
def test_one_view_has_no_pair(kernel, shape):
    z = on(kernel, embeddings(*shape, torch.float64)).requires_grad_()
    invariance, variance, covariance = vicreg(z)
    _, std, cov = criterion(z[:, 0].cpu(), z[:, 0].cpu(), 1.0, 1e-4)
    assert invariance == 0 and not torch.autograd.grad(invariance, z, retain_graph=True)[0].any()
    for a, b in zip(gradients([variance, covariance], z), gradients([std, cov], z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close((variance.cpu(), covariance.cpu()), (std, cov), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 2, 1), (5, 3, 5), *SHAPES[3:]], ids=str)
def test_low_precision(kernel, shape, dtype):
    """Computed in float32 for any input dtype; the gradient is rounded once.

    Fewer than four images are left to the float64 test above: x / std of two is +-1, whatever they are.
    """
    z = embeddings(*shape, dtype)
    exact, z_ = z.double().requires_grad_(), on(kernel, z).requires_grad_()
    expected, terms = pairwise(exact), vicreg(z_)
    scales = [2.0 ** (9 - g.abs().max().clamp(min=1e-9).log2().floor().item()) for g in gradients(expected, exact)]
    scaled = [scale * term for scale, term in zip(scales, expected, strict=True)]
    # A few images with similar embeddings are ill-conditioned: float32 rounding of the inputs changes the answer.
    others = []
    for _ in range(4):
        off = (z.double() * (1 + 2**-24 * torch.randn(z.shape, dtype=torch.float64))).requires_grad_()
        there = pairwise(off)
        others.append((there, gradients([scale * term for scale, term in zip(scales, there, strict=True)], off)))
    for i, (a, b) in enumerate(zip(terms, expected, strict=True)):
        assert a.dtype == torch.float32
        atol = 1e-6 * z.double().var().item() ** 2 + 4 * max((b - there[i]).abs().item() for there, _ in others)
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=atol)
    # Scaled so that float16 can represent the gradients.
    results = gradients([scale * term for scale, term in zip(scales, terms, strict=True)], z_)
    for i, (a, b) in enumerate(zip(results, gradients(scaled, exact), strict=True)):
        conditioned = 4 * max(rms(b - there[i]) for _, there in others)
        budget = 1.25 * rms(rounding(b, dtype, kernel == "triton")) + 4e-6 * rms(b) + conditioned + 1e-6
        assert rms(a - b) <= budget


@pytest.mark.parametrize("shape", [(31, 3, 67), (67, 3, 31)], ids=str)
def test_autocast_does_not_reach_the_products(kernel, shape):
    """Autocast around the call or its backward must not lower the matrix products to 16 bits."""
    z = on(kernel, embeddings(*shape)).requires_grad_()
    results = []
    for dtype in (None, torch.bfloat16):
        with torch.autocast(z.device.type, dtype, enabled=dtype is not None):
            terms = vicreg(z)
            with torch.no_grad():
                again = vicreg(z)
            results.append([*terms, *again, *gradients(terms, z)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_product_in_16_bits_is_refused():
    z, mean = embeddings(31, 3, 67), torch.zeros(3, 67)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        OP.vicreg_products(z, mean, 31, True, True, "ieee")


def test_gram_form_when_the_diagonal_dominates(kernel):
    """||C||^2 - ||diag C||^2 cancels if one channel dwarfs the rest: the error is relative to what cancels."""
    z = torch.randn(16, 3, 40, dtype=torch.float64)
    z[:, :, 7] *= 30
    exact = pairwise(z)[2].item()
    var = z.var(0)
    everything = 2 * var.square().sum(1).mean().item() / 40
    assert abs(vicreg(on(kernel, z.float()))[2].item() - exact) <= 1e-6 * (exact + everything)


@pytest.mark.parametrize("N", [5, 40])
def test_large_means_cost_no_digits(kernel, N):
    """The mean is subtracted first: at 1000 sigma, a plain sum of squares would lose six digits."""
    z = torch.randn(N, 3, 17) + 1000
    exact, z_ = z.double().requires_grad_(), on(kernel, z).requires_grad_()
    expected, terms = pairwise(exact), vicreg(z_)
    for a, b in zip(terms, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-3, atol=1e-5)
    for a, b in zip(gradients(terms, z_), gradients(expected, exact), strict=True):
        assert rms(a - b) <= 1e-3 * rms(b)


@pytest.mark.parametrize("shape", [(11, 3, 7), (7, 3, 11)], ids=str)
def test_any_strides(kernel, shape):
    """Including the engine's: its predictions are block-major, [M, N, D]."""
    z = embeddings(*shape)
    expected = vicreg(leaf := z.clone().requires_grad_())
    grads = gradients(expected, leaf)
    for view in (views_major(z), *strided_views(z)):
        view = on(kernel, view).detach().requires_grad_()
        terms = vicreg(view)
        for a, b in zip(terms, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)
        for a, b in zip(gradients(terms, view), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_products_of_a_part_of_the_rows(kernel, gram, keep):
    """As in the distributed case: the statistics are not those of the given rows."""
    z, mean = embeddings(67, 3, 70), torch.randn(3, 70)
    squares, matrix = OP.vicreg_products(on(kernel, z), on(kernel, mean), 100, gram, keep, "ieee")
    x = (z - mean).double().transpose(0, 1)
    exact = (x @ x.mT if gram else (x.mT @ x) * (1 - torch.eye(70))) / 99
    torch.testing.assert_close(squares.cpu().double(), exact.square().sum((1, 2)), rtol=1e-5, atol=0)
    if keep:
        torch.testing.assert_close(matrix.cpu().double(), exact, rtol=1e-4, atol=1e-5)
    else:
        assert not matrix.numel()


@pytest.mark.parametrize("gram", [False, True])
def test_backward_of_a_part_of_the_rows(kernel, gram):
    z, mean, weight = embeddings(71, 3, 70), torch.randn(3, 70), torch.randn(3, 70)
    pull, push = torch.randn(2).unbind()
    matrix = torch.randn((3, 71, 71) if gram else (3, 70, 70))
    arguments = [on(kernel, t) for t in (z, mean, matrix, weight, pull, push)]
    out = OP.vicreg_backward(*arguments, gram, 35, 33, "ieee").cpu().double()
    z, mean, matrix, weight, pull, push = (t.double() for t in (z, mean, matrix, weight, pull, push))
    x = z - mean
    mixed = torch.einsum("inm,mid->nid" if gram else "icd,nic->nid", matrix, x)
    exact = (pull * (z - z.mean(1, keepdim=True)) + weight * x + push * mixed)[35:68]
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("shape", [(9, 2, 67), (67, 2, 9)], ids=str)
def test_tf32_when_asked(precision, shape):
    """CPUs have no TF32; test_compile_targets.py checks that the kernels use it."""
    z = embeddings(*shape)
    exact, z_ = z.double().requires_grad_(), z.cuda().requires_grad_()
    expected, terms = pairwise(exact), vicreg(z_, precision=precision)
    tolerance = 1e-2 if precision == "tf32" else 1e-5
    for a, b in zip(terms, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=1e-5)
    for a, b in zip(gradients(terms, z_), gradients(expected, exact), strict=True):
        assert rms(a - b) <= tolerance * rms(b) + 1e-9


def test_more_chunks_of_rows_than_one_block_combines(kernel):
    z = embeddings(2113, 2, 3)
    mean, scatter, spread = (t.cpu().double() for t in OP.vicreg_moments(on(kernel, z)))
    z = z.double()
    exact = z.mean(0), (z - z.mean(0)).square().sum(0), (z - z.mean(1, keepdim=True)).square().sum()
    for a, b in zip((mean, scatter, spread), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(11, 3, 70), (70, 3, 11)], ids=str)
def test_a_nan_reaches_every_term_and_the_gradient(kernel, shape):
    z = embeddings(*shape)
    z[3, 1, 5] = torch.nan
    z = on(kernel, z).requires_grad_()
    terms = vicreg(z)
    assert all(term.isnan() for term in terms)
    assert torch.autograd.grad(sum(terms), z)[0][:, 1].isnan().all()


def test_same_bits_every_time(kernel):
    for shape in ((130, 2, 67), (67, 2, 130)):
        z = on(kernel, embeddings(*shape, torch.bfloat16)).requires_grad_()
        results = []
        for _ in range(2):
            terms = vicreg(z)
            results.append([*terms, *gradients(terms, z)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(130, 3, 600), (600, 3, 130)], ids=str)
def test_threads_change_no_more_than_the_order_of_a_blas_sum(shape):
    """Enough rows and channels for several tasks; everything but the matrix products has the same bits."""
    z, threads, results = embeddings(*shape).requires_grad_(), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        terms = vicreg(z)
        results.append([*terms, *gradients(terms, z)])
    torch.set_num_threads(threads)
    for result in results[1:]:
        for i in (0, 1, 3, 4):  # invariance and variance
            assert torch.equal(result[i], results[0][i])
        torch.testing.assert_close(result[2], results[0][2], rtol=1e-6, atol=0)
        assert rms(result[5] - results[0][5]) <= 1e-6 * rms(results[0][5])


def kept(z: Tensor) -> int:
    """Bytes other than z that a call with a gradient keeps until its backward."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        terms = vicreg(z)
    sizes.pop(z.untyped_storage().data_ptr(), None)
    assert terms[0].requires_grad
    return sum(sizes.values())


class Allocated(TorchDispatchMode):
    """Counts the bytes allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func) or "zeros" in str(func):
            self.bytes += result.nbytes
        return result


@pytest.mark.parametrize("shape", [(40, 3, 150), (150, 3, 40)], ids=str)
def test_memory_is_one_small_matrix_per_view(kernel, shape):
    N, M, D = shape
    z = on(kernel, embeddings(*shape, torch.bfloat16)).requires_grad_()
    terms = 64 * D  # allowance for the terms and for tensors the size of a mean
    assert kept(z) <= 4 * M * min(N, D) ** 2 + 2 * 4 * M * D + terms


@pytest.mark.parametrize("shape", [(200, 2, 190), (190, 2, 200), (2048, 2, 70), (70, 2, 2048)], ids=str)
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=GPU)])
def test_without_gradient_the_triton_kernels_store_no_matrix(shape, device):
    """Sums in parts (the last two shapes) use a workspace of at most 256 tiles of 64 x 64."""
    N, M, D = shape
    z, mean = embeddings(*shape, torch.bfloat16), torch.zeros(M, D)
    with Allocated() as allocated:
        _, matrix = vicreg_products_triton(z.to(device), mean.to(device), N, N < D, False, "ieee")
    parts = max(N, D) // 256 > 1
    assert not matrix.numel()
    assert allocated.bytes <= (256 * 64 * 64 * 4 if parts else 0) + 4 * M * 16


@pytest.mark.parametrize("shape", [(5, 3, 4), (4, 3, 6)], ids=str)
def test_gradcheck(shape):
    z = embeddings(*shape, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(vicreg, (z,))


def views_major(z: Tensor) -> Tensor:
    return z.transpose(0, 1).contiguous().transpose(0, 1)


def channels_first(z: Tensor) -> Tensor:
    return z.permute(2, 0, 1).contiguous().permute(1, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.clone, views_major, channels_first])
@pytest.mark.parametrize("gram", [False, True])
def test_opcheck(kernel, gram, layout: Callable[[Tensor], Tensor]):
    z = layout(on(kernel, embeddings(7, 3, 9)))
    mean, scatter, _ = vicreg_moments_ref(z)
    _, matrix = vicreg_products_ref(z, mean, 7, gram, True, "ieee")
    one = torch.ones((), device=z.device)
    opcheck(OP.vicreg_moments, (z,))
    for keep in (False, True):
        opcheck(OP.vicreg_products, (z, mean, 7, gram, keep, "ieee"))
    for first, count in ((0, 7), (2, 3), (7, 0)):
        opcheck(OP.vicreg_backward, (z, mean, matrix, scatter, one, one, gram, first, count, "ieee"))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(vicreg, fullgraph=True, dynamic=dynamic)
    for shape in ((12, 3, 8), (17, 4, 9), (5, 4, 9))[:: 1 if dynamic else 2]:
        z = embeddings(*shape).to(device)
        results = []
        for function in (compiled, vicreg):
            x = z.clone().requires_grad_()
            terms = function(x)
            (25 * terms[0] + 25 * terms[1] + terms[2]).backward()
            results.append((terms, x.grad))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("argument", "z", "options"),
    [
        ("z", torch.randn(4, 5), {}),
        ("z", torch.ones(4, 3, 5, dtype=torch.int64), {}),
        ("z", torch.randn(4, 0, 5), {}),
        ("z", torch.randn(1, 3, 5), {}),
        ("z", torch.randn(0, 3, 5), {}),
        ("z", torch.randn(4, 3, 0), {}),
        ("z", torch.randn(4, 3, 5).to(torch.float8_e4m3fn), {}),
        ("gamma and eps", torch.randn(4, 3, 5), {"eps": -1e-4}),
        ("gamma and eps", torch.randn(4, 3, 5), {"gamma": float("nan")}),
        ("precision", torch.randn(4, 3, 5), {"precision": "bf16"}),
    ],
)
def test_bad_input_is_refused(argument, z, options):
    with pytest.raises(ValueError, match=f"vicreg: {argument} "):
        vicreg(z, **options)


@needs_interpreter
@pytest.mark.parametrize("gram", [False, True])
def test_the_triton_kernels_reach_beyond_32_bits(tmp_path, gram):
    z, weight = embeddings(4, 3, 7, torch.bfloat16), torch.randn(3, 7)
    results = []
    for x in (z, far_apart(z, tmp_path / "z")):
        mean, *others = vicreg_moments_triton(x)
        squares, matrix = vicreg_products_triton(x, mean, 4, gram, True, "ieee")
        arguments = x, mean, matrix, weight, *torch.ones(2), gram, 1, 3, "ieee"
        results.append([mean, *others, squares, matrix, vicreg_backward_triton(*arguments)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("N", "device"),
    [
        pytest.param(1037, "cpu", marks=INTERPRETED),
        pytest.param(1037, "cuda", marks=GPU),
        pytest.param(2**20 + 3, "cuda", marks=GPU),
    ],
)
def test_addresses_beyond_32_bits(N, device):
    """More than 2**31 elements on a GPU (16 GB), 0 in all but the last rows, from which the statistics follow."""
    M, D, R = 2, (1024 if N > 2**20 else 64), 40
    last = embeddings(R, M, D, torch.bfloat16).double()
    z = torch.zeros(N, M, D, dtype=torch.bfloat16, device=device)
    z[N - R :] = last
    mean = last.sum(0) / N
    C = (torch.einsum("rmd,rme->mde", last, last) - N * mean[:, :, None] * mean[:, None, :]) / (N - 1)
    off_diagonal = C * (1 - torch.eye(D, dtype=torch.float64))
    found = vicreg_moments_triton(z)
    for a, b in zip(found[:2], (mean, C.diagonal(dim1=1, dim2=2) * (N - 1)), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4 * rms(b))
    squares, matrix = vicreg_products_triton(z, found[0], N, False, True, "ieee")
    torch.testing.assert_close(squares.cpu().double(), off_diagonal.square().sum((1, 2)), rtol=1e-4, atol=0)
    weight, one = torch.randn(M, D, device=device), torch.ones((), device=device)
    grad = vicreg_backward_triton(z, found[0], matrix, weight, one, one, False, 0, N, "ieee")[N - R :]
    exact = vicreg_backward_ref(
        last, mean, off_diagonal, weight.cpu().double(), *[one.cpu().double()] * 2, False, 0, R, "ieee"
    )
    assert rms(grad.cpu().double() - exact) <= 1e-2 * rms(exact)
