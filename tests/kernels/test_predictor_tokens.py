"""predictor_tokens against loops in float64: one addition, rounded once; gradients summed in float32."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from jepa_kernels import predictor_tokens
from jepa_kernels.predictor_tokens import (
    _predictor_tokens_kernel,
    predictor_tokens_backward_ref,
    predictor_tokens_backward_triton,
    predictor_tokens_ref,
    predictor_tokens_triton,
)
from numerics import DEVICES, far_apart, implementations, needs_gpu, needs_interpreter, strided_views

OP = torch.ops.jepa_kernels
DTYPES = [  # context; pos and mask token
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]
SHAPES = [  # M, B, Kc, Kt, N, D
    (0, 2, 3, 4, 5, 6),
    (2, 0, 3, 4, 5, 6),
    (2, 3, 0, 4, 5, 6),
    (2, 3, 4, 0, 5, 6),
    (2, 3, 4, 5, 6, 0),
    (1, 1, 1, 1, 1, 1),
    (3, 5, 7, 11, 13, 17),
    (2, 1, 3, 2, 4, 2056),  # wider than eleven chunks of columns
    (2, 3, 64, 32, 37, 131),  # the context ends on a tile boundary
    (4, 2, 69, 44, 256, 384),
]
forwards = pytest.mark.parametrize(
    ("op", "device"), implementations(OP.predictor_tokens, predictor_tokens_ref, predictor_tokens_triton)
)
backwards = pytest.mark.parametrize(
    ("op", "device"),
    implementations(OP.predictor_tokens_backward, predictor_tokens_backward_ref, predictor_tokens_backward_triton),
)


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype, table: torch.dtype) -> tuple[Tensor, ...]:
    """context, context_index, target_index, pos, mask_token"""
    M, B, Kc, Kt, N, D = shape
    indices = torch.randint(N, (B, Kc)), torch.randint(N, (M, B, Kt))
    return torch.randn(B, Kc, D).to(dtype), *indices, torch.randn(N, D).to(table), torch.randn(D).to(table)


def by_loops(context: Tensor, context_index: Tensor, target_index: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
    (M, B, Kt), (_, Kc, D) = target_index.shape, context.shape
    y = torch.zeros(M * B, Kc + Kt, D, dtype=torch.float64)
    for m in range(M):
        for b in range(B):
            for k in range(Kc):
                y[m * B + b, k] = context[b, k].double() + pos[context_index[b, k]].double()
            for t in range(Kt):
                y[m * B + b, Kc + t] = mask.double() + pos[target_index[m, b, t]].double()
    return y


def within_rounding(value: Tensor, exact: Tensor, interpreted: bool) -> bool:
    """Whether the error is that of rounding `exact` once, or twice that where the interpreter truncates to bfloat16."""
    rounding = exact.to(value.dtype).double() - exact
    budget = 2.5 if interpreted and value.dtype == torch.bfloat16 else 1.25
    if exact.numel() < 512:  # too few for an RMS: each within its own last bit, or half of it
        bit = torch.finfo(value.dtype).eps * exact.abs() * (1 if budget > 2 else 0.5)
        return bool(((value.double() - exact).abs() <= 1.01 * bit + 2**-22).all())
    return bool((value.double() - exact).norm() <= budget * rounding.norm())


@forwards
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens(op, device, dtypes, shape):
    M, B, Kc, Kt, _, D = shape
    inputs = random_inputs(shape, *dtypes)
    y = op(*(tensor.to(device) for tensor in inputs)).cpu()
    assert y.dtype == dtypes[0] and y.shape == (M * B, Kc + Kt, D) and y.is_contiguous()
    assert within_rounding(y, by_loops(*inputs), op is predictor_tokens_triton and device == "cpu")


@forwards
def test_any_strides(op, device):
    context, context_index, target_index, pos, mask = random_inputs((3, 5, 7, 11, 13, 17), *DTYPES[0])
    expected = by_loops(context, context_index, target_index, pos, mask)
    rest = (
        context_index.T.contiguous().T,
        target_index.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        pos.T.contiguous().T,
        mask.repeat_interleave(2)[::2],
    )
    for view in strided_views(context):
        y = op(view.to(device), *(tensor.to(device) for tensor in rest)).cpu()
        assert within_rounding(y, expected, interpreted=False)


@backwards
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(op, device, dtype, shape):
    M, B, Kc, Kt, _, D = shape
    dy = torch.randn(M * B, Kc + Kt, D).to(dtype)
    d_context, d_mask = (grad.cpu() for grad in op(dy.to(device), M, B, Kc))
    wide = dy.double().view(M, B, Kc + Kt, D)
    assert d_context.dtype == dtype and d_context.is_contiguous() and d_context.shape == (B, Kc, D)
    assert d_mask.dtype == torch.promote_types(dtype, torch.float32)  # unrounded sums: the caller rounds
    exact, terms = wide[:, :, Kc:].sum((0, 1, 2)), wide[:, :, Kc:].abs().sum((0, 1, 2))
    last_bit = torch.finfo(d_mask.dtype).eps / 2
    assert ((d_mask.double() - exact).abs() <= (M * Kt + B) * last_bit * terms).all()
    exact, terms = wide[:, :, :Kc].sum(0), wide[:, :, :Kc].abs().sum(0)
    if d_context.dtype in (torch.float32, torch.float64):
        assert ((d_context.double() - exact).abs() <= M * last_bit * terms).all()
    else:
        assert within_rounding(d_context, exact, op is predictor_tokens_backward_triton and device == "cpu")


@backwards
def test_gradients_of_any_strides(op, device):
    M, B, Kc, S, D = 3, 5, 7, 18, 17
    dy = torch.randn(M * B, S, D)
    for view in [*strided_views(dy), torch.ones(()).expand(M * B, S, D)]:
        results = op(view.to(device), M, B, Kc)
        expected = predictor_tokens_backward_ref(view.double(), M, B, Kc)
        for value, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(value.cpu().double(), exact, rtol=1e-5, atol=1e-4)


@backwards
def test_gradients_repeat_bit_for_bit(op, device):
    dy = torch.randn(4 * 6, 50, 65, dtype=torch.bfloat16, device=device)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3) if op is OP.predictor_tokens_backward else (threads, threads):
        torch.set_num_threads(count)
        results.append(op(dy, 4, 6, 20))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(results[0], again, strict=True))


@needs_interpreter
def test_the_triton_kernels_reach_beyond_32_bits(tmp_path):
    context, *rest = random_inputs((2, 4, 3, 2, 5, 7), torch.float16, torch.float16)
    far = far_apart(context, tmp_path / "context")
    assert torch.equal(predictor_tokens_triton(far, *rest), predictor_tokens_triton(context, *rest))
    for a, b in zip(*(predictor_tokens_backward_triton(x, 2, 2, 1) for x in (far, context)), strict=True):
        assert torch.equal(a, b)


@needs_interpreter
def test_triton_sequences_beyond_32_bits(tmp_path):
    """The first image's sequences, up to the last block, in a batch whose other images are not computed."""
    M, B, Kc, Kt, N, D = 3, 2**20, 2, 2, 5, 512
    context, seen, asked, *tables = random_inputs((M, 1, Kc, Kt, N, D), torch.float16, torch.float16)
    where = torch.from_file(str(tmp_path / "index"), shared=True, size=M * B * Kt, dtype=torch.int64).view(M, B, Kt)
    where[:, :1] = asked
    size = M * B * (Kc + Kt) * D
    y = torch.from_file(str(tmp_path / "y"), shared=True, size=size, dtype=torch.float16).view(M * B, Kc + Kt, D)
    _predictor_tokens_kernel[(1,)](
        context, seen, where, *tables, y, B, Kc, Kt, N, *context.stride(), M, D, BLOCK_S=4, BLOCK_D=512
    )
    assert torch.equal(y[::B], predictor_tokens_triton(context, seen, asked, *tables))


@needs_gpu
def test_addresses_beyond_32_bits_on_a_gpu():
    """The last image of a result of more than 2^31 elements, and its gradient, are as if computed alone.

    Needs 14 GB.
    """
    M, B, Kc, Kt, D = 2, 2**15 + 1, 17, 16, 1024
    context = torch.zeros(B, Kc, D, dtype=torch.bfloat16, device="cuda")
    context[-1] = torch.randn(Kc, D)
    pos, mask = torch.randn(7, D, device="cuda"), torch.randn(D, device="cuda")
    seen, asked = (torch.randint(7, shape, device="cuda") for shape in ((B, Kc), (M, B, Kt)))
    y = predictor_tokens_triton(context, seen, asked, pos, mask)
    alone = predictor_tokens_triton(context[-1:], seen[-1:], asked[:, -1:], pos, mask)
    assert torch.equal(y.view(M, B, Kc + Kt, D)[:, -1], alone)
    d_context, _ = predictor_tokens_backward_triton(y, M, B, Kc)
    assert torch.equal(d_context[-1:], predictor_tokens_backward_triton(alone, M, 1, Kc)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    inputs = random_inputs((3, 2, 4, 5, 7, 3), torch.float64, torch.float64)
    context, context_index, target_index, pos, mask = (tensor.to(device) for tensor in inputs)
    assert torch.autograd.gradcheck(
        lambda context, mask: predictor_tokens(context, context_index, target_index, pos, mask),
        (context.requires_grad_(), mask.requires_grad_()),
    )


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_argument(table):
    context, context_index, target_index, pos, mask = random_inputs((2, 3, 4, 5, 6, 8), torch.bfloat16, table)
    context.requires_grad_()
    mask.requires_grad_()
    predictor_tokens(context, context_index, target_index, pos, mask).sum().backward()
    assert context.grad.dtype == torch.bfloat16 and torch.equal(context.grad, torch.full_like(context, 2))
    assert mask.grad.dtype == table and torch.equal(mask.grad, torch.full_like(mask, 30))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    inputs = tuple(tensor.to(device) for tensor in random_inputs((2, 3, 4, 5, 7, 8), *DTYPES[0]))
    context, context_index, target_index, pos, mask = inputs
    opcheck(OP.predictor_tokens, inputs)
    permuted = context.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    indices = context_index.T.contiguous().T, target_index.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    opcheck(OP.predictor_tokens, (permuted, *indices, pos.T.contiguous().T, mask))
    dy = torch.randn(6, 9, 8, device=device)
    opcheck(OP.predictor_tokens_backward, (dy, 2, 3, 4))
    opcheck(OP.predictor_tokens_backward, (dy.permute(2, 0, 1).contiguous().permute(1, 2, 0), 2, 3, 4))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(lambda *inputs: 2 * predictor_tokens(*inputs), fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 4, 5, 9, 8), (4, 2, 6, 7, 16, 12)):
        inputs = [tensor.to(device) for tensor in random_inputs(shape, torch.bfloat16, torch.float32)]
        results = []
        for call in (compiled, lambda *inputs: 2 * predictor_tokens(*inputs)):
            context, mask = (tensor.detach().clone().requires_grad_() for tensor in (inputs[0], inputs[4]))
            with torch._dynamo.config.patch(error_on_recompile=dynamic):  # dynamic: one graph for all sizes
                y = call(context, *inputs[1:4], mask)
            y.backward(torch.ones_like(y))
            results.append((y, context.grad, mask.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["context_index", "target_index"])
@pytest.mark.parametrize("wrong", [-1, 13])
def test_an_index_out_of_range_is_refused(name, wrong):
    inputs = random_inputs((3, 5, 7, 11, 13, 17), *DTYPES[0])
    inputs[1 if name == "context_index" else 2][..., 4, 3] = wrong
    with pytest.raises(ValueError, match=f"{name}.* {wrong};"):
        predictor_tokens(*inputs)
    with pytest.raises((RuntimeError, IndexError)):  # nothing is read out of bounds
        OP.predictor_tokens(*inputs)


@needs_interpreter
def test_the_kernel_asserts_its_indices(monkeypatch):
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    for which in (1, 2):
        inputs = random_inputs((3, 5, 7, 11, 13, 17), *DTYPES[0])
        predictor_tokens_triton(*inputs)
        inputs[which][..., 4, 3] = 13
        with pytest.raises(interpreter.InterpreterError, match="predictor_tokens"):
            predictor_tokens_triton(*inputs)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"context": torch.ones(3, 4, 8, dtype=torch.int32)}, "context"),
        ({"context": torch.ones(3, 4, 8).to(torch.float8_e4m3fn)}, "context"),
        ({"context": torch.ones(3, 8)}, "context"),
        ({"context_index": torch.zeros(3, 5, dtype=torch.int64)}, "context_index"),
        ({"context_index": torch.zeros(3, 4)}, "context_index"),
        ({"target_index": torch.zeros(2, 4, 5, dtype=torch.int64)}, "target_index"),
        ({"target_index": torch.zeros(3, 5, dtype=torch.int64)}, "target_index"),
        ({"target_index": torch.zeros(2, 3, 5, dtype=torch.int64, device="meta")}, "target_index"),
        ({"pos": torch.zeros(7, 9)}, "pos"),
        ({"pos": torch.zeros(7, 8, dtype=torch.float64)}, "pos"),
        ({"pos": torch.zeros(7, 8, device="meta")}, "pos"),
        ({"pos": torch.zeros(7, 8, requires_grad=True)}, "pos"),
        ({"mask_token": torch.zeros(1, 8)}, "mask_token"),
        ({"mask_token": torch.zeros(8, dtype=torch.bfloat16)}, "mask_token"),
    ],
)
def test_bad_arguments_are_named(changed, name):
    names = ("context", "context_index", "target_index", "pos", "mask_token")
    inputs = random_inputs((2, 3, 4, 5, 7, 8), *DTYPES[0])
    with pytest.raises(ValueError, match=f"predictor_tokens: {name} (must be|requires)"):
        predictor_tokens(**(dict(zip(names, inputs, strict=True)) | changed))


@torch.no_grad()
def test_learned_positions_may_be_read_without_a_gradient():
    context, context_index, target_index, pos, mask_token = random_inputs((2, 3, 4, 5, 7, 8), *DTYPES[0])
    learned = torch.nn.Parameter(pos.clone())
    tokens = predictor_tokens(context, context_index, target_index, learned, mask_token)
    assert torch.equal(tokens, predictor_tokens(context, context_index, target_index, pos, mask_token))
