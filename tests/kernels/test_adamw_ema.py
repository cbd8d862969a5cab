"""AdamWEMA against float64 and torch.optim.AdamW over many steps; saving, loading, compiling, bad input."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.library import opcheck
from torch.nn import Parameter

from jepa_kernels import AdamWEMA
from jepa_kernels.adamw_ema import (
    _adamw_ema_kernel,
    adamw_ema_coefficients_ref,
    adamw_ema_coefficients_triton,
    adamw_ema_ref,
    adamw_ema_triton,
)
from jepa_kernels.tables import is_capturing
from numerics import DEVICES, GPU, INTERPRETED, cut_off, implementations, needs_gpu, needs_interpreter, rms

OP, COEFFICIENTS = torch.ops.jepa_kernels.adamw_ema_, torch.ops.jepa_kernels.adamw_ema_coefficients_
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(3, 5), (0,), (1,), (1023,), (1024,), (1025,), (4, 3, 7, 7), (64, 67)]
steps = pytest.mark.parametrize(("step", "device"), implementations(OP, adamw_ema_ref, adamw_ema_triton))


@pytest.fixture(params=["cpu", pytest.param("triton", marks=INTERPRETED), pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch) -> str:
    """Runs the optimizer with the op dispatched for the CPU, with the Triton kernel interpreted, and on a GPU."""
    if request.param == "triton":
        monkeypatch.setattr(torch.ops.jepa_kernels, "adamw_ema_", adamw_ema_triton)
        monkeypatch.setattr(torch.ops.jepa_kernels, "adamw_ema_coefficients_", adamw_ema_coefficients_triton)
    return "cuda" if request.param == "cuda" else "cpu"


def parameters(device: str = "cpu", shapes: list[tuple[int, ...]] = SHAPES) -> list[Parameter]:
    return [Parameter(torch.randn(shape, device=device)) for shape in shapes]


def twins(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def set_gradients(*many: list[Parameter]) -> None:
    for same in zip(*many, strict=True):
        g = torch.randn_like(same[0]) * 10 ** torch.empty(()).uniform_(-4, 0).item()
        for p in same:
            p.grad = g.clone()


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_agree(params: list[Parameter], ours: AdamWEMA, others: list[Parameter], stock: torch.optim.AdamW) -> None:
    """Weights and moments agree to 1e-6 of their RMS: both round, and values that cancel have no significant digits."""
    pairs = [[(p, q) for p, q in zip(params, others, strict=True)]]
    for name in ("exp_avg", "exp_avg_sq"):
        pairs.append([(ours.state[p][name], stock.state[q][name]) for p, q in pairs[0]])
    for these in pairs:
        a, b = (torch.cat([x.detach().flatten() for x in xs]) for xs in zip(*these, strict=True))
        assert rms(a - b) <= 1e-6 * rms(b)
    for p, q in pairs[0]:
        assert ours.state[p]["step"] == stock.state[q]["step"]


def exact_adamw(p, g, m, v, t, lr, betas, eps, weight_decay):
    """One step in float64, from the paper's algorithm 2."""
    m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    v.mul_(betas[1]).add_(g * g, alpha=1 - betas[1])
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    p.sub_(lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * p))


@steps
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_one_step_against_float64(step, device, dtype):
    """At most 1.25 times the error of rounding the exact answer, in every output."""
    t, lr, betas, eps, weight_decay, momentum, scale = 7, 1e-3, (0.9, 0.999), 1e-8, 0.05, 0.996, 0.37
    p, e = ([torch.randn(shape) for shape in SHAPES] for _ in range(2))
    m = [torch.randn(shape) * 1e-2 for shape in SHAPES]
    v = [torch.rand(shape) * 1e-4 for shape in SHAPES]
    g = [(torch.randn(shape) * 1e-2).to(dtype) for shape in SHAPES]
    copies = [torch.full(shape, torch.nan, dtype=dtype) for shape in SHAPES]
    exact = [[x.double() for x in xs] for xs in (p, m, v, e)]
    for p_, g_, m_, v_, e_ in zip(exact[0], g, *exact[1:], strict=True):
        exact_adamw(p_, g_.double() * scale, m_, v_, t, lr, betas, eps, weight_decay)
        e_.add_((1 - momentum) * (p_ - e_))
    row = [lr * weight_decay, lr / (1 - betas[0] ** t), (1 - betas[1] ** t) ** -0.5, 1 - momentum, scale, 1]
    lists = [[x.clone().to(device) for x in xs] for xs in (p, g, m, v, e, copies, copies)]
    step(*lists, torch.tensor([row] * len(SHAPES)), *betas, eps)
    p2, g2, m2, v2, e2, weight_copies, ema_copies = ([x.cpu() for x in xs] for xs in lists)
    assert equal(g, g2)
    for answers, results in zip(exact, (p2, m2, v2, e2), strict=True):
        answer, result = (torch.cat([x.flatten() for x in xs]) for xs in (answers, results))
        assert rms(result - answer) <= 1.25 * rms(answer.float() - answer)
    for copies, originals in ((weight_copies, p2), (ema_copies, e2)):
        if step is adamw_ema_triton and device == "cpu" and dtype == torch.bfloat16:  # the interpreter truncates
            originals = [cut_off(x) for x in originals]
        assert equal(copies, [x.to(dtype) for x in originals])


@steps
def test_squares_that_are_subnormal(step, device):
    """Without eps, a square root that flushed subnormals to 0 would make the weight infinite."""
    p, g = torch.randn(1500), 1e-20 * (1 + torch.rand(1500))
    lists = [[x.clone().to(device)] for x in (p, g, 0 * p, 0 * p)]
    row = [0.0, 1e-2 / (1 - 0.9), (1 - 0.999) ** -0.5, 0.0, 1.0, 1.0]
    step(*lists, [], [], [], torch.tensor([row]), 0.9, 0.999, 0.0)
    moved = p - lists[0][0].cpu()
    assert lists[3][0].max() < torch.finfo(torch.float32).tiny  # Adam's first step moves by lr
    torch.testing.assert_close(moved, torch.full_like(p, 1e-2), rtol=0.05, atol=0)


@steps
def test_a_row_that_does_not_apply_is_left_alone(step, device):
    lists = [[torch.randn(n, device=device) for n in (5, 1030)] for _ in range(7)]
    lists[1][0][2] = torch.inf
    before = copy.deepcopy(lists)
    step(*lists, torch.tensor([[1e-5, 1e-2, 1.0, 0.1, 1.0, 0.0], [1e-5, 1e-2, 1.0, 0.1, 1.0, 1.0]]), 0.9, 0.99, 1e-8)
    for name, old, new in zip("pgmvewc", before, lists, strict=True):
        assert torch.equal(new[0], old[0])
        assert torch.equal(new[1], old[1]) == (name == "g")


@pytest.mark.parametrize(
    ("count", "device"), implementations(COEFFICIENTS, adamw_ema_coefficients_ref, adamw_ema_coefficients_triton)
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inf", [0.0, 1.0])
def test_coefficients_against_float64(count, device, dtype, inf):
    """Rounded once, from the first step to the millionth; 129 counters exceed one block."""
    before = [0, 1, 9, 999, 10**6, *torch.randint(10**6, (124,)).tolist()]
    betas, (lr, decay, momentum, scale) = (0.9, 0.999), torch.rand(4, dtype=dtype).add(0.01)
    steps = [torch.tensor(float(t), device=device) for t in before]
    numbers = [x.to(device) for x in (lr, decay, momentum, scale, torch.tensor(inf))]
    rows = count(steps, numbers, *betas).cpu()
    assert [t.item() for t in steps] == [t + (inf == 0) for t in before]
    for row, t in zip(rows.tolist(), steps, strict=True):
        assert row[5] == (inf == 0)
        if t:
            exact = [
                lr * decay,
                lr / (1 - betas[0] ** t.item()),
                (1 - betas[1] ** t.item()) ** -0.5,
                1 - momentum,
                scale,
            ]
            assert row[:5] == pytest.approx([float(x) for x in exact], rel=2**-22 if dtype == torch.float32 else 2**-23)


@pytest.mark.slow
def test_agrees_with_adamw_and_averages_its_weights(device):
    """Against torch.optim.AdamW and a float64 average, with schedules in every group; one group has no average."""
    params = parameters(device)
    others = twins(params)
    averages = [p.detach().double() for p in params]
    halves = [slice(0, 4), slice(4, None)]
    ours = AdamWEMA(
        [{"params": params[halves[0]], "ema": False}, {"params": params[halves[1]], "betas": (0.8, 0.95), "eps": 1e-6}]
    )
    stock = torch.optim.AdamW(
        [{"params": others[halves[0]]}, {"params": others[halves[1]], "betas": (0.8, 0.95), "eps": 1e-6}]
    )
    for step in range(30):
        momentum = 0.9 + 0.1 * step / 30
        for a, b in zip(ours.param_groups, stock.param_groups, strict=True):
            a["lr"] = b["lr"] = 1e-2 * (step + 1) / 30
            a["weight_decay"] = b["weight_decay"] = 0.4 * step / 30
            a["momentum"] = momentum
        set_gradients(params, others)
        ours.step()
        stock.step()
        for p, average in zip(params, averages, strict=True):
            average.add_((1 - momentum) * (p.detach().double() - average))
    assert_agree(params, ours, others, stock)
    for i, p in enumerate(params):
        if i in range(*halves[0].indices(len(params))):
            assert "ema" not in ours.state[p]
        else:
            assert rms(ours.state[p]["ema"].double() - averages[i]) < 4 * 2**-24 * rms(averages[i])


def test_many_steps_against_float64():
    """A thousand steps: p, both moments and the average stay as close as fp32 storage can."""
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.04}
    p = Parameter(torch.randn(3001))
    optimizer = AdamWEMA([p], **options, momentum=0.99)
    exact = [p.detach().double(), torch.zeros(3001).double(), torch.zeros(3001).double()]
    average = exact[0].clone()
    target = torch.randn(3001)
    for t in range(1, 1001):
        p.grad = p.detach() - target + 0.1 * torch.randn(3001)
        exact_adamw(exact[0], p.grad.double(), *exact[1:], t, **options)
        average.add_(0.01 * (exact[0] - average))
        optimizer.step()
    state = optimizer.state[p]
    for result, answer in zip(
        (p.detach(), state["exp_avg"], state["exp_avg_sq"], state["ema"]), (*exact, average), strict=True
    ):
        assert rms(result.double() - answer) < 30 * 2**-24 * rms(answer)


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_gradients_are_read_as_they_are(device, dtype):
    halves = parameters(device)
    floats = twins(halves)
    optimizers = [AdamWEMA(params, weight_decay=0.1) for params in (halves, floats)]
    for p in halves:
        p.grad_dtype = dtype
    for _ in range(3):
        for a, b in zip(halves, floats, strict=True):
            a.grad = torch.randn_like(a).to(dtype)
            b.grad = a.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        assert equal(*map(everything, optimizers))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_grad_scale_is_folded_in(device, as_tensor):
    scaled = parameters(device)
    plain = twins(scaled)
    optimizers = [AdamWEMA(params) for params in (scaled, plain)]
    set_gradients(scaled, plain)
    for p in scaled:
        p.grad *= 1024
    optimizers[0].step(grad_scale=torch.tensor(2.0**-10, device=device) if as_tensor else 2.0**-10)
    optimizers[1].step()
    assert equal(*map(everything, optimizers))


def test_found_inf_undoes_a_step(device):
    params = parameters(device)
    optimizer = AdamWEMA(params, capturable=True)
    copies = [torch.empty_like(p, dtype=torch.float16) for p in params]
    for p, half in zip(params, copies, strict=True):
        optimizer.set_copies(p, weight=half)
    set_gradients(params)
    optimizer.step(found_inf=torch.zeros((), device=device))
    before = everything(optimizer) + [half.clone() for half in copies]
    params[-1].grad[0, 0] = torch.nan
    optimizer.step(found_inf=torch.ones((), device=device))
    assert equal(before, everything(optimizer) + copies)
    params[-1].grad[0, 0] = 0
    optimizer.step(found_inf=torch.zeros((), device=device))
    assert optimizer.state[params[0]]["step"].item() == 2
    assert not equal(before, everything(optimizer) + copies)


def test_numbers_may_be_tensors_and_change_in_place(device):
    names = ("lr", "weight_decay", "momentum")
    with_tensors = parameters(device)
    with_numbers = twins(with_tensors)
    tensors = {name: torch.tensor(0.5, dtype=torch.float64, device=device) for name in names}
    optimizers = [AdamWEMA(with_tensors, **tensors, capturable=True), AdamWEMA(with_numbers, capturable=True)]
    for _ in range(3):
        for name in names:
            value = torch.rand((), dtype=torch.float64).item()
            tensors[name].fill_(value)
            optimizers[1].param_groups[0][name] = value
        set_gradients(with_tensors, with_numbers)
        for optimizer in optimizers:
            optimizer.step()
        assert equal(*map(everything, optimizers))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_copies_follow(dtype):
    params = parameters()
    optimizer = AdamWEMA(params, lr=0.5)
    copies = [[torch.full_like(p, torch.nan, dtype=dtype) for p in params] for _ in range(2)]
    optimizer.set_copies(params[0], weight=copies[0][0])
    for p, weight, ema in list(zip(params, *copies, strict=True))[1:]:
        optimizer.set_copies(p, weight=weight, ema=ema)
    for _ in range(2):
        set_gradients(params)
        optimizer.step()
        assert equal(copies[0], [p.detach().to(dtype) for p in params])
        assert equal(copies[1][1:], [optimizer.state[p]["ema"].to(dtype) for p in params[1:]])
    assert copies[1][0].isnan().all()
    optimizer.set_copies(params[2])
    old = copies[0][2].clone()
    optimizer.step()
    assert torch.equal(copies[0][2], old) and not torch.equal(old, params[2].detach().to(dtype))


def test_a_state_of_another_layout_is_refused_at_the_same_address_too(device):
    p = Parameter(torch.randn(64, 32, device=device))
    optimizer = AdamWEMA([p])
    for _ in range(2):
        p.grad = torch.randn_like(p)
        optimizer.step()
    before = [x.clone() for x in everything(optimizer)]
    for name in ("exp_avg", "exp_avg_sq", "ema"):
        right = optimizer.state[p][name]
        optimizer.state[p][name] = right.view(32, 64).T  # same memory, different strides
        with pytest.raises(ValueError, match=f"state '{name}'"):
            optimizer.step()
        optimizer.state[p][name] = right
    assert equal(before, everything(optimizer))
    for name in ("exp_avg", "exp_avg_sq", "ema"):  # as the message advises
        wrong = optimizer.state[p][name] = optimizer.state[p][name].view(32, 64).T
        optimizer.load_state_dict(optimizer.state_dict())
        assert torch.equal(optimizer.state[p][name], wrong) and optimizer.state[p][name].is_contiguous()
    optimizer.step()


@pytest.mark.parametrize("device", DEVICES)
def test_a_teachers_weight_stays_the_average_when_a_state_is_loaded(device):
    student, teacher = (torch.nn.Linear(7, 5, device=device) for _ in range(2))
    optimizer = AdamWEMA(student.parameters())
    for p, average in zip(student.parameters(), teacher.parameters(), strict=True):
        optimizer.state[p]["ema"] = average.data

    def step() -> None:
        student(torch.randn(3, 7, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    saved, averages = copy.deepcopy(optimizer.state_dict()), [x.clone() for x in teacher.parameters()]
    step()
    assert not equal([x.data for x in teacher.parameters()], averages)
    optimizer.load_state_dict(saved)
    assert equal([x.data for x in teacher.parameters()], averages)
    step()
    assert not equal([x.data for x in teacher.parameters()], averages)


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_options_that_only_torchs_adamw_has_are_refused(option):
    p = Parameter(torch.randn(3))
    with pytest.raises(ValueError, match=option):
        AdamWEMA([{"params": [p], option: True}])
    stock = torch.optim.AdamW([p], **{option: True})
    optimizer = AdamWEMA([p])
    optimizer.load_state_dict(stock.state_dict())
    p.grad = torch.randn(3)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    assert torch.equal(p, before)


def test_any_dense_layout(device):
    """A step depends on the values, not the strides, of weight and gradient."""
    shape = (4, 3, 6, 5)
    layouts = [lambda x: x, lambda x: x.to(memory_format=torch.channels_last), lambda x: x.mT.contiguous().mT]
    value, gradients = torch.randn(shape, device=device), [torch.randn(shape, device=device) for _ in range(2)]
    results = []
    for layout in layouts:
        for gradient_layout in [*layouts, lambda x: x.repeat(1, 1, 1, 2)[..., :5]]:
            p = Parameter(layout(value.clone()))
            optimizer = AdamWEMA([p], weight_decay=0.1)
            for g in gradients:
                p.grad = gradient_layout(g.clone())
                optimizer.step()
            assert p.stride() == optimizer.state[p]["ema"].stride() == layout(value).stride()
            results.append(everything(optimizer))
    assert all(equal(results[0], result) for result in results[1:])


def test_a_parameter_without_a_gradient_is_left_out():
    params = parameters()
    optimizer = AdamWEMA(params)
    set_gradients(params)
    params[3].grad = None
    optimizer.step()
    assert params[3] not in optimizer.state
    set_gradients(params)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2, 2, 1, 2, 2, 2, 2]
    fresh = AdamWEMA([Parameter(torch.randn(3))])
    fresh.step()
    assert not fresh.state


@pytest.mark.parametrize("capturable", [False, True])
def test_state_survives_saving(device, capturable):
    first = parameters(device)
    optimizer = AdamWEMA(
        [{"params": first[:3], "lr": 1e-2}, {"params": first[3:], "ema": False}], capturable=capturable
    )
    for _ in range(3):
        set_gradients(first)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = twins(first)
    restored = AdamWEMA([{"params": second[:3]}, {"params": second[3:]}])
    restored.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(optimizer)
    third = [p for group in copied.param_groups for p in group["params"]]
    for _ in range(3):
        set_gradients(first, second, third)
        for each in (optimizer, restored, copied):
            each.step()
        assert equal(everything(optimizer), everything(restored)) and equal(everything(optimizer), everything(copied))


def test_takes_over_from_adamw():
    params = parameters()
    others = twins(params)
    stock, ours = torch.optim.AdamW(params), AdamWEMA(others, momentum=0.9)
    for step in range(4):
        set_gradients(params, others)
        if step == 2:
            ours.load_state_dict(copy.deepcopy(stock.state_dict()))
            for p, q in zip(params, others, strict=True):
                q.data.copy_(p.data)
        stock.step()
        if step >= 2:
            ours.step()
    assert_agree(others, ours, params, stock)
    assert all(ours.state[q]["ema"].shape == q.shape for q in others)
    assert ours.param_groups[0]["momentum"] == 0.9


def test_does_not_depend_on_threads():
    start, threads, results = parameters(shapes=[(70_001,), (3,), (300, 300)]), torch.get_num_threads(), []
    set_gradients(start)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        params = twins(start)
        for p, q in zip(params, start, strict=True):
            p.grad = q.grad
        optimizer = AdamWEMA(params)
        for _ in range(3):
            optimizer.step()
        results.append(everything(optimizer))
    torch.set_num_threads(threads)
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_closure_and_backward_through_old_weights():
    p = Parameter(torch.randn(4))
    optimizer = AdamWEMA([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    expected = (p.detach() ** 2).sum()
    assert torch.equal(optimizer.step(closure).detach(), expected)
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def ddp_rank(rank: int, folder: Path) -> None:
    """Steps a model under DDP, and a twin with copies of the gradients that are outside the buckets."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    torch.manual_seed(int((folder / "seed").read_text()))
    model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.GELU(), torch.nn.Linear(13, 3))
    parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    halves = [torch.randn(3, 5, 7) for _ in range(2)]
    odd, done = 0, []
    for operator in (OP, OP if torch.cuda.is_available() else adamw_ema_triton):
        torch.ops.jepa_kernels.adamw_ema_ = operator
        torch.ops.jepa_kernels.adamw_ema_coefficients_ = (
            COEFFICIENTS if operator is OP else adamw_ema_coefficients_triton
        )
        params = [*model.parameters()]
        apart = twins(params)
        optimizers = [AdamWEMA(params), AdamWEMA(apart)]
        for x in halves[rank]:
            optimizers[0].zero_grad()
            parallel(x).square().mean().backward()
            for p, q in zip(params, apart, strict=True):
                odd += p.grad.data_ptr() % 16 != 0
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert equal(*map(everything, optimizers))
        done += everything(optimizers[0])
    assert odd, "no gradient was unaligned: nothing was tested"
    torch.save(done, folder / f"rank{rank}.pt")
    del parallel  # as its group's last owner it would hold the GIL and wait for a thread that may need it
    torch.distributed.destroy_process_group()


@pytest.mark.ranks
def test_under_ddp_on_two_ranks(tmp_path):
    """Unaligned gradients, views into DDP's buckets, give the same step as others; ranks stay equal."""
    (tmp_path / "seed").write_text(str(torch.randint(2**31, ()).item()))
    torch.multiprocessing.spawn(ddp_rank, (tmp_path,), nprocs=2)
    assert equal(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    def lists(*like: Tensor) -> list[Tensor]:
        return [torch.rand_like(x) for x in like]

    rows = torch.tensor([[1e-5, 1e-3, 1.1, 0.1, 0.5, 1.0]] * 2)
    for like in ((torch.empty(3, 5), torch.empty(7)), (torch.empty(5, 3).T, torch.empty(2, 3, 4).permute(2, 0, 1))):
        like = [x.to(device) for x in like]
        halves = [x.bfloat16() for x in like]
        opcheck(
            OP,
            (
                lists(*like),
                halves,
                *(lists(*like) for _ in range(3)),
                lists(*halves),
                lists(*halves),
                rows,
                0.9,
                0.99,
                1e-8,
            ),
        )
        opcheck(OP, (*(lists(*like) for _ in range(4)), [], [], [], rows, 0.9, 0.99, 1e-8))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_the_coefficients(device):
    numbers = [torch.rand((), dtype=dtype, device=device) for dtype in (torch.float64, torch.float32) * 2]
    steps = [torch.tensor(3.0, device=device), torch.ones(2, device=device)[1]]
    opcheck(COEFFICIENTS, (steps, [*numbers, torch.zeros((), device=device)], 0.9, 0.999))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_compiles_as_one_graph(device):
    compiled = parameters(device)
    eager = twins(compiled)
    optimizers = [AdamWEMA(params, capturable=True) for params in (compiled, eager)]
    step = torch.compile(lambda: optimizers[0].step(), fullgraph=True)
    for _ in range(3):
        set_gradients(compiled, eager)
        step()
        optimizers[1].step()
    for a, b in zip(*map(everything, optimizers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_capture_is_not_queried_while_compiling():
    """torch.compile cannot trace the query, which `step` makes for parameters on a GPU."""
    compiled = torch.compile(lambda x: x + is_capturing(torch.device("cuda")), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_step_follows_its_tensors(device):
    """torch.compile treats numbers as constants; tensors can change in place without recompilation."""
    compiled = parameters(device, SHAPES[:4])
    eager = twins(compiled)
    tensors = {name: torch.tensor(0.5, dtype=torch.float64) for name in ("lr", "weight_decay", "momentum")}
    optimizers = [AdamWEMA(compiled, **tensors), AdamWEMA(eager, 0.5, weight_decay=0.5, momentum=0.5)]
    set_gradients(compiled, eager)
    for optimizer in optimizers:
        optimizer.step()  # creates the state
    step = torch.compile(lambda: optimizers[0].step(), fullgraph=True)
    for i in range(5):
        for name, tensor in tensors.items():
            tensor.uniform_()
            optimizers[1].param_groups[0][name] = tensor.item()
        with torch.no_grad():
            for p, q in zip(compiled, eager, strict=True):
                p.grad.normal_()
                q.grad.copy_(p.grad)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            step()
        optimizers[1].step()
        for a, b in zip(*map(everything, optimizers), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_steps_are_counted_in_float32(capturable):
    """In bfloat16 the count would stop at 256."""
    p = Parameter(torch.randn(1))
    p.grad = torch.ones(1)
    optimizer = AdamWEMA([p], capturable=capturable)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for _ in range(300):
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"] == 300


def test_the_average_may_be_the_callers_tensor():
    params = parameters()
    twin, teacher = twins(params), twins(params)
    optimizers = [AdamWEMA(params), AdamWEMA(twin)]
    for p, average in zip(params, teacher, strict=True):
        optimizers[0].state[p]["ema"] = average
    for _ in range(2):
        set_gradients(params, twin)
        for optimizer in optimizers:
            optimizer.step()
    assert equal([t.detach() for t in teacher], [optimizers[1].state[p]["ema"] for p in twin])


@needs_gpu
def test_on_a_gpu_a_whole_step_is_captured():
    """Forward, backward and step in one graph, with gradients in the graph's memory."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.GELU(), torch.nn.Linear(13, 3)).cuda()
    twin = copy.deepcopy(model)
    optimizers = [AdamWEMA(each.parameters(), capturable=True) for each in (model, twin)]
    x = torch.randn(5, 7, device="cuda")

    def step(model: torch.nn.Module, optimizer: AdamWEMA) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(model, optimizers[0])
    torch.cuda.synchronize()
    step(twin, optimizers[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizers[0])
    for _ in range(3):
        x.normal_()
        graph.replay()
        step(twin, optimizers[1])
    assert equal(*map(everything, optimizers))


@needs_gpu
@pytest.mark.parametrize(("capturable", "warm"), [(False, True), (True, False)])
def test_on_a_gpu_an_impossible_capture_is_refused_before_anything_is_written(capturable, warm):
    params = parameters("cuda")
    optimizer = AdamWEMA(params, capturable=capturable)
    set_gradients(params)
    if warm:
        optimizer.step()
    before = everything(optimizer)
    with (
        pytest.raises(RuntimeError, match="capturable=True and take one step"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    assert equal(before, everything(optimizer))


@needs_interpreter
def test_triton_addresses_beyond_32_bits():
    """The last five of 2**31 + 1029 elements, addressed as if the others preceded them."""
    n = 2**31 + 1029
    tensors = [[torch.rand(5)] for _ in range(7)]
    same = copy.deepcopy(tensors)
    coefficients = torch.tensor([[1e-5, 1e-2, 1.1, 0.1, 0.5, 1.0]])
    table = torch.tensor([[n, *(t.data_ptr() - 4 * (n - 5) for (t,) in tensors)]])
    blocks = torch.tensor([[0, (n - 5) // 1024]], dtype=torch.int32)
    _adamw_ema_kernel[(1,)](
        blocks, table, coefficients, 0.1, 0.01, 1e-8, tl.float32, True, tl.float32, tl.float32, BLOCK=1024
    )
    adamw_ema_triton(*same, coefficients, 0.9, 0.99, 1e-8)
    for (a,), (b,) in zip(tensors, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@needs_gpu
def test_addresses_beyond_32_bits_on_a_gpu():
    """Needs 40 GB."""
    n = 2**31 + 1029
    p = Parameter(torch.zeros(n, device="cuda"))
    p.grad_dtype = torch.bfloat16
    p.grad = torch.zeros(n, device="cuda", dtype=torch.bfloat16)
    p.grad[-5:] = 1.0
    optimizer = AdamWEMA([p], lr=0.5, momentum=0.5)
    optimizer.step()
    last = p.detach()[-5:], optimizer.state[p]["ema"][-5:]
    for tensor, value in zip(last, (-0.5, -0.25), strict=True):
        torch.testing.assert_close(tensor.cpu(), torch.full((5,), value))
    assert not p.detach()[:-5].any() and not optimizer.state[p]["ema"][:-5].any()


@needs_gpu
def test_on_a_gpu_no_synchronisation_and_graph_replay():
    params = parameters("cuda")
    eager = twins(params)
    lr = torch.tensor(1e-3, device="cuda", dtype=torch.float64)
    optimizers = [AdamWEMA(params, lr=lr, capturable=True), AdamWEMA(eager, capturable=True)]
    set_gradients(params, eager)
    for optimizer in optimizers:
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for value in (2e-3, 3e-3):
            for p, q in zip(params, eager, strict=True):
                p.grad, q.grad = p.grad.clone(), q.grad.clone()  # at new addresses
            optimizers[1].param_groups[0]["lr"] = value
            lr.fill_(value)
            for optimizer in optimizers:
                optimizer.step(grad_scale=torch.ones((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(*map(everything, optimizers))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for value in (4e-3, 5e-3):
        lr.fill_(value)
        optimizers[1].param_groups[0]["lr"] = value
        graph.replay()
        optimizers[1].step()
    assert equal(*map(everything, optimizers))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"lr": -1.0}, "lr.*-1"),
        ({"lr": torch.tensor(-1.0)}, "lr.*-1"),
        ({"momentum": torch.tensor(1.5)}, "momentum.*1.5"),
        ({"lr": float("nan")}, "lr.*nan"),
        ({"lr": torch.ones(1)}, r"lr.*\(1,\)"),
        ({"momentum": 1.5}, "momentum.*1.5"),
        ({"betas": (0.9, 1.0)}, r"betas.*1\.0"),
        ({"betas": (0.9,)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_bad_options_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        AdamWEMA([Parameter(torch.ones(2))], **options)
    with pytest.raises(ValueError, match=names):
        AdamWEMA([{"params": [Parameter(torch.ones(2))], **options}])


@pytest.mark.parametrize(
    ("name", "value"), [("momentum", float("nan")), ("momentum", 1.5), ("lr", -1.0), ("eps", -1.0)]
)
def test_an_option_that_turns_bad_is_named_and_nothing_is_written(name, value):
    params = parameters()
    optimizer = AdamWEMA([{"params": params[:4]}, {"params": params[4:]}])
    set_gradients(params)
    optimizer.step()
    before = everything(optimizer)
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        optimizer.step()
    assert equal(before, everything(optimizer))


def bad_parameters() -> list[tuple[Parameter, str]]:
    half, sparse, gaps, double, complex_ = (
        Parameter(torch.ones(4, dtype=torch.bfloat16)),
        Parameter(torch.ones(4, 2)),
        Parameter(torch.ones(4, 4)[:, ::2]),
        Parameter(torch.ones(4, dtype=torch.float64)),
        Parameter(torch.ones(4, dtype=torch.complex64)),
    )
    for p in (half, gaps, double, complex_):
        p.grad = torch.ones_like(p)
    sparse.grad = torch.eye(4, 2).to_sparse()
    return [
        (half, "bfloat16.*set_copies"),
        (sparse, "dense.*sparse"),
        (gaps, "non-overlapping"),
        (double, "float64"),
        (complex_, "complex64"),
    ]


@pytest.mark.parametrize("which", range(5))
def test_a_bad_parameter_is_named_and_nothing_is_written(which):
    bad, names = bad_parameters()[which]
    good = Parameter(torch.ones(3))
    good.grad = torch.ones(3)
    optimizer = AdamWEMA([{"params": [good]}, {"params": [bad]}])
    with pytest.raises(ValueError, match=names):
        optimizer.step()
    assert torch.equal(good.detach(), torch.ones(3))


def test_bad_copies_and_states_are_named():
    p, q = Parameter(torch.randn(4, 3)), Parameter(torch.randn(2))
    optimizer = AdamWEMA([{"params": [p]}, {"params": [q], "ema": False}])
    for param, options, names in (
        (Parameter(torch.ones(2)), {}, "param"),
        (q, {"ema": torch.ones(2)}, "ema=False"),
        (p, {"weight": torch.ones(3, 4)}, r"weight.*\(4, 3\).*\(3, 4\)"),
        (p, {"weight": torch.ones(3, 4).T}, r"weight.*strides \(3, 1\)"),
        (p, {"ema": torch.ones(4, 3, dtype=torch.int8)}, "ema.*int8"),
        (p, {"ema": torch.ones(4, 3, device="meta")}, "ema.*meta"),
    ):
        with pytest.raises(ValueError, match=names):
            optimizer.set_copies(param, **options)
    two = torch.ones(2, 4, 3)
    optimizer.set_copies(p, weight=two[0], ema=two[1])
    for copies in ({"weight": two[0], "ema": two[0]}, {"ema": p.detach()}):
        with pytest.raises(ValueError, match="share memory"):
            optimizer.set_copies(p, **copies)
    twin = Parameter(torch.randn(4, 3))
    optimizer.add_param_group({"params": [twin]})
    for copies in ({"weight": p.detach()}, {"weight": two[0]}):  # another parameter's memory; that of its copy
        with pytest.raises(ValueError, match="share memory"):
            optimizer.set_copies(twin, **copies)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "ema"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_state_that_does_not_fit_is_named_and_nothing_is_written(name, fresh):
    """A 16-bit teacher would be read as float32; one in another layout would silently not be updated."""
    good, p = Parameter(torch.ones(3)), Parameter(torch.randn(4, 3))
    for q in (good, p):
        q.grad = torch.ones_like(q)
    optimizer = AdamWEMA([good, p])
    if not fresh or name != "ema":
        optimizer.step()
    before = good.detach().clone()
    for bad, names in (
        (torch.ones(12), r"float32.*\(4, 3\).*\(12,\)"),
        (torch.ones(4, 3, dtype=torch.bfloat16), "float32.*bfloat16"),
        (torch.ones(3, 4).T, r"strides \(3, 1\).*\(1, 4\)"),
        (torch.ones(4, 3, device="meta"), "cpu.*meta"),
    ):
        optimizer.state[p][name] = bad
        with pytest.raises(ValueError, match=f"state '{name}' must be .*{names}"):
            optimizer.step()
        assert torch.equal(good.detach(), before)


def test_a_state_whose_memory_is_replaced_is_checked_again():
    p = Parameter(torch.randn(4, 3))
    p.grad = torch.ones_like(p)
    optimizer = AdamWEMA([p])
    optimizer.step()
    optimizer.state[p]["exp_avg"].data = torch.ones(4, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"exp_avg.*bfloat16"):
        optimizer.step()


@pytest.mark.parametrize(
    "change", [lambda x: x.to(memory_format=torch.channels_last), lambda x: x.repeat(2, 1, 1, 1), lambda x: x[:1]]
)
def test_a_parameter_whose_memory_is_replaced_is_checked_again(change):
    """Otherwise its copies would be written in its new memory order instead of theirs, or past their end."""
    p = Parameter(torch.randn(2, 3, 4, 5))
    optimizer = AdamWEMA([p])
    optimizer.set_copies(p, weight=torch.empty_like(p, dtype=torch.bfloat16))
    p.data = change(p.data)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"weight of set_copies must be.*strides"):
        optimizer.step()


def test_loaded_states_take_the_layout_of_their_parameters():
    first = parameters(shapes=[(4, 3, 6, 5)])
    last = [Parameter(first[0].detach().to(memory_format=torch.channels_last))]
    optimizers = [AdamWEMA(params) for params in (first, last)]
    set_gradients(first)
    optimizers[0].step()
    last[0].data.copy_(first[0].data)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    set_gradients(first, last)
    for optimizer in optimizers:
        optimizer.step()
    assert equal(*map(everything, optimizers))


def test_bad_scales_are_refused_before_anything_is_counted():
    params = parameters(shapes=[(3,), (3,)])  # as many as there are scales: broadcasting would succeed
    optimizer = AdamWEMA(params)
    set_gradients(params)
    optimizer.step()
    before = everything(optimizer)
    for options, names in (
        ({"grad_scale": torch.ones(2)}, r"grad_scale.*\(2,\)"),
        ({"found_inf": torch.zeros(1)}, r"found_inf.*\(1,\)"),
        ({"grad_scale": torch.ones((), device="meta")}, "grad_scale.*meta"),
    ):
        with pytest.raises(ValueError, match=names):
            optimizer.step(**options)
        assert equal(before, everything(optimizer))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_writes_the_copies_of_its_own_parameters(how):
    model = torch.nn.Linear(3, 4)
    halves = torch.nn.Linear(3, 4, dtype=torch.bfloat16)
    optimizer = AdamWEMA(model.parameters())
    for p, half in zip(model.parameters(), halves.parameters(), strict=True):
        optimizer.set_copies(p, weight=half.data)
    set_gradients([*model.parameters()])
    optimizer.step()
    before = copy.deepcopy(halves.state_dict())
    other, copied = how((model, optimizer))
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    copied.step()
    assert equal([*before.values()], [*halves.state_dict().values()])
    for p in other.parameters():
        assert torch.equal(copied._copies[p][0], p.detach().bfloat16())


def test_the_op_refuses_lists_that_do_not_match():
    """Called without the optimizer, it still reads and writes nothing out of bounds."""
    good = [[torch.ones(5), torch.ones(7)] for _ in range(7)]
    rows = torch.ones(2, 6)
    for i in range(7):
        for bad in ([torch.ones(5)], [torch.ones(5), torch.ones(6)], [torch.ones(5), torch.ones(7).double()]):
            with pytest.raises(RuntimeError, match="adamw_ema_"):
                OP(*good[:i], bad, *good[i + 1 :], rows, 0.9, 0.99, 1e-8)
    for bad_rows in (rows[:1], rows.double()):
        with pytest.raises(RuntimeError, match="coefficients"):
            OP(*good, bad_rows, 0.9, 0.99, 1e-8)
    for steps, numbers in (([], [torch.ones(())] * 5), ([torch.ones((), dtype=torch.int64)], [torch.ones(())] * 5)):
        with pytest.raises(RuntimeError, match="adamw_ema_coefficients_"):
            COEFFICIENTS(steps, numbers, 0.9, 0.99)
