"""AdamW and the exponential moving average of the weights, in one pass over memory.

g <- grad_scale * g;  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
p <- (1 - lr wd) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)          (arXiv 1711.05101)
e <- e + (1 - momentum) (p - e)

The last line is momentum * e + (1 - momentum) * p with one rounding left, that of the result. Bytes per parameter:
28 for AdamW (p, m, v read and written, g read) and 8 for e; 2 less for a bfloat16 gradient, 2 more for each bfloat16
copy. A `foreach` AdamW and lerp move three times as much. The CPU kernel is in csrc/adamw_ema.cpp.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_STATE = ("exp_avg", "exp_avg_sq", "ema")


class AdamWEMA(torch.optim.Optimizer):
    """`torch.optim.AdamW` that also keeps the exponential moving average of the weights.

    params: float32 parameters, or groups of them; each group may set any of the options below for itself. Gradients
        in float32, bfloat16 or float16 (`p.grad_dtype`).
    lr, weight_decay, momentum: numbers or 0-d tensors. Change them in `param_groups`, or the tensors in place, before
        every step: nothing is compiled again. A tensor on the device is read there.
    momentum: of the average, which starts as a copy of the weights before their first update. `ema=False` for none.
    capturable: the step counters lie on the device, so a CUDA graph can hold the step and `found_inf` can undo it.

    `state[p]` holds `step` (float32, 0-d) and, float32 in the layout of p, `exp_avg`, `exp_avg_sq` and `ema`. A
    parameter without a gradient is left out of the step, its average too. Weights in 16 bits are refused: AdamW's
    updates vanish in them. Keep float32 weights here and let `set_copies` write the 16-bit ones.
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
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum)
        super().__init__(params, {**defaults, "ema": ema, "capturable": capturable})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_copies", {})
        for group in self.param_groups:  # a torch.optim.AdamW's state has neither
            for name in ("momentum", "ema", "capturable"):
                group.setdefault(name, self.defaults[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def set_copies(self, param: Tensor, *, weight: Tensor | None = None, ema: Tensor | None = None) -> None:
        """Has every step write the new weight and its average into these tensors as well, in the same pass.

        weight, ema: float32, bfloat16 or float16, of the shape, strides and device of `param`; None for no copy.
        Written from the next step on: initialise them. They belong to the caller, and no state_dict holds them.
        """
        group = next((g for g in self.param_groups if any(param is p for p in g["params"])), None)
        if group is None:
            raise ValueError("AdamWEMA.set_copies: param is not a parameter of this optimizer")
        if ema is not None and not group["ema"]:
            raise ValueError("AdamWEMA.set_copies: ema given, but the parameter's group has ema=False")
        for name, copy in (("weight", weight), ("ema", ema)):
            if copy is None:
                continue
            same = (copy.shape, copy.stride(), copy.device) == (param.shape, param.stride(), param.device)
            if not same or copy.dtype not in _FLOATS:
                raise ValueError(
                    f"AdamWEMA.set_copies: {name} must be float32, bfloat16 or float16, of shape {tuple(param.shape)} "
                    f"with strides {param.stride()} on {param.device} as param is, got {copy.dtype}, "
                    f"{tuple(copy.shape)}, {copy.stride()}, {copy.device}"
                )
        self._copies[param] = (weight, ema)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Number = 1.0,
        found_inf: Tensor | None = None,
    ) -> Any:
        """Updates every parameter that has a gradient, and its average.

        grad_scale: multiplies the gradients as they are read: 1 / loss scale, the clipping factor, or their product.
        found_inf: 0-d tensor; where it is not 0 the whole step does nothing, decided on the device. Needs the counters
            there: parameters on the CPU or `capturable=True`.
        """
        self._cuda_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in self._batches(group):
                self._update(group, params, grad_scale, found_inf)
        return loss

    def _batches(self, group: dict[str, Any]) -> Iterable[list[Tensor]]:
        """The parameters to update, those together whose tensors agree in device and dtypes."""
        batches: defaultdict[Any, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                _check(p)
                self._prepare(p, group)
                copies = self._copies.get(p, (None, None))
                batches[(p.device, p.grad.dtype, *(c if c is None else c.dtype for c in copies))].append(p)
        return batches.values()

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        if group["ema"] and "ema" not in state:  # apart: a torch.optim.AdamW's state may have been loaded
            state["ema"] = p.detach().clone()
        for name in _STATE:
            if name in state:
                state[name] = _in_layout_of(p, state[name])

    def _update(self, group: dict[str, Any], params: list[Tensor], grad_scale: Number, found_inf: Tensor | None) -> None:
        states = [self.state[p] for p in params]
        copies = [self._copies.get(p, (None, None)) for p in params]
        steps = [state["step"] for state in states]
        if found_inf is not None and steps[0].device != params[0].device:
            raise ValueError(
                f"AdamWEMA.step: found_inf undoes a step on {params[0].device}, but the step counters lie on "
                f"{steps[0].device}: create the optimizer with capturable=True"
            )
        torch._foreach_add_(steps, 1.0 if found_inf is None else (found_inf == 0).float().reshape(()))
        torch.ops.jepa_kernels.adamw_ema_(
            params,
            [_in_layout_of(p, p.grad) for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["ema"] for state in states] if group["ema"] else [],
            [weight for weight, _ in copies if weight is not None],
            [ema for _, ema in copies if ema is not None],
            _coefficients(steps, group, grad_scale, found_inf, params[0].device),
            *group["betas"],
            group["eps"],
        )


def _check_group(group: dict[str, Any]) -> None:
    for name, low, high in (("lr", 0, None), ("weight_decay", 0, None), ("momentum", 0, 1), ("eps", 0, None)):
        value = group[name]
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise ValueError(f"AdamWEMA: {name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        elif not low <= value or (high is not None and value > high):
            raise ValueError(f"AdamWEMA: {name} must be at least {low}{f' and at most {high}' * bool(high)}, got {value}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"AdamWEMA: betas must be two numbers in [0, 1), got {group['betas']}")


def _check(p: Tensor) -> None:
    grad = p.grad
    assert grad is not None
    if p.dtype != torch.float32:
        raise ValueError(
            f"AdamWEMA: parameters must be float32, got {p.dtype} of shape {tuple(p.shape)}: AdamW's updates vanish in "
            "16 bits. Keep float32 weights (autocast, or ZeRO's) and let set_copies write the 16-bit ones"
        )
    if grad.layout != torch.strided or grad.dtype not in _FLOATS:
        raise ValueError(
            f"AdamWEMA: gradients must be dense float32, bfloat16 or float16, got {grad.dtype}, {grad.layout}, for a "
            f"parameter of shape {tuple(p.shape)}"
        )
    if not p.is_contiguous() and torch.empty_like(p, device="meta").stride() != p.stride():
        raise ValueError(
            f"AdamWEMA: a parameter must fill its memory without gaps or overlaps, got shape {tuple(p.shape)} with "
            f"strides {p.stride()}: make it contiguous() before the optimizer is created"
        )


def _in_layout_of(p: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` as the kernel walks it: its memory in the order of p's."""
    if tensor.shape != p.shape or tensor.device != p.device:
        raise ValueError(
            f"AdamWEMA: gradients and state must have the shape and device of their parameter, {tuple(p.shape)} on "
            f"{p.device}, got {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor if tensor.stride() == p.stride() else torch.empty_like(p, dtype=tensor.dtype).copy_(tensor)


def _coefficients(
    steps: list[Tensor], group: dict[str, Any], grad_scale: Number, found_inf: Tensor | None, device: torch.device
) -> Tensor:
    """[R, 6] float32, one row per parameter: what a step multiplies by, worked out in float64.

    (1 - lr wd, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - momentum, grad_scale, 1 to apply the step or 0).
    On the CPU, unless one of the numbers lies on the device; then there, so that nothing waits for it.
    """
    given = (group["lr"], group["weight_decay"], group["momentum"], grad_scale, found_inf)
    there = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in (steps[0], *given))
    lr, wd, momentum, scale, inf = (
        x.item() if isinstance(x, Tensor) and x.device.type == "cpu" else x for x in given
    )
    t = torch.stack(steps).to(device if there else "cpu", torch.float64, non_blocking=True)
    beta1, beta2 = group["betas"]
    out = t.new_empty(len(steps), 6)
    out[:, 0] = 1 - lr * wd
    out[:, 1] = lr / (1 - beta1**t)
    out[:, 2] = (1 - beta2**t).rsqrt()
    out[:, 3] = 1 - momentum
    out[:, 4] = scale
    out[:, 5] = 1.0 if inf is None else inf == 0
    return out.float()


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
    for i, (p, m, v) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
        decay, lr, rsqrt_bias, step, scale, apply = coefficients[i].to(p.device)

        def keep(old: Tensor, new: Tensor, apply: Tensor = apply) -> None:
            old.copy_(torch.where(apply != 0, new, old))

        g = grads[i].float() * scale
        keep(m, m + (1 - beta1) * (g - m))
        keep(v, beta2 * v + (1 - beta2) * g * g)
        keep(p, decay * p - lr * m / (v.sqrt() * rsqrt_bias + eps))
        if emas:
            keep(emas[i], emas[i] + step * (p - emas[i]))
        if weight_copies:
            keep(weight_copies[i], p)
        if ema_copies:
            keep(ema_copies[i], emas[i])


# --- registration; csrc adds the CPU

torch.library.define(
    "jepa_kernels::adamw_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas, "
    "Tensor(e!)[] weight_copies, Tensor(f!)[] ema_copies, Tensor coefficients, float beta1, float beta2, float eps) "
    "-> ()",
)
torch.library.impl("jepa_kernels::adamw_ema_", "default", adamw_ema_ref)
torch.library.register_fake("jepa_kernels::adamw_ema_", lambda *args: None)
