"""gather_tokens: the copy is exact, and the gradient is bit for bit the float32 sum in the order of k."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from jepa_kernels import gather_tokens
from jepa_kernels.gather import gather_backward_ref, gather_backward_triton, gather_ref, gather_triton
from numerics import DEVICES, cut_off, far_apart, implementations, needs_gpu, needs_interpreter, strided_views

OP = torch.ops.jepa_kernels
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [  # B, N, K, D
    (0, 5, 3, 4),
    (2, 5, 0, 4),
    (2, 5, 3, 0),
    (1, 1, 1, 1),
    (3, 17, 7, 13),
    (2, 67, 131, 65),  # K > N: there must be repeats
    (2, 196, 51, 768),
    (1, 256, 69, 1280),
]
forwards = pytest.mark.parametrize(("gather", "device"), implementations(OP.gather, gather_ref, gather_triton))
backwards = pytest.mark.parametrize(
    ("gather_backward", "device"), implementations(OP.gather_backward, gather_backward_ref, gather_backward_triton)
)


def random_index(B: int, N: int, K: int) -> Tensor:
    return torch.randint(max(N, 1), (B, K))


@forwards
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_copied(gather, device, dtype, shape):
    B, N, K, D = shape
    x, index = torch.randn(B, N, D).to(dtype), random_index(B, N, K)
    expected = np.take_along_axis(x.double().numpy(), index[:, :, None].numpy(), axis=1)
    y = gather(x.to(device), index.to(device)).cpu()
    assert y.dtype == dtype and y.is_contiguous()
    np.testing.assert_array_equal(y.double().numpy(), expected)


@forwards
def test_any_strides(gather, device):
    x, index = torch.randn(3, 17, 70), random_index(17, 17, 3).T[:, ::2]
    for view in [*strided_views(x), x[:1].expand(3, 17, 70)]:
        expected = torch.from_numpy(np.take_along_axis(view.numpy(), index[:, :, None].numpy(), axis=1))
        assert torch.equal(gather(view.to(device), index.to(device)).cpu(), expected)


@pytest.mark.slow
@backwards
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_sums_repeats_in_order(gather_backward, device, dtype, shape):
    """Compared with a loop over k in float32: the same additions in the same order give the same bits."""
    B, N, K, D = shape
    dy, index = torch.randn(B, K, D).to(dtype), random_index(B, N, K)
    total = np.zeros((B, N, D), np.float64 if dtype == torch.float64 else np.float32)
    for b in range(B):
        for k in range(K):
            total[b, index[b, k]] += dy[b, k].to(torch.float64).numpy().astype(total.dtype)
    expected = torch.from_numpy(total)
    if gather_backward is gather_backward_triton and dtype == torch.bfloat16 and device == "cpu":
        expected = cut_off(expected)
    dx = gather_backward(dy.to(device), index.to(device), N).cpu()
    assert dx.dtype == dtype and dx.is_contiguous()
    assert torch.equal(dx, expected.to(dtype))


@backwards
def test_gradient_of_any_strides(gather_backward, device):
    dy, index = torch.randn(3, 19, 70), random_index(3, 11, 19)
    expected = gather_backward_ref(dy, index, 11)
    for view in strided_views(dy):
        assert torch.equal(gather_backward(view.to(device), index.to(device), 11).cpu(), expected)
    summed = gather_backward(torch.ones(()).expand(3, 19, 70).to(device), index.to(device), 11).cpu()
    counts = torch.stack([row.bincount(minlength=11) for row in index])
    assert torch.equal(summed, counts[:, :, None].expand(3, 11, 70).float())


def test_gradient_does_not_depend_on_threads():
    N = 1500  # 12,000 rows, 992 per task
    dy, index = torch.randn(8, 2000, 33, dtype=torch.bfloat16), random_index(8, N, 2000)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(OP.gather_backward(dy, index, N))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    x = torch.randn(3, 7, 5, dtype=torch.float64, device=device, requires_grad=True)
    index = random_index(3, 7, 11).to(device)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, index), (x,))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, dy = torch.randn(3, 17, 8, device=device), torch.randn(3, 5, 8, device=device)
    index = random_index(3, 17, 5).to(device)
    permuted = index.T.contiguous().T
    opcheck(OP.gather, (x, index))
    opcheck(OP.gather, (x.permute(2, 0, 1).contiguous().permute(1, 2, 0), permuted))
    opcheck(OP.gather_backward, (dy, index, 17))
    opcheck(OP.gather_backward, (dy.permute(2, 0, 1).contiguous().permute(1, 2, 0), permuted, 17))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(lambda x, i: 2 * gather_tokens(x, i), fullgraph=True, dynamic=dynamic)
    for B, N, K, D in ((2, 9, 5, 8), (3, 16, 7, 12)):
        x, dy = torch.randn(B, N, D, device=device), torch.randn(B, K, D, device=device)
        index = random_index(B, N, K).to(device)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        with torch._dynamo.config.patch(error_on_recompile=dynamic):  # dynamic: one graph for all sizes
            outputs = [compiled(inputs[0], index), 2 * gather_tokens(inputs[1], index)]
        for y in outputs:
            y.backward(dy)
        assert torch.equal(*outputs) and torch.equal(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("wrong", [-1, 17])
def test_an_index_out_of_range_is_refused(wrong):
    x, index = torch.randn(2, 17, 4), random_index(2, 17, 5)
    index[1, 3] = wrong
    with pytest.raises(ValueError, match=f"index.* {wrong};"):
        gather_tokens(x, index)
    for call in (OP.gather, torch.compile(gather_tokens, fullgraph=True)):
        with pytest.raises((RuntimeError, IndexError)):  # nothing is read out of bounds
            call(x, index)


@needs_interpreter
def test_the_kernel_asserts_its_index(monkeypatch):
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    x, index = torch.randn(2, 17, 4), random_index(2, 17, 5)
    gather_triton(x, index)
    index[1, 3] = 17
    with pytest.raises(interpreter.InterpreterError, match="gather_tokens"):
        gather_triton(x, index)


@pytest.mark.parametrize(
    ("x", "index", "name"),
    [
        (torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.int64), "x"),
        (torch.ones(2, 3, 4, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int64), "x"),
        (torch.ones(2, 3, 4).to(torch.float8_e4m3fn), torch.zeros(2, 1, dtype=torch.int64), "x"),
        ([[[1.0]]], torch.zeros(1, 1, dtype=torch.int64), "x"),
        (torch.ones(2, 3, 4), torch.zeros(2, 1, dtype=torch.int32), "index"),
        (torch.ones(2, 3, 4), [[0], [1]], "index"),
        (torch.ones(2, 3, 4), torch.zeros(3, 1, dtype=torch.int64), "index"),
        (torch.ones(2, 3, 4), torch.zeros(2, dtype=torch.int64), "index"),
        (torch.ones(2, 3, 4), torch.zeros(2, 1, dtype=torch.int64, device="meta"), "index"),
    ],
)
def test_bad_arguments_are_named(x, index, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        gather_tokens(x, index)


def test_addresses_beyond_32_bits(tmp_path):
    """A row whose offset does not fit in 31 bits, in a sparse file of which only the selected rows are read."""
    N, D = 2**20 + 3, 2**11
    x = torch.from_file(str(tmp_path / "x"), shared=True, size=N * D, dtype=torch.float16).view(1, N, D)
    x[0, N - 2] = torch.arange(D)
    y = OP.gather(x, torch.tensor([[N - 2, 0]]))
    assert torch.equal(y[0, 0], torch.arange(D).half()) and not y[0, 1].any()


@needs_interpreter
def test_the_triton_kernels_reach_beyond_32_bits(tmp_path):
    x, index = torch.randn(4, 3, 7).half(), random_index(4, 3, 3)
    far = far_apart(x, tmp_path / "x")
    assert torch.equal(gather_triton(far, index), gather_ref(x, index))
    assert torch.equal(gather_backward_triton(far, index, 5), gather_backward_ref(x, index, 5))


@needs_gpu
def test_addresses_beyond_32_bits_on_a_gpu():
    """Needs 9 GB."""
    N, D = 2**20 + 3, 2**11
    x = torch.zeros(1, N, D, dtype=torch.float16, device="cuda")
    x[0, N - 2] = torch.arange(D)
    index = torch.tensor([[N - 2, 0]], device="cuda")
    y = gather_triton(x, index)
    assert torch.equal(y[0, 0], x[0, N - 2]) and not y[0, 1].any()
    assert torch.equal(gather_backward_triton(y, index, N), x)


def test_index_values_in_a_parameter_are_checked_too():
    index = torch.nn.Parameter(torch.full((2, 1), 3), requires_grad=False)
    with pytest.raises(ValueError, match="index contains 3"):
        gather_tokens(torch.ones(2, 3, 4), index)
