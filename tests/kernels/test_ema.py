"""ema_ against float64, over one step and many, with all layouts, dtypes and lengths."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from jepa_kernels import ema_
from jepa_kernels.ema import _ema_kernel, ema_ref, ema_triton
from numerics import CUDA, DEVICES, implementations, needs_gpu, needs_interpreter, rms

OP = torch.ops.jepa_kernels.ema_
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXTURES = [(target, source) for target in DTYPES for source in DTYPES]
ONES = torch.ones(2)
LENGTHS = [0, 1, 5, 1023, 1024, 1025, 4096, 4097, 8191]
averages = pytest.mark.parametrize(("ema", "device"), implementations(OP, ema_ref, ema_triton))


def cut_off(ema) -> bool:
    """Whether bfloat16 results are truncated instead of rounded, as Triton's interpreter does."""
    return ema is ema_triton and not CUDA


@averages
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.9, 0.996, 0.9999, 1.0])
def test_one_step_against_float64(ema, device, momentum):
    """At most 1.25 times the error of rounding the exact answer; twice if the difference has a similar weight."""
    pairs = [(n, *mixture) for mixture in MIXTURES for n in LENGTHS]
    targets = [torch.randn(n).to(to) for n, to, _ in pairs]
    sources = [torch.randn(n).to(of) for n, _, of in pairs]
    exact = [t.double() * momentum + s.double() * (1 - momentum) for t, s in zip(targets, sources, strict=True)]
    moved = [t.clone().to(device) for t in targets]
    ema(moved, [s.to(device) for s in sources], torch.tensor(1 - momentum))
    for mixture in MIXTURES:
        chosen = [i for i, (_, *dtypes) in enumerate(pairs) if tuple(dtypes) == mixture]
        answer, result = torch.cat([exact[i] for i in chosen]), torch.cat([moved[i].cpu() for i in chosen])
        rounding = rms(answer.to(mixture[0]).double() - answer)
        slack = 2 if 0.1 <= momentum <= 0.5 else 1.25
        if cut_off(ema) and mixture[0] == torch.bfloat16:
            rounding, slack = rms(answer) * 2**-7, 1
        assert result.dtype == mixture[0]
        assert rms(result.double() - answer) <= slack * rounding, mixture


@pytest.mark.slow
@averages
def test_many_steps_against_float64(ema, device):
    """A teacher's schedule, .9 -> 1: rounding errors accumulate as a random walk, without drift."""
    steps, n = 400, 3001
    target, exact = torch.randn(n).to(device), None
    exact = target.double().cpu()
    for step in range(steps):
        momentum = 0.9 + 0.1 * step / steps
        source = torch.randn(n)
        exact += (1 - momentum) * (source.double() - exact)
        ema([target], [source.to(device)], torch.tensor(1 - momentum))
    assert rms(target.cpu().double() - exact) < 4 * 2**-24 * rms(exact)


@averages
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_value_is_read_and_every_float_is_written(ema, device, dtype):
    """With a momentum of 0, ema_ converts dtypes."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for of in DTYPES[1:]:
        source = halves.view(of)
        source = source[source.isfinite() & (source.float().abs() >= 2**-126)]
        target = torch.zeros(len(source), dtype=torch.float32, device=device)
        ema([target], [source.to(device)], torch.ones(()))
        assert torch.equal(target.cpu(), source.float())
    source = torch.randint(-(2**31), 2**31, (20_011,)).to(torch.int32).view(torch.float32)
    source = source[source.isfinite() & (source.abs() >= 2**-14)]
    target = torch.zeros(len(source), dtype=dtype, device=device)
    ema([target], [source.to(device)], torch.ones(()))
    if not (cut_off(ema) and dtype != torch.float32):
        assert torch.equal(target.cpu(), source.to(dtype))


@averages
def test_nan_stays_nan(ema, device):
    targets = [torch.zeros(1500, dtype=dtype, device=device) for dtype in DTYPES]
    source = torch.zeros(1500, device=device)
    source[[3, 1499]] = torch.nan
    ema(targets, [source] * 3, torch.tensor(0.1))
    for target in targets:
        assert target.isnan().nonzero().flatten().tolist() == [3, 1499]


@pytest.mark.parametrize("device", DEVICES)
def test_any_layout(device):
    base = torch.randn(4, 3, 6, 5)
    dense = [
        base,
        base.to(memory_format=torch.channels_last),
        base.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    ]
    others = [*dense, base[:, :1].expand(4, 3, 6, 5), torch.randn(4, 3, 6, 10)[..., ::2]]
    for target in dense:
        for source in others:
            moved = target.clone().to(device)
            before = source.clone()
            ema_([moved], [source.to(device)], 0.9)
            torch.testing.assert_close(moved.cpu().double(), 0.9 * target.double() + 0.1 * source.double())
            assert moved.stride() == target.stride() and torch.equal(source, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_as_a_tensor(device, dtype):
    numbers, tensors = ([torch.ones(9, device=device)] for _ in range(2))
    source = [torch.randn(9, device=device)]
    for momentum in (0.5, 0.75, 1.0):  # exact in float32
        ema_(numbers, source, momentum)
        for home in {"cpu", device}:
            moved = [t.clone() for t in tensors]
            ema_(moved, source, torch.tensor(momentum, dtype=dtype, device=home))
            assert torch.equal(moved[0], numbers[0])
        tensors = moved


def test_does_not_depend_on_threads():
    targets = [torch.randn(n).to(dtype) for n in (70_001, 3, 0, 50_000) for dtype in DTYPES]
    sources = [torch.randn(len(t)) for t in targets]
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([t.clone() for t in targets])
        OP(results[-1], sources, torch.tensor(0.004))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_parameters_and_generators():
    student, teacher = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
    expected = [
        0.25 * t.detach() + 0.75 * s.detach() for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    ema_(teacher.parameters(), student.parameters(), 0.25)
    for t, e in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(t.detach(), e)


def test_backward_through_an_old_target_is_refused():
    target, x = torch.randn(4), torch.randn(4, requires_grad=True)
    y = (target * x).sum()
    ema_([target], [torch.randn(4)], 0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    targets = [
        torch.randn(3, 5, device=device),
        torch.randn(7, device=device).bfloat16(),
        torch.empty(0, device=device),
    ]
    sources = [torch.randn(t.shape, device=device) for t in targets]
    opcheck(OP, (targets, sources, torch.tensor(0.1)))
    opcheck(OP, ([torch.randn(5, 3, device=device).T], [torch.randn(5, 3, device=device).T], torch.tensor(0.1)))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device, dynamic):
    def student_and_teacher(x: Tensor, teacher: Tensor, momentum: float | Tensor) -> Tensor:
        student = x.sin()
        ema_([teacher], [student], momentum)
        return student + teacher

    compiled = torch.compile(student_and_teacher, fullgraph=True, dynamic=dynamic)
    for n in (5, 12):
        for momentum in (0.9, torch.tensor(0.75)):
            x, teacher = torch.randn(n, device=device), torch.randn(n, device=device)
            twin = teacher.clone()
            torch.testing.assert_close(compiled(x, teacher, momentum), student_and_teacher(x, twin, momentum))
            torch.testing.assert_close(teacher, twin)


@pytest.mark.parametrize(
    ("targets", "sources", "momentum", "names"),
    [
        ([torch.ones(2)], [], 0.9, "1 targets, 0 sources"),
        ([torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(4)], 0.9, r"sources\[1\].*\(3,\).*\(4,\)"),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.int64)], 0.9, r"int64 for sources\[0\]"),
        ([torch.ones(2, dtype=torch.complex64)], [torch.ones(2)], 0.9, r"complex64 for targets\[0\]"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], 0.9, r"sources\[0\] on meta"),
        ([torch.ones(4, 4)[:, ::2]], [torch.ones(4, 2)], 0.9, r"targets\[0\] must be non-overlapping"),
        ([torch.ones(1).expand(4)], [torch.ones(4)], 0.9, r"targets\[0\] must be non-overlapping"),
        ([torch.ones(2)], [torch.zeros(2)], 1.1, "momentum.*1.1"),
        ([torch.ones(2)], [torch.zeros(2)], float("nan"), "momentum.*nan"),
        ([torch.ones(2)], [torch.zeros(2)], torch.ones(1), r"momentum.*\(1,\)"),
        ([torch.ones(2)], [torch.zeros(2)], torch.tensor(1.5), r"momentum.*1\.5"),
        ([torch.ones(2).to(torch.float8_e4m3fn)], [torch.zeros(2)], 0.9, r"float8_e4m3fn for targets\[0\]"),
        ([ONES, ONES], [torch.zeros(2)] * 2, 0.9, "must not share memory"),
        ([ONES, ONES.view(2)], [torch.zeros(2)] * 2, 0.9, "must not share memory"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(targets, sources, momentum, names):
    with pytest.raises(ValueError, match=names):
        ema_(targets, sources, momentum)
    assert all(bool((t == 1).all()) for t in targets)


def test_the_op_refuses_lists_that_do_not_match():
    for sources, weight in (
        ([torch.ones(5)], torch.ones(())),
        ([torch.ones(5), torch.ones(6)], torch.ones(())),
        ([torch.ones(5), torch.ones(7).double()], torch.ones(())),
        ([torch.ones(5), torch.ones(7)], torch.ones((), dtype=torch.float64)),
    ):
        with pytest.raises(RuntimeError, match="ema_"):
            OP([torch.ones(5), torch.ones(7)], sources, weight)


def test_float64_traces_with_a_momentum_that_has_no_value():
    with FakeTensorMode():
        for momentum in (torch.tensor(0.9, dtype=torch.float64) + torch.rand(()), 0.9):
            ema_([torch.empty(3, dtype=torch.float64)], [torch.empty(3)], momentum)


@pytest.mark.parametrize("device", DEVICES)
def test_float64_mixed_with_other_dtypes(device):
    """Pairs with a float64 target or source are computed in float64; the source is not rounded first."""
    momentum = 0.9999
    kinds = [(torch.float64, torch.float64), (torch.float64, torch.bfloat16), (torch.float32, torch.float64)]
    targets = [torch.randn(3, 67, device=device).to(to) for to, _ in [*kinds, *MIXTURES]]
    sources = [torch.randn(3, 67, device=device).to(of) for _, of in [*kinds, *MIXTURES]]
    exact = [t.double() * momentum + s.double() * (1 - momentum) for t, s in zip(targets, sources, strict=True)]
    before = [t.clone() for t in targets]
    ema_(targets, sources, momentum)
    for target, answer in zip(targets[:2], exact, strict=False):
        torch.testing.assert_close(target, answer, rtol=0, atol=1e-15)
    assert torch.equal(targets[2], exact[2].float())
    ema_(before[3:], sources[3:], momentum)
    assert all(torch.equal(a, b) for a, b in zip(targets[3:], before[3:], strict=True))


@averages
def test_unaligned_tensors_among_aligned_ones(ema, device):
    lengths, exact = (3000, 3001, 3000, 3001), []
    bases = [torch.randn(n + 1, device=device) for n in lengths]
    targets = [bases[0][1:], bases[1][:-1], bases[2][:-1], bases[3][1:]]
    sources = [torch.randn(n + 1, device=device)[i % 2 :][:n] for i, n in enumerate(lengths)]
    exact = [torch.lerp(t.double(), s.double(), 0.25) for t, s in zip(targets, sources, strict=True)]
    ends = [bases[0][0].item(), bases[1][-1].item(), bases[2][-1].item(), bases[3][0].item()]
    ema(targets, sources, torch.tensor(0.25))
    for target, answer in zip(targets, exact, strict=True):
        assert rms(target.double() - answer) <= 1.25 * rms(answer.float() - answer)
    assert ends == [bases[0][0].item(), bases[1][-1].item(), bases[2][-1].item(), bases[3][0].item()]


@needs_interpreter
def test_addresses_beyond_32_bits(tmp_path):
    """The last block of a tensor of 2**31 + 1029 elements in a sparse file: only that block is touched."""
    n = 2**31 + 1029
    target = torch.from_file(str(tmp_path / "t"), shared=True, size=n, dtype=torch.bfloat16)
    target[-5:] = 1.0
    source = torch.full((5,), 3.0)
    shifted = source.data_ptr() - 4 * (n - 5)  # its base address if n - 5 elements preceded it
    table = torch.tensor([[n, target.data_ptr(), shifted, 1, 0]])
    blocks = torch.tensor([[0, (n - 5) // 1024]], dtype=torch.int32)
    _ema_kernel[(1,)](blocks, table, 0.5, ON_DEVICE=False, BLOCK=1024)
    assert target[-5:].tolist() == [2.0] * 5 and target[-6] == 0


@needs_gpu
def test_addresses_beyond_32_bits_on_a_gpu():
    """Needs 9 GB."""
    n = 2**31 + 1029
    target, source = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    target[-5:], source[-5:] = 1.0, 3.0
    ema_([target], [source], 0.5)
    assert target[-5:].tolist() == [2.0] * 5 and not target[:-5].any()
