"""The ops of jepa_kernels and their competitors: plain PyTorch, torch.compile of it, the best that are installed.

An op is a function of (size, device, dtype) that makes a `Case`: calls to time, the bytes and operations they need, and
a correctness check of every contender. `eager` is plain PyTorch as written from the paper.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
import torch.utils.cpp_extension
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import jepa_kernels as ours

Call = Callable[[], Any]
Contenders = dict[str, Callable[..., Any]]
torch._functorch.config.donated_buffer = False  # compiled backwards run many times on one graph
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
M = 4  # target blocks
MANY = 200  # tensors: torch.compile of an optimizer over more takes minutes (ViT-B has 152, ViT-H 388)


@dataclass(frozen=True)
class Size:
    """A ViT with I-JEPA's masks: width D, depth, patch; mean tokens kept in the context (Kc) and in a target (Kt)."""

    D: int
    depth: int
    patch: int
    Kc: int
    Kt: int
    Dp: int = 384
    B: int = 128
    hidden: int | None = None  # width of the MLP; None: 4 D

    @property
    def N(self) -> int:
        return (224 // self.patch) ** 2

    def weights(self) -> list[tuple[int, ...]]:
        """The shapes of the encoder's parameters."""
        D, F = self.D, self.hidden or 4 * self.D
        block = [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (F, D), (F,), (D, F), (D,)]
        return [(D, 3, self.patch, self.patch), (D,), *block * self.depth, (D,), (D,)]


SIZES = {
    "vit_tiny_16": Size(192, 12, 16, 51, 33),
    "vit_small_16": Size(384, 12, 16, 51, 33),
    "vit_base_16": Size(768, 12, 16, 51, 33),
    "vit_large_16": Size(1024, 24, 16, 51, 33),
    "vit_huge_14": Size(1280, 32, 14, 69, 44),
    "vit_giant_16": Size(1408, 40, 16, 51, 33, B=16, hidden=6144),
}


@dataclass
class Case:
    """One op: calls[mode][contender], and the (bytes, operations) that a mode needs."""

    calls: dict[str, dict[str, Call]]
    work: Mapping[str, tuple[float, float]]
    check: Callable[[], None]
    copies: Callable[[str, str, int], list[Call]] | None = None  # (mode, contender, count): each on its own buffers


Op = Callable[[Size, str, torch.dtype], Case]
OPS: dict[str, Op] = {}


def benchmark(op: Op) -> Op:
    """Adds it to `OPS`, under its name."""
    OPS[op.__name__] = op
    return op


# --- the ops and their plain PyTorch equivalents


@benchmark
def gather(size: Size, device: str, dtype: torch.dtype) -> Case:
    def eager(x: Tensor, index: Tensor) -> Tensor:
        return torch.gather(x, 1, index[:, :, None].expand(-1, -1, x.shape[2]))

    def indexing(x: Tensor, index: Tensor) -> Tensor:
        return x[torch.arange(len(x), device=x.device)[:, None], index]

    x, index = randn(size.B, size.N, size.D), subsets((size.B,), size.N, size.Kc)
    n, e = size.B * size.Kc * size.D, dtype.itemsize
    grad = (n + x.numel()) * e
    work = {"forward": (2 * n * e, n), "backward": (grad, n), "both": (2 * n * e + grad, 2 * n)}
    contenders = {"ours": ours.gather_tokens, "eager": eager, "indexing": indexing}
    return differentiable(contenders, [x, index], [x], work, device, dtype)


@benchmark
def patchify(size: Size, device: str, dtype: torch.dtype) -> Case:
    P = size.patch

    def fused(images: Tensor, index: Tensor, like: Tensor) -> Tensor:
        return ours.patchify(images, index, mean=MEAN, std=STD, patch_size=P, dtype=like.dtype)

    wide = torch.promote_types(dtype, torch.float32)
    constants = {  # made once, like buffers of a model: a tensor from a list makes the host wait for a GPU
        x: [torch.tensor(v, dtype=x, device=device)[:, None, None] for v in (MEAN, STD)] for x in (wide, torch.float64)
    }

    def eager(images: Tensor, index: Tensor, like: Tensor) -> Tensor:
        mean, std = constants[torch.promote_types(like.dtype, torch.float32)]
        x = ((images.to(mean.dtype) / 255 - mean) / std).to(like.dtype)
        x = x.unflatten(3, (-1, P)).unflatten(2, (-1, P)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return torch.gather(x, 1, index[:, :, None].expand(-1, -1, x.shape[2]))

    images = torch.randint(256, (size.B, 3, 224, 224), dtype=torch.uint8)
    index, kept = subsets((size.B,), size.N, size.Kc), size.B * size.Kc * 3 * P * P
    contenders = {"ours": fused, "eager": eager}
    inputs = [images, index, torch.empty(0)]
    # Memory is read in 32-byte sectors: those with pixels of kept patches, in P rows per patch and 3 channels.
    pixels = torch.zeros(size.B, size.N).scatter(1, index, 1).view(size.B, 224 // P, -1).repeat_interleave(P, 2)
    sectors = int(pixels.unflatten(2, (-1, 32)).amax(3).sum()) * P * 3
    work = {"forward": (32 * sectors + kept * dtype.itemsize, 2 * kept)}
    return differentiable(contenders, inputs, [], work, device, dtype)


@benchmark
def predictor_tokens(size: Size, device: str, dtype: torch.dtype) -> Case:
    def eager(context: Tensor, context_index: Tensor, target_index: Tensor, pos: Tensor, mask_token: Tensor) -> Tensor:
        seen = (context + pos[context_index]).to(context.dtype)
        asked = (mask_token + pos[target_index]).to(context.dtype)
        return torch.cat([seen.repeat(len(target_index), 1, 1), asked.flatten(0, 1)], 1)

    B, Dp = size.B, size.Dp
    context, pos, mask_token = randn(B, size.Kc, Dp), randn(size.N, Dp), randn(Dp)
    inputs = [context, subsets((B,), size.N, size.Kc), subsets((M, B), size.N, size.Kt), pos, mask_token]
    written = M * B * (size.Kc + size.Kt) * Dp
    one = (context.numel() + written) * dtype.itemsize
    work = {"forward": (one, written), "backward": (one, written), "both": (2 * one, 2 * written)}
    contenders = {"ours": ours.predictor_tokens, "eager": eager}
    return differentiable(contenders, inputs, [context, mask_token], work, device, dtype)


@benchmark
def prediction_loss(size: Size, device: str, dtype: torch.dtype) -> Case:
    def eager(pred: Tensor, target: Tensor, index: Tensor) -> Tensor:
        wide = torch.promote_types(target.dtype, torch.float32)
        target = F.layer_norm(target.to(wide), target.shape[-1:])
        chosen = [torch.gather(target, 1, k[:, :, None].expand(-1, -1, target.shape[2])) for k in index]
        return F.smooth_l1_loss(pred.to(wide), torch.cat(chosen))

    B, D = size.B, size.D
    pred, target = randn(M * B, size.Kt, D), randn(B, size.N, D)
    n, e = pred.numel(), dtype.itemsize
    # A backward alone, on a retained graph, reads the value saved for each element and writes its gradient.
    work = {"forward": (2 * n * e, 12 * n), "backward": (2 * n * e, n), "both": (3 * n * e, 13 * n)}
    inputs = [pred, target, subsets((M, B), size.N, size.Kt)]
    return differentiable({"ours": ours.prediction_loss, "eager": eager}, inputs, [pred], work, device, dtype)


@benchmark
def vicreg(size: Size, device: str, dtype: torch.dtype) -> Case:
    def weighted(terms: Sequence[Tensor]) -> Tensor:
        return 25 * terms[0] + 25 * terms[1] + terms[2]

    def covariance(x: Tensor) -> Tensor:
        C = x.mT @ x / (x.shape[-2] - 1)
        return (C * (1 - torch.eye(len(C[0]), dtype=C.dtype, device=C.device))).square().sum() / x.shape[-1]

    def eager(z: Tensor) -> Tensor:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        variance = F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        invariance = 2 / (M - 1) * (z - z.mean(1, keepdim=True)).square().sum(1).mean()
        return weighted((invariance, variance, 2 / M * covariance((z - z.mean(0)).transpose(0, 1))))

    def pairwise(z: Tensor) -> Tensor:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        total = []
        for a, b in ((z[:, i], z[:, j]) for i in range(M) for j in range(M) if i != j):
            std_a, std_b = (F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean() for x in (a, b))
            cov_a, cov_b = (covariance(x - x.mean(0)) for x in (a, b))
            total.append(weighted((F.mse_loss(a, b), (std_a + std_b) / 2, cov_a + cov_b)))
        return torch.stack(total).mean()

    B, D = size.B, size.D
    z = randn(B, M, D)
    one, product = z.numel() * dtype.itemsize, z.numel() * min(B, D)
    work = {"forward": (one, product), "backward": (2 * one, 2 * product), "both": (3 * one, 3 * product)}
    contenders = {"ours": lambda z: weighted(ours.vicreg(z)), "eager": eager, "pairwise": pairwise}
    return differentiable(contenders, [z], [z], work, device, dtype)


@benchmark
def sigreg(size: Size, device: str, dtype: torch.dtype) -> Case:
    """Eight views, 128 channels and the paper's 1024 slices and 17 knots."""
    V, D, S, K = 8, 128, 1024, 17

    def eager(z: Tensor, slices: Tensor) -> Tensor:
        wide = torch.promote_types(z.dtype, torch.float32)
        t = torch.arange(K, dtype=wide, device=z.device) * (3 / (K - 1))
        phi = torch.exp(-t * t / 2)
        weight = torch.cat([t[1:2], (2 * t[1]).expand(K - 2), t[1:2]])
        angle = (z.to(wide) @ slices.to(wide))[..., None] * t
        off = (angle.cos().mean(1) - phi).square() + angle.sin().mean(1).square()
        return z.shape[1] * (off @ (weight * phi)).mean()

    z, slices = randn(V, size.B, D), randn(D, S)
    slices /= slices.norm(dim=0)
    n, e = V * size.B * S, dtype.itemsize
    product, one = 2 * n * D, (z.numel() + slices.numel()) * e
    turning = 8 * n * (K - 1)  # a rotation and two sums per knot, or Horner's rule
    work = {
        "forward": (one, product + turning),
        "backward": (one + z.numel() * e, product + turning),
        "both": (2 * one + z.numel() * e, 2 * (product + turning)),
    }
    return differentiable({"ours": ours.sigreg, "eager": eager}, [z, slices], [z], work, device, dtype)


@benchmark
def ema(size: Size, device: str, dtype: torch.dtype) -> Case:
    """float32 averages of float32 weights."""
    return averages(size, device, torch.float32)


@benchmark
def ema_bf16(size: Size, device: str, dtype: torch.dtype) -> Case:
    """float32 averages of bfloat16 weights."""
    return averages(size, device, torch.bfloat16)


def averages(size: Size, device: str, dtype: torch.dtype) -> Case:
    momentum = 0.996

    def eager(targets: list[Tensor], sources: list[Tensor]) -> None:
        for t, s in zip(targets, sources, strict=True):
            t.mul_(momentum).add_(s, alpha=1 - momentum)

    def foreach_lerp(targets: list[Tensor], sources: list[Tensor]) -> None:
        same = sources if sources[0].dtype == targets[0].dtype else [s.to(targets[0].dtype) for s in sources]
        torch._foreach_lerp_(targets, same, 1 - momentum)

    sources = [torch.randn(shape, device=device, dtype=dtype) for shape in size.weights()]
    start = [torch.randn(shape, device=device) for shape in size.weights()]
    contenders: Contenders = {
        "ours": lambda t, s: ours.ema_(t, s, momentum),
        "eager": eager,
        "compiled": torch.compile(eager),
        "foreach lerp": foreach_lerp,
    }
    targets = {name: [t.clone() for t in start] for name in contenders}
    calls: dict[str, Call] = {name: partial(f, targets[name], sources) for name, f in contenders.items()}

    def check() -> None:
        exact = [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(start, sources, strict=True)]
        for name, call in calls.items():
            call()
            must_agree(name, targets[name], exact)

    n = sum(t.numel() for t in start)
    return Case({"step": calls}, {"step": ((8 + dtype.itemsize) * n, 3 * n)}, check)


@benchmark
def adamw_ema(size: Size, device: str, dtype: torch.dtype) -> Case:
    """float32 weights, gradients, moments and averages. All contenders read the same gradients."""
    return optimizers(size, device, torch.float32)


@benchmark
def adamw_ema_bf16(size: Size, device: str, dtype: torch.dtype) -> Case:
    """The same with bfloat16 gradients, and bfloat16 copies of weights and averages to write."""
    return optimizers(size, device, torch.bfloat16)


def optimizers(size: Size, device: str, low: torch.dtype) -> Case:
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.05}
    start = [torch.randn(shape, device=device) for shape in size.weights()]
    grads = [(torch.randn_like(p) * 1e-3).to(low) for p in start]
    results: dict[str, list[Tensor]] = {}

    def contender(name: str, make: Callable[..., torch.optim.Optimizer]) -> Call:
        """An optimizer, then an average in a second pass."""
        params, averages = parameters(), [p.clone() for p in start]
        optimizer, weights = make(params, **options), [p.detach() for p in params]
        results[name] = [*weights, *averages]
        wide = [p.grad for p in params if p.grad is not None]
        copies = [x.to(low) for x in results[name]]

        def call() -> None:
            if low != torch.float32:
                torch._foreach_copy_(wide, grads)
            optimizer.step()
            torch._foreach_lerp_(averages, weights, 0.004)
            if low != torch.float32:
                torch._foreach_copy_(copies, results[name])

        return call

    def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(p.clone()) for p in start]
        for p, g in zip(params, grads, strict=True):
            p.grad_dtype = dtype
            p.grad = g.to(dtype)
        return params

    params = parameters(low)
    one_pass = ours.AdamWEMA(params, **options, momentum=0.996)
    for p in params if low != torch.float32 else ():
        one_pass.set_copies(p, weight=p.detach().to(low), ema=p.detach().to(low))
    one_pass.step()
    results["ours"] = [*(p.detach() for p in params), *(one_pass.state[p]["ema"] for p in params)]
    AdamW = torch.optim.AdamW
    calls = {"ours": one_pass.step, "eager": contender("eager", partial(AdamW, foreach=True))}
    on_gpu = device == "cuda"
    others: dict[str, Callable[..., torch.optim.Optimizer]] = {"fused + lerp": partial(AdamW, fused=True)}
    if len(start) > MANY:
        print(f"compiled: skipped, for {len(start)} tensors compiling takes minutes", flush=True)
    elif on_gpu or low == torch.float32:  # it takes a minute on a CPU: float32 only
        others["compiled"] = partial(AdamW, foreach=True, capturable=on_gpu)
    if on_gpu:
        others |= {f"{name} + lerp": optimizer for name, optimizer in installed_optimizers().items()}
    # Bytes of weights, averages, moments, gradients and copies, with room for the temporaries of foreach.
    needed = (28 if low == torch.float32 else 32) * sum(p.numel() for p in start)
    for name, optimizer in others.items():
        if on_gpu and free_bytes() < needed:
            print(f"{name}: skipped, another {needed / 1e9:.0f} GB do not fit", flush=True)
            continue
        try:
            call = contender(name, optimizer)
        except (RuntimeError, ImportError) as error:  # DeepSpeed and apex compile theirs here, if they can
            print(f"{name}: skipped, {str(error).splitlines()[0][:100]}", flush=True)
            continue
        calls[name] = torch.compile(call) if name == "compiled" else call
    if on_gpu:
        apex_too = find_spec("apex") and find_spec("apex.contrib.openfold_triton")
        if apex_too and low == torch.float32:  # writes one more float32 copy
            apex = import_module("apex.contrib.openfold_triton.fused_adam_swa")
            params, averages = parameters(), [p.clone() for p in start]
            options["adam_math_mode"] = apex.AdamMathType.ApexAdamW
            one_launch = apex.FusedAdamSWA(params, parameters(), averages, 0.996, **options)
            one_launch.swa_param_groups[0]["n_averaged"] = 1  # starts from the weights, as the others do
            results["apex FusedAdamSWA"] = [*(p.detach() for p in params), *averages]
            calls["apex FusedAdamSWA"] = one_launch.step

    def check() -> None:
        for name, call in calls.items():
            for _ in range(2 if name == "ours" else 3):  # ours took a step before, to create its state
                call()
        for name, result in results.items():
            must_agree(name, result, results["eager"])

    n = sum(p.numel() for p in start)
    moved = 32 + (4 if low == torch.float32 else 3 * low.itemsize)  # four tensors in and out, the gradient, copies
    return Case({"step": calls}, {"step": (moved * n, 18 * n)}, check)


def free_bytes() -> int:
    """Free GPU memory, including what torch has cached."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def installed_optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    found = {}
    if find_spec("deepspeed") and torch.utils.cpp_extension.CUDA_HOME:  # it is built with nvcc
        found["DeepSpeed FusedAdam"] = import_module("deepspeed.ops.adam").FusedAdam
    if find_spec("apex") and find_spec("apex.optimizers"):
        found["apex FusedAdam"] = import_module("apex.optimizers").FusedAdam
    return found


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def must_agree(name: str, results: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(results, wanted, strict=True):
        error = ((a - b).abs().max() / (1 + b.abs().max())).item()
        if not error < 1e-6:
            sys.exit(f"{name} is wrong by {error:.1e}")


def subsets(shape: tuple[int, ...], N: int, K: int) -> Tensor:
    """K of N token indices in raster order, as in masks."""
    return torch.rand(*shape, N).argsort(-1)[..., :K].sort(-1).values


def differentiable(
    contenders: Contenders,
    inputs: list[Tensor],
    wanted: list[Tensor],
    work: Mapping[str, tuple[float, float]],
    device: str,
    dtype: torch.dtype,
) -> Case:
    """`wanted`: the inputs whose gradients are part of the work."""
    contenders = {**contenders, "compiled": torch.compile(contenders["eager"])}
    places = [i for i, x in enumerate(inputs) if any(x is y for y in wanted)]

    def with_gradients(tensors: list[Tensor]) -> list[Tensor]:
        return [x.detach().requires_grad_(i in places) for i, x in enumerate(tensors)]

    def prepared() -> list[Tensor]:
        return with_gradients([x.to(device, dtype if x.is_floating_point() else x.dtype, copy=True) for x in inputs])

    def results(f: Callable[..., Any], xs: list[Tensor], dy: Tensor) -> list[Tensor]:
        y = f(*xs)
        gradients = torch.autograd.grad(y, [xs[i] for i in places], dy.to(y.dtype)) if places else ()
        return [y.detach(), *gradients]

    args = prepared()
    slope = torch.randn_like(contenders["eager"](*args))
    start = slope if slope.ndim else torch.ones_like(slope)  # incoming gradient of timed backwards; 1 for a loss

    def check() -> None:
        exactly = with_gradients([x.double() if x.is_floating_point() else x for x in args])
        exact = results(contenders["eager"], exactly, slope)
        errors = {
            name: [rms(a.double() - b) / rms(b) for a, b in zip(results(f, args, slope), exact, strict=True)]
            for name, f in contenders.items()
        }
        for name, found in errors.items():
            for error, allowed in zip(found, errors["eager"], strict=True):
                if not error <= 2 * allowed + 2e-6:
                    sys.exit(f"{name} is wrong: relative error {error:.1e}, eager's {allowed:.1e}")

    def forward(f: Callable[..., Any], xs: list[Tensor]) -> Call:
        return torch.no_grad()(lambda: f(*xs))

    def backward(f: Callable[..., Any], xs: list[Tensor]) -> Call:
        y, wanted = f(*xs), [xs[i] for i in places]
        dy = start.to(y.dtype, copy=True)  # one per call, or it would stay in a GPU's cache
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def both(f: Callable[..., Any], xs: list[Tensor]) -> Call:
        dy = start.clone()
        return lambda: results(f, xs, dy)

    modes = {"forward": forward, "backward": backward, "both": both} if places else {"forward": forward}

    def copies(mode: str, name: str, count: int) -> list[Call]:
        return [modes[mode](contenders[name], prepared()) for _ in range(count)]

    calls = {mode: {name: make(f, args) for name, f in contenders.items()} for mode, make in modes.items()}
    return Case(calls, work, check, copies)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
