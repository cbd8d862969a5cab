"""prediction_loss against a float64 derivation: values, gradients, and what it must not change."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from triton.runtime import interpreter

from jepa_kernels import prediction_loss
from jepa_kernels.prediction_loss import (
    prediction_loss_ref,
    prediction_loss_scale_ref,
    prediction_loss_scale_triton,
    prediction_loss_triton,
)
from numerics import (
    CUDA,
    DEVICES,
    KERNELS_RUN,
    far_apart,
    floats_as_compiled,
    needs_gpu,
    needs_interpreter,
    rms,
    rounding,
)

IN_CPP = torch._C._dispatch_has_kernel_for_dispatch_key("jepa_kernels::prediction_loss", "CPU")
OP = torch.ops.jepa_kernels
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [  # M, B, N, K, D
    (1, 1, 1, 1, 1),
    (1, 1, 3, 2, 17),
    (3, 2, 7, 5, 13),
    (2, 3, 11, 4, 127),
    (4, 2, 196, 33, 384),
    (4, 1, 256, 11, 1280),
    (2, 1, 5, 3, 2056),  # too wide for one warp per row
]
EMPTY = [(0, 2, 5, 3, 4), (2, 0, 5, 3, 4), (2, 3, 5, 0, 4), (2, 3, 5, 3, 0)]
# Registered as the CPU kernels, to run under the same public function; Triton's then run in the interpreter.
KERNELS = {
    "reference": (prediction_loss_ref, prediction_loss_scale_ref),
    "triton": (prediction_loss_triton, prediction_loss_scale_triton),
}


pytestmark = pytest.mark.filterwarnings("ignore:.*operators may also be overridden")


@pytest.fixture(params=KERNELS_RUN)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    floats_as_compiled(monkeypatch)
    if request.param not in KERNELS:
        yield request.param
        return
    with torch.library._scoped_library("jepa_kernels", "IMPL") as library:
        for name, function in zip(("prediction_loss", "prediction_loss_scale_"), KERNELS[request.param], strict=True):
            library.impl(name, function, "CPU", allow_override=True)
        yield request.param


def on(kernel: str, *tensors: Tensor) -> list[Tensor]:
    return [x.to("cuda" if kernel == "cuda" else "cpu") for x in tensors]


def inputs(M: int, B: int, N: int, K: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions as large as the targets, so that both branches occur; target rows vary in scale and mean."""
    target = ((torch.randn(B, N, D) + 2 * torch.randn(B, N, 1)) * torch.rand(B, N, 1).add(0.01) * 9).to(dtype)
    return (1.2 * torch.randn(M * B, K, D)).to(dtype), target, torch.randint(max(N, 1), (M, B, K))


def oracle(pred: Tensor, target: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """[M] losses and d(their mean)/d(pred) in float64, row by row, with the derivative written out."""
    M, B, K = index.shape
    D = pred.shape[2]
    losses, grad = torch.zeros(M, dtype=torch.float64), torch.zeros(pred.shape, dtype=torch.float64)
    for m in range(M):
        for b in range(B):
            for k in range(K):
                y = target[b, index[m, b, k]].double()
                y = (y - y.sum() / D) / ((y - y.sum() / D).pow(2).sum() / D + 1e-5).sqrt()
                e = pred[m * B + b, k].double() - y
                losses[m] += torch.where(e.abs() < 1, e * e / 2, e.abs() - 0.5).sum()
                grad[m * B + b, k] = torch.where(e.abs() < 1, e, e.sign())
    return losses / (B * K * D), grad / max(pred.numel(), 1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient(kernel, shape, dtype):
    pred, target, index = inputs(*shape, dtype)
    losses, grad = oracle(pred, target, index)
    pred_, target_, index_ = on(kernel, pred, target, index)
    pred_.requires_grad_()
    loss, per_block = prediction_loss(pred_, target_, index_, per_block=True)
    loss.backward()
    wide = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == per_block.dtype == wide and pred_.grad.dtype == dtype
    # A few roundings per element, of numbers a few times larger than the result.
    unit = torch.finfo(wide).eps
    torch.testing.assert_close(per_block.cpu().double(), losses, rtol=16 * unit, atol=0)
    torch.testing.assert_close(loss.item(), losses.mean().item(), rtol=16 * unit, atol=0)
    budget = 1.25 * rms(rounding(grad, dtype, kernel == "triton")) if dtype.itemsize == 2 else 16 * unit * rms(grad)
    assert rms(pred_.grad.cpu() - grad) <= budget
    with torch.no_grad():  # compiled separately, a GPU kernel may fuse products and sums differently
        alone = prediction_loss(pred_, target_, index_)
    torch.testing.assert_close(alone, loss, rtol=2 * unit if kernel == "cuda" else 0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_of_any_mix_of_blocks(kernel, dtype):
    """Per-block weights, and a loss scale without which the gradient would underflow in float16."""
    pred, target, index = inputs(3, 2, 50, 31, 640, dtype)
    _, grad = oracle(pred, target, index)
    weight = torch.randn(3)
    pred_, target_, index_, weight_ = on(kernel, pred, target, index, weight)
    pred_.requires_grad_()
    loss, per_block = prediction_loss(pred_, target_, index_, per_block=True)
    (2**14 * (loss + weight_ @ per_block)).backward()
    expected = grad.view(3, -1) * (1 + 3 * weight.double())[:, None] * 2**14
    # The gradient is rounded once, and again when it is multiplied by anything but a power of two.
    budget = torch.finfo(dtype).eps * expected.abs() + 4e-6 * expected.abs().max()
    assert ((pred_.grad.cpu().view(3, -1) - expected).abs() <= budget).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [0.7, 1 / 3, -1.5, 3.0])
@pytest.mark.parametrize("compiled", [None, False, True], ids=["eager", "static", "dynamic"])
def test_weighted_16_bit_gradients_are_rounded_twice_and_not_biased(kernel, dtype, weight, compiled):
    """The first rounding is at most twice as coarse as the second, so the error is at most sqrt(1 + 4) times one
    rounding. Where the loss is linear all elements are equal, and a common error would be a bias."""
    if compiled is not None and kernel == "triton":
        pytest.skip("the interpreter cannot be traced")
    torch._dynamo.reset()  # each weight compiles another graph
    for shape in ((2, 2, 50, 31, 640), (3, 2, 11, 5, 24)):
        pred, target, index = inputs(*shape, dtype)
        expected = weight * oracle(pred, target, index)[1]
        pred_, target_, index_ = on(kernel, pred, target, index)
        pred_.requires_grad_()
        scale = 2**14 if dtype == torch.float16 else 1

        def loss(*args: Tensor, scale: int = scale) -> Tensor:
            return scale * weight * prediction_loss(*args)

        run = loss if compiled is None else torch.compile(loss, fullgraph=True, dynamic=compiled)
        run(pred_, target_, index_).backward()
        off = pred_.grad.cpu().double() / scale - expected
        assert rms(off) <= 5**0.5 * rms(rounding(scale * expected, dtype, kernel == "triton") / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_graph_gives_its_gradient_again(kernel, dtype):
    """With another weight each time, accumulating into a leaf; the last backward may free the graph."""
    pred, target, index = inputs(2, 3, 11, 5, 24, dtype)
    _, grad = oracle(pred, target, index)
    pred_, target_, index_ = on(kernel, pred, target, index)
    pred_.requires_grad_()
    loss = prediction_loss(pred_, target_, index_)
    total = 0.0
    for weight, keep in ((1.0, True), (3.0, True), (1.0, True), (-0.25, False)):
        (weight * loss).backward(retain_graph=keep)
        total += weight
        pred_.grad *= 1  # changing .grad in place must not affect the graph
        budget = 40 * torch.finfo(dtype).eps * grad.abs() + 1e-4 * grad.abs().max()  # for sums of weights up to 5
        assert ((pred_.grad.cpu().double() - total * grad).abs() <= budget).all()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("pred_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mixed_dtypes(kernel, pred_dtype, target_dtype):
    pred, target, index = inputs(2, 2, 9, 7, 33, torch.float32)
    pred, target = pred.to(pred_dtype), target.to(target_dtype)
    loss = prediction_loss(*on(kernel, pred, target, index)).item()
    torch.testing.assert_close(loss, oracle(pred, target, index)[0].mean().item(), rtol=2e-6, atol=0)


def test_any_strides(kernel):
    pred, target, index = inputs(2, 3, 11, 5, 24, torch.float32)
    expected, grad = oracle(pred, target, index)
    pred_, target_, index_ = on(kernel, pred, target, index)
    behind = torch.full((6, 9, 48), float("nan"), device=pred_.device)  # a predictor's output: context comes first
    behind[:, 4:, ::2] = pred_
    for p in (behind[:, 4:], pred_.mT.contiguous().mT, pred_.transpose(0, 1).contiguous().transpose(0, 1)):
        p = p[:, :, ::2] if p.shape[2] == 48 else p
        p = p.detach().requires_grad_()
        loss = prediction_loss(p, target_.permute(2, 0, 1).contiguous().permute(1, 2, 0), index_.mT.contiguous().mT)
        loss.backward()
        torch.testing.assert_close(loss.item(), expected.mean().item(), rtol=2e-6, atol=0)
        assert rms(p.grad.cpu() - grad) <= 2e-6 * rms(grad)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_a_mean_over_nothing_is_nan(kernel, shape):
    pred, target, index = on(kernel, *inputs(*shape, torch.float32))
    pred.requires_grad_()
    loss, per_block = prediction_loss(pred, target, index, per_block=True)
    loss.backward()
    assert loss.isnan() and per_block.shape == shape[:1] and per_block.isnan().all()
    assert pred.grad.shape == pred.shape


def test_a_mean_over_no_channels_is_nan_whatever_memory_held(kernel):
    """Uninitialised memory is NaN in these tests, which would hide a result that was never written."""
    torch.use_deterministic_algorithms(False)  # torch.empty then returns what memory held: here, ones
    for _ in range(4):
        held = torch.ones(2, 3 * 5, device=on(kernel, torch.empty(0))[0].device)
        del held
        losses, _ = OP.prediction_loss(*on(kernel, *inputs(2, 3, 5, 5, 0, torch.float32)), True)
        assert losses.isnan().all()


@pytest.mark.parametrize("where", ["pred", "target"])
def test_nan_is_not_swallowed(kernel, where):
    pred, target, index = inputs(2, 2, 9, 4, 33, torch.float32)
    row = index[1, 0, 2]
    (pred[2, 2] if where == "pred" else target[0, row])[7] = torch.nan
    pred, target, index = on(kernel, pred, target, index)
    pred.requires_grad_()
    loss, per_block = prediction_loss(pred, target, index, per_block=True)
    loss.backward()
    hit = torch.zeros(4, 4, 33, dtype=torch.bool)
    if where == "pred":
        hit[2, 2, 7] = True
    else:
        hit.view(2, 2, 4, 33)[:, 0] = (index[:, 0] == row).cpu()[:, :, None]
    assert torch.equal(pred.grad.isnan().cpu(), hit)
    assert torch.equal(per_block.isnan().cpu(), hit.view(2, -1).any(1))


def test_target_is_only_read(kernel):
    pred, target, index = on(kernel, *inputs(2, 3, 11, 5, 24, torch.float32))
    before = target.clone()
    prediction_loss(pred.requires_grad_(), target, index).backward()
    assert torch.equal(target, before)


def test_same_bits_for_any_number_of_threads():
    pred, target, index = inputs(4, 3, 50, 31, 200, torch.bfloat16)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(OP.prediction_loss(pred, target, index, True))
    torch.set_num_threads(threads)
    for losses, grad in results[1:]:
        assert torch.equal(losses, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.skipif(not IN_CPP, reason="the reference would make four copies of 8 GB")
def test_more_elements_than_int32_counts():
    """One row of 2^16 + 1 channels, expanded 2^15 times: more than 2^31 elements that take no memory."""
    pred, target, index = inputs(1, 1, 1, 1, 2**16 + 1, torch.bfloat16)
    index = torch.zeros(1, 1, 2**15, dtype=torch.int64)
    losses, _ = OP.prediction_loss(pred.expand(1, 2**15, -1), target, index, False)
    expected = oracle(pred, target, index[:, :, :1])[0]
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)


@needs_interpreter
def test_the_triton_kernel_reaches_beyond_32_bits(tmp_path):
    pred, target, index = inputs(2, 2, 3, 3, 7, torch.float16)
    far = far_apart(pred, tmp_path / "pred"), far_apart(target, tmp_path / "target"), index
    for a, b in zip(prediction_loss_triton(*far, True), prediction_loss_triton(pred, target, index, True), strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_more_elements_than_int32_counts_on_a_gpu():
    """Predictions, gradient and targets of more than 2^31 elements each; the last row is as if computed alone.

    Needs 13 GB."""
    K, D = 2**20 + 3, 2**11
    row, goal = 1.2 * torch.randn(D, device="cuda"), torch.randn(D, device="cuda")
    pred, target = (torch.zeros(1, K, D, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    pred[0, -1], target[0, -1] = row, goal
    index = torch.zeros(1, 1, K, dtype=torch.int64, device="cuda")
    index[..., -1] = K - 1
    losses, grad = prediction_loss_triton(pred, target, index, True)
    alone, alone_grad = prediction_loss_triton(pred[:, -1:], target[:, -1:], index[..., :1], True)
    torch.testing.assert_close(losses * K, alone)
    torch.testing.assert_close(grad[0, -1].float() * K, alone_grad[0, 0].float(), rtol=2**-7, atol=0)
    assert not grad[0, :-1].any()
    before = grad[0, -1].float()
    prediction_loss_scale_triton(grad, torch.full((1,), 2.0, device="cuda"))
    assert torch.equal(grad[0, -1].float(), 2 * before)


@pytest.mark.slow
def test_gradcheck(kernel):
    pred, target, index = on(kernel, *inputs(2, 2, 7, 3, 5, torch.float64))
    assert torch.autograd.gradcheck(
        lambda pred: prediction_loss(pred, target, index, per_block=True), (pred.requires_grad_(),)
    )


def test_opcheck(kernel):
    pred, target, index = on(kernel, *inputs(2, 3, 11, 5, 24, torch.float32))
    permuted = [x.mT.contiguous().mT for x in (pred, target, index)]
    for arguments in ((pred, target, index), permuted):
        for with_grad in (True, False):
            opcheck(OP.prediction_loss, (*arguments, with_grad))
    opcheck(OP.prediction_loss_scale_, (torch.randn_like(pred), torch.randn(2, device=pred.device)))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device, dtype, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(prediction_loss, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 11, 5, 24), (4, 2, 17, 6, 24)):
        pred, target, index = (x.to(device) for x in inputs(*shape, dtype))
        grads = []
        for function in (compiled, prediction_loss):
            p = pred.clone().requires_grad_()
            loss, per_block = function(p, target, index, per_block=True)
            (loss + per_block[0]).backward()
            grads.append((loss, p.grad))
        torch.testing.assert_close(grads[0], grads[1])


def bad(**changes: Tensor) -> dict[str, Tensor]:
    pred, target, index = inputs(2, 3, 11, 5, 24, torch.float32)
    return {"pred": pred, "target": target, "index": index} | changes


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("pred", bad(pred=torch.randn(6, 5))),
        ("pred", bad(pred=torch.ones(6, 5, 24, dtype=torch.int64))),
        ("pred", bad(pred=torch.randn(6, 5, 24).to(torch.float8_e4m3fn))),
        ("pred", bad(pred=torch.randn(5, 5, 24))),
        ("target", bad(target=torch.randn(3, 11, 23))),
        ("target", bad(target=torch.ones(3, 11, 24, dtype=torch.int32))),
        ("target", bad(target=torch.randn(3, 11, 24).to(torch.float8_e5m2))),
        ("target", bad(target=torch.randn(3, 11, 24, device="meta"))),
        ("target", bad(target=torch.randn(3, 11, 24, requires_grad=True))),
        ("index", bad(index=torch.zeros(2, 4, 5, dtype=torch.int64))),
        ("index", bad(index=torch.zeros(2, 3, 5, dtype=torch.int32))),
        ("index", bad(index=torch.full((2, 3, 5), 11))),
        ("index", bad(index=torch.full((2, 3, 5), -1))),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(argument, arguments):
    with pytest.raises(ValueError, match=f"prediction_loss: {argument} "):
        prediction_loss(**arguments)


@pytest.mark.parametrize("value", [-1, 11])
def test_no_kernel_reads_through_an_index_out_of_range(monkeypatch, value):
    """A compiled call passes values that Python has not checked."""
    pred, target, index = inputs(2, 3, 11, 5, 24, torch.float32)
    index[1, 2, 3] = value
    with pytest.raises(RuntimeError, match=f"index.* {value}"):
        OP.prediction_loss(pred, target, index, True)
    if not CUDA:  # after a failed assertion the process cannot use the GPU
        debug = interpreter.InterpreterOptions(debug=True)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", debug)
        with pytest.raises(interpreter.InterpreterError, match="prediction_loss: index out of range"):
            prediction_loss_triton(pred, target, index, True)
