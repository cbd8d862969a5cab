"""AdamW and the exponential moving average of the weights in one pass over memory (arXiv 1711.05101, alg. 2).

    g <- grad_scale * g
    m <- beta1 m + (1 - beta1) g;    v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr * weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    e <- momentum e + (1 - momentum) p

Averages are computed as x + (1 - beta) (new - x), and p by subtracting what is small from it: the one rounding that
counts is that of the result. Bytes per parameter: 28 for AdamW (p, m, v read and written, g read) and 8 for e; 2 less
for a 16-bit gradient, 2 more for each 16-bit copy. The CPU kernel is in csrc/adamw_ema.cpp.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import BLOCK, at, is_capturing, lerp, tables, upload

Number: TypeAlias = float | Tensor

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class AdamWEMA(torch.optim.Optimizer):
    """`torch.optim.AdamW` that also keeps the exponential moving average of the weights.

    params: float32 parameters or groups of them; a group may set any option below for itself. Gradients may be
        float32, bfloat16 or float16 (`p.grad_dtype`).
    lr, weight_decay, momentum: numbers or 0-d tensors. Set them in `param_groups`, or a tensor in place, before
        any step: no kernel is compiled again, and a tensor on the device is read there. torch.compile and a CUDA
        graph take a number for a constant: around a compiled or captured step give them tensors.
    momentum: of the average, which starts as a copy of the weights before their first update.
    ema: whether there is an average.
    capturable: keeps the step counters on the device, so a CUDA graph can hold a step and `found_inf` undo it.
        Take one step before the capture, which makes the state.

    `state[p]` holds `step` (float32, 0-d) and, float32 in the layout of p, `exp_avg`, `exp_avg_sq` and `ema`. An
    `ema` that is put there before the first step is kept: a teacher's own weight, which then is the average
    (load_state_dict, as it does, puts other tensors in its place). A parameter without a gradient is left out of the
    step, and so is its average. Weights in 16 bits are refused: AdamW's updates vanish in them. Keep float32 ones here
    and let `set_copies` write the others.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        momentum: Number = 0.996,
        *,
        ema: bool = True,
        capturable: bool = False,
    ) -> None:
        self._copies: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**options, "ema": ema, "capturable": capturable})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_copies", {})
        for group in self.param_groups:  # a state of torch.optim.AdamW lacks these
            for option in ("momentum", "ema", "capturable"):
                group.setdefault(option, self.defaults[option])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def set_copies(self, param: Tensor, *, weight: Tensor | None = None, ema: Tensor | None = None) -> None:
        """From the next step on, also writes the new weight and its average here, in the same pass.

        weight, ema: bfloat16, float16 or float32, with param's shape, strides and device; None: no copy. They
            stay the caller's: give them a first value; no state_dict holds them.
        """
        group = next((g for g in self.param_groups if any(param is p for p in g["params"])), None)
        if group is None:
            raise ValueError("AdamWEMA.set_copies: param must be a parameter of this optimizer, and is none")
        if ema is not None and not group["ema"]:
            raise ValueError("AdamWEMA.set_copies: ema given, but param's group has ema=False")
        wanted = (param.shape, param.stride(), param.device)
        for name, copy in (("weight", weight), ("ema", ema)):
            if copy is None:
                continue
            if (copy.shape, copy.stride(), copy.device) != wanted or copy.dtype not in _TRITON:
                raise ValueError(
                    f"AdamWEMA.set_copies: {name} must be bfloat16, float16 or float32 with param's shape "
                    f"{tuple(param.shape)}, strides {param.stride()} and device {param.device}, got {copy.dtype}, "
                    f"{tuple(copy.shape)}, {copy.stride()}, {copy.device}: torch.empty_like(param, dtype=...)"
                )
        spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (param, weight, ema) if t is not None and t.numel()]
        spans.sort()
        if any(start < end for (_, end), (start, _) in pairwise(spans)):
            raise ValueError("AdamWEMA.set_copies: param, weight and ema must not share memory, and two of them do")
        self._copies[param] = (weight, ema)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Number = 1.0,
        found_inf: Tensor | None = None,
    ) -> Any:
        """Updates every parameter that has a gradient, and its average; returns the closure's loss.

        grad_scale: multiplies the gradients as they are read: 1 / loss scale, a clipping factor or their product.
        found_inf: 0-d tensor; where it is not 0 nothing changes, and nobody waits to learn it. The step counters
            must lie where the parameters do: on the CPU, or capturable=True.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_options(group)
        batches = [(group, params) for group in self.param_groups for params in self._batches(group, found_inf)]
        for group, params in batches:  # nothing is written before everything is checked
            self._update(group, params, grad_scale, found_inf)
        return loss

    def _batches(self, group: dict[str, Any], found_inf: Tensor | None) -> Iterable[list[Tensor]]:
        """The parameters to update, their state complete; together those that agree in device and dtypes."""
        batches: defaultdict[Any, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                _check(p, p.grad)
                if is_capturing(p.device) and ("step" not in self.state[p] or self.state[p]["step"].is_cpu):
                    raise RuntimeError(
                        "AdamWEMA.step: a CUDA graph needs the state and its step counters on the device: create the "
                        "optimizer with capturable=True and take one step before the capture"
                    )
                self._prepare(p, group)
                step = self.state[p]["step"]
                if found_inf is not None and step.device != p.device:
                    raise ValueError(
                        f"AdamWEMA.step: found_inf needs the step counters on {p.device} beside the parameters, got "
                        f"them on {step.device}: create the optimizer with capturable=True"
                    )
                copies = self._copies.get(p, (None, None))
                batches[(p.device, p.grad.dtype, *(c if c is None else c.dtype for c in copies))].append(p)
        return batches.values()

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        if group["ema"] and "ema" not in state:  # also after loading a state of torch.optim.AdamW
            state["ema"] = p.detach().clone()
        for name in ("exp_avg", "exp_avg_sq", "ema"):
            if name in state:
                state[name] = _in_layout_of(p, state[name])

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Number, found_inf: Tensor | None
    ) -> None:
        states = [self.state[p] for p in params]
        copies = [self._copies.get(p, (None, None)) for p in params]
        steps = [state["step"] for state in states]
        if found_inf is None:
            torch._foreach_add_(steps, 1.0)
        else:
            torch._foreach_add_(steps, [(found_inf == 0).float().reshape(())] * len(steps))
        weight_copies = [weight for weight, _ in copies if weight is not None]
        ema_copies = [ema for _, ema in copies if ema is not None]
        emas = [state["ema"] for state in states] if group["ema"] else []
        torch.ops.jepa_kernels.adamw_ema_(
            params,
            [_in_layout_of(p, p.grad) for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            emas,
            weight_copies,
            ema_copies,
            _coefficients(steps, group, grad_scale, found_inf, params[0].device),
            *group["betas"],
            group["eps"],
        )
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version([*params, *emas, *weight_copies, *ema_copies])


def _check_options(options: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "momentum", "eps"):
        value = options[name]
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise ValueError(f"AdamWEMA: {name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        elif not 0 <= value <= (1 if name == "momentum" else float("inf")):
            raise ValueError(f"AdamWEMA: {name} must not be negative (momentum: nor above 1), got {value}")
    if len(options["betas"]) != 2 or not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"AdamWEMA: betas must be two numbers in [0, 1), got {options['betas']}")


def _check(p: Tensor, grad: Tensor) -> None:
    if p.dtype != torch.float32:
        raise ValueError(
            f"AdamWEMA: parameters must be float32, got {p.dtype}, shape {tuple(p.shape)}: AdamW's updates vanish "
            "in 16 bits. Keep float32 weights (autocast, or ZeRO's partitions); set_copies writes the 16-bit ones"
        )
    if grad.layout != torch.strided or grad.dtype not in _TRITON:
        raise ValueError(
            f"AdamWEMA: gradients must be dense float32, bfloat16 or float16, got {grad.dtype}, {grad.layout} "
            f"for the parameter of shape {tuple(p.shape)}"
        )
    if not p.is_contiguous() and torch.empty_like(p, device="meta").stride() != p.stride():
        raise ValueError(
            f"AdamWEMA: a parameter must fill its memory without gaps or overlaps, got shape {tuple(p.shape)} "
            f"with strides {p.stride()}: make it contiguous() before it is given to the optimizer"
        )


def _in_layout_of(p: Tensor, tensor: Tensor) -> Tensor:
    """A gradient or state with its elements in the order of p's memory, which is the order kernels walk."""
    if tensor.stride() == p.stride() and tensor.shape == p.shape:
        return tensor
    if tensor.shape != p.shape:
        raise ValueError(
            f"AdamWEMA: gradient and state must have the shape of their parameter, {tuple(p.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    return torch.empty_like(p, dtype=tensor.dtype).copy_(tensor)


def _coefficients(
    steps: list[Tensor],
    options: dict[str, Any],
    grad_scale: Number,
    found_inf: Tensor | None,
    device: torch.device,
) -> Tensor:
    """[R, 6] float32: what the update of each parameter multiplies by, worked out in float64.

    lr * weight_decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - momentum, grad_scale, 1 to apply or
    0. On the CPU, or on the device as soon as one of the numbers lies there, so that nothing waits for it.
    """
    beta1, beta2 = options["betas"]
    given = [options["lr"], options["weight_decay"], options["momentum"], grad_scale, found_inf]
    on_device = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in (*given, steps[0]))
    lr, weight_decay, momentum, scale, inf = (
        x.item() if on_device and isinstance(x, Tensor) and x.device.type == "cpu" else x for x in given
    )
    t = torch.stack(steps)
    t = (upload(t, device) if on_device and t.device.type == "cpu" else t).double()
    rows = t.new_empty(len(steps), 6)
    rows[:, 0] = lr * weight_decay
    rows[:, 1] = lr / (1 - beta1**t)
    rows[:, 2] = (1 - beta2**t).rsqrt()
    rows[:, 3] = 1 - momentum
    rows[:, 4] = scale
    rows[:, 5] = 1.0 if inf is None else inf == 0
    return rows.float()


# --- reference: the definition, the fallback for devices without a kernel, the oracle of the tests


def adamw_ema_ref(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    weight_copies: list[Tensor],
    ema_copies: list[Tensor],
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    for i, p in enumerate(params):
        decay, lr, rsqrt_bias2, weight, scale, apply = coefficients[i].to(p.device)
        g = grads[i].float() * scale
        m = torch.lerp(exp_avgs[i], g, 1 - beta1)
        v = torch.lerp(exp_avg_sqs[i], g * g, 1 - beta2)
        new = p - (decay * p + lr * m / (v.sqrt() * rsqrt_bias2 + eps))
        writes = [(p, new), (exp_avgs[i], m), (exp_avg_sqs[i], v)]
        if weight_copies:
            writes.append((weight_copies[i], new))
        if emas:
            ema = torch.lerp(emas[i], new, weight)
            writes += [(emas[i], ema)] + ([(ema_copies[i], ema)] if ema_copies else [])
        for old, value in writes:
            old.copy_(torch.where(apply != 0, value, old))


# --- triton


@triton.jit
def _adamw_ema_kernel(
    blocks,  # int32 [total, 2]: row, which block of it
    rows,  # int64 [R, 8]: elements, addresses of p, g, m, v, e and the copies of p and e (0: none)
    coefficients,  # float32 [R, 6]
    beta1_c,  # 1 - beta1
    beta2_c,  # 1 - beta2
    eps,
    GRAD: tl.constexpr,
    EMA: tl.constexpr,
    WEIGHT_COPY: tl.constexpr,
    EMA_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    r = tl.load(blocks + 2 * b).to(tl.int64)
    start = tl.load(blocks + 2 * b + 1).to(tl.int64) * BLOCK
    row = rows + r * 8
    left = tl.load(row) - start
    c = coefficients + r * 6
    addresses = tl.load(row + 1)
    for column in tl.static_range(2, 8):
        addresses |= tl.load(row + column)
    wide = (left >= BLOCK) & (addresses % 16 == 0)
    for WIDE in tl.static_range(2):  # a mask, or an odd address, would break wide loads into single elements
        if (tl.load(c + 5) != 0) & (wide == WIDE):
            PIECE: tl.constexpr = BLOCK if WIDE else BLOCK // 4  # single elements take more registers
            for k in range(0, BLOCK, PIECE):
                _update(
                    row, c, start + k, left - k, beta1_c, beta2_c, eps,
                    GRAD, EMA, WEIGHT_COPY, EMA_COPY, WIDE, PIECE,
                )  # fmt: skip


@triton.jit
def _update(
    row,
    c,
    start,
    left,
    beta1_c,
    beta2_c,
    eps,
    GRAD: tl.constexpr,
    EMA: tl.constexpr,
    WEIGHT_COPY: tl.constexpr,
    EMA_COPY: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
):
    decay, lr, rsqrt_bias2, weight, scale = tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3), tl.load(c + 4)
    offset = tl.arange(0, PIECE)
    mask = None if WIDE else offset < left
    p_at = at(tl.load(row + 1), tl.float32, start, WIDE) + offset
    g_at = at(tl.load(row + 2), GRAD, start, WIDE) + offset
    m_at = at(tl.load(row + 3), tl.float32, start, WIDE) + offset
    v_at = at(tl.load(row + 4), tl.float32, start, WIDE) + offset
    e_at = at(tl.load(row + 5), tl.float32, start, WIDE) + offset
    g = tl.load(g_at, mask=mask).to(tl.float32) * scale
    m = tl.load(m_at, mask=mask)
    v = tl.load(v_at, mask=mask)
    p = tl.load(p_at, mask=mask)
    if EMA:
        e = tl.load(e_at, mask=mask)
    m = lerp(m, g, beta1_c)
    v = lerp(v, g * g, beta2_c)
    p -= decay * p + lr * m / (tl.sqrt(v) * rsqrt_bias2 + eps)
    tl.store(m_at, m, mask=mask)
    tl.store(v_at, v, mask=mask)
    tl.store(p_at, p, mask=mask)
    if WEIGHT_COPY is not None:
        copy_at = at(tl.load(row + 6), WEIGHT_COPY, start, WIDE) + offset
        tl.store(copy_at, p.to(WEIGHT_COPY), mask=mask)
    if EMA:
        e = lerp(e, p, weight)
        tl.store(e_at, e, mask=mask)
        if EMA_COPY is not None:
            copy_at = at(tl.load(row + 7), EMA_COPY, start, WIDE) + offset
            tl.store(copy_at, e.to(EMA_COPY), mask=mask)


def adamw_ema_triton(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    weight_copies: list[Tensor],
    ema_copies: list[Tensor],
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Each list in one dtype; `emas` and the copies as many as parameters, or none."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, emas, weight_copies, ema_copies)
    columns = [[t.data_ptr() for t in tensors] or [0] * len(params) for tensors in lists]
    blocks, rows = tables(list(zip((p.numel() for p in params), *columns, strict=True)), params[0].device)
    if coefficients.device.type == "cpu":
        coefficients = upload(coefficients, params[0].device)
    if len(blocks):
        with torch.cuda.device_of(params[0]):
            _adamw_ema_kernel[(len(blocks),)](
                blocks,
                rows,
                coefficients,
                1 - beta1,
                1 - beta2,
                eps,
                GRAD=_TRITON[grads[0].dtype],
                EMA=bool(emas),
                WEIGHT_COPY=_TRITON[weight_copies[0].dtype] if weight_copies else None,
                EMA_COPY=_TRITON[ema_copies[0].dtype] if ema_copies else None,
                BLOCK=BLOCK,
            )


# --- registration; csrc adds the CPU

torch.library.define(
    "jepa_kernels::adamw_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas, "
    "Tensor(e!)[] weight_copies, Tensor(f!)[] ema_copies, Tensor coefficients, float beta1, float beta2, "
    "float eps) -> ()",
)
torch.library.impl("jepa_kernels::adamw_ema_", "default", adamw_ema_ref)
torch.library.impl("jepa_kernels::adamw_ema_", "cuda", adamw_ema_triton)
torch.library.register_fake("jepa_kernels::adamw_ema_", lambda *args: None)
