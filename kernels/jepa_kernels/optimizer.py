"""AdamWEMA: AdamW that also maintains an average of the weights, both in one pass over memory (adamw_ema.py)."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .adamw_ema import DTYPES
from .tables import is_capturing

Number: TypeAlias = float | Tensor
Row: TypeAlias = tuple[Any, ...]  # p, gradient, step, exp_avg, exp_avg_sq, ema, copies of p and of ema; None: absent
Kind: TypeAlias = tuple[Any, ...]  # device, whether the step counters are on the CPU, dtypes of gradient and copies

TO_CAPTURE = "Create the optimizer with capturable=True and take one step before the capture"


class AdamWEMA(torch.optim.Optimizer):
    """`torch.optim.AdamW` that also maintains an exponential moving average of the weights.

    Args:
        params: float32 parameters or parameter groups; a group may override any option below. Gradients may be
            float32, bfloat16 or float16 (`p.grad_dtype`).
        lr, weight_decay, momentum: numbers or 0-d tensors, on the CPU or on the parameters' device. To change one, set
            it in `param_groups` or write to the tensor in place: no kernel is recompiled, and a tensor on the device is
            read there. torch.compile and CUDA graphs treat numbers as constants: use tensors for compiled or captured
            steps. `momentum` is that of the average, which starts as a copy of the weights before their first update.
        betas: decay rates of the running averages of the gradient and of its square, in [0, 1).
        eps: added to the square root of the latter after bias correction, as in torch.
        ema: whether to maintain the average.
        capturable: keeps the step counters on the device, so that a CUDA graph can contain a step and `found_inf` can
            cancel one. Take one step before the capture, to create the state.

    Raises:
        ValueError: an option out of range; here, in `add_param_group` and, before anything is written, in `step`.
            (Tensors on a GPU are not read back.)

    `state[p]` holds `step` (float32, 0-d) and, in float32 and p's layout, `exp_avg`, `exp_avg_sq` and `ema`. An `ema`
    placed there before the first step is kept, such as a teacher's weight: it then is the average, and load_state_dict
    writes into it. (Other loaded states take the layout of p.) A step skips parameters without a gradient, and their
    averages. 16-bit weights are refused: AdamW's updates vanish in them. Keep float32 weights here and let `set_copies`
    write the 16-bit ones. copy.deepcopy and pickle include the copies.
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
        self._checked: dict[Tensor, tuple[tuple[Any, ...], Kind]] = {}
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**options, "ema": ema, "capturable": capturable})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_copies": self._copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        linked = {p: of_p["ema"] for p, of_p in self.__dict__.get("state", {}).items() if "ema" in of_p}
        super().__setstate__(state)
        self.__dict__.setdefault("_copies", {})
        self._checked = {}
        for group in self.param_groups:  # torch.optim.AdamW's state lacks these
            for option in ("momentum", "ema", "capturable"):
                group.setdefault(option, self.defaults[option])
        for p, of_p in self.state.items():
            for name, value in of_p.items() if isinstance(p, Tensor) else ():
                if name == "step":
                    of_p[name] = torch.as_tensor(value, dtype=torch.float32)
                elif isinstance(value, Tensor) and (value.shape, value.device) == (p.shape, p.device):
                    of_p[name] = _in_layout_of(p, value)
            own = linked.get(p)
            if own is not None and isinstance(of_p.get("ema"), Tensor) and _is_like(own, of_p["ema"]):
                with torch.no_grad():
                    of_p["ema"] = own.copy_(of_p["ema"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def set_copies(self, param: Tensor, *, weight: Tensor | None = None, ema: Tensor | None = None) -> None:
        """From the next step on, also writes the new weight and its average to these tensors, in the same pass.

        Args:
            param: one of this optimizer's parameters.
            weight, ema: bfloat16, float16 or float32, with param's shape, strides and device; None: no copy. The caller
                owns and initialises them; state_dict does not include them.

        Raises:
            ValueError: a param of another optimizer; an `ema` for a group without an average; a copy that does not
                match the above, or shares memory with a parameter or another copy. If param changes later, `step`
                raises it.
        """
        group = next((g for g in self.param_groups if any(param is p for p in g["params"])), None)
        if group is None:
            raise ValueError("AdamWEMA.set_copies: param must be a parameter of this optimizer, and is not")
        if ema is not None and not group["ema"]:
            raise ValueError("AdamWEMA.set_copies: ema given, but param's group has ema=False")
        for name, copy in (("weight", weight), ("ema", ema)):
            _check_laid_out(f"the {name} of set_copies", copy, param, DTYPES)
        taken = [p for g in self.param_groups for p in g["params"]]
        taken += [t for p, both in self._copies.items() if p is not param for t in both if t is not None]
        for copy in (weight, ema):
            if copy is not None:
                start, end = copy.data_ptr(), copy.data_ptr() + copy.nbytes
                if any(start < t.data_ptr() + t.nbytes and t.data_ptr() < end for t in taken):
                    raise ValueError(
                        "AdamWEMA.set_copies: a copy must not share memory with a parameter or another copy, and one "
                        "does"
                    )
                taken.append(copy)
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

        Args:
            closure: recomputes the loss and the gradients.
            grad_scale: number or 0-d tensor that multiplies the gradients as they are read: 1 / loss scale, a
                clipping factor or their product. (torch's fused optimizers divide by theirs.)
            found_inf: 0-d tensor; if it is not 0, nothing changes. It is read on the device, without synchronisation.
                The step counters must be on the parameters' device: parameters on the CPU, or capturable=True.

        Returns:
            The closure's loss.

        Raises:
            ValueError: before anything is written, for an option, parameter, gradient, state or copy that does not meet
                the requirements of the class.
            RuntimeError: during the capture of a CUDA graph, without state or with step counters on the CPU.
        """
        for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if isinstance(value, Tensor) and value.dim() != 0:
                raise ValueError(f"AdamWEMA.step: {name} must be a 0-d tensor, got shape {tuple(value.shape)}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inf = 0.0 if found_inf is None else found_inf
        batches = []
        for group in self.param_groups:
            _check_options(group)
            numbers = [group["lr"], group["weight_decay"], group["momentum"], grad_scale, inf]
            for kind, batch in self._batches(group).items():
                _check_place(kind, numbers, found_inf is not None)
                batches.append((group, numbers, batch))
        for each in batches:  # everything is checked before anything is written
            self._update(*each)
        return loss

    def _batches(self, group: dict[str, Any]) -> dict[Kind, list[Row]]:
        """What to update, one row per parameter, grouped by what can share a launch."""
        batches: defaultdict[Kind, list[Row]] = defaultdict(list)
        for p in group["params"]:
            g = p.grad
            if g is None:
                continue
            if g.layout != torch.strided:
                _check_weight(p, g)
            state = self.state[p]
            if "step" not in state or (group["ema"] and "ema" not in state):
                _create(p, g, state, group)
            weight, average = self._copies.get(p, (None, None))
            e, average = (state["ema"], average) if group["ema"] else (None, None)
            step, m, v = state["step"], state["exp_avg"], state["exp_avg_sq"]
            row = (p, g, step, m, v, e, weight, average)
            layout, layout_of_g = p.stride(), g.stride()
            if torch.compiler.is_compiling():
                kind = _check(row)
            else:  # check again only after a change: with hundreds of parameters, checks would take half of a step
                marks = (
                    *(p.data_ptr(), p.dtype, p.shape, layout, g.dtype, g.shape, layout_of_g),
                    *(step.data_ptr(), step.dtype, step.shape),
                    *(m.data_ptr(), m.dtype, m.shape, m.stride()),
                    *(v.data_ptr(), v.dtype, v.shape, v.stride()),
                    e is not None and (e.data_ptr(), e.dtype, e.shape, e.stride()),
                    weight is not None and (weight.data_ptr(), weight.dtype, weight.shape, weight.stride()),
                    average is not None and (average.data_ptr(), average.dtype, average.shape, average.stride()),
                )
                found = self._checked.get(p)
                if found is None or found[0] != marks:
                    found = self._checked[p] = marks, _check(row)
                kind = found[1]
            batches[kind].append(row if layout == layout_of_g else (p, _in_layout_of(p, g), *row[2:]))
        return batches

    def _update(self, group: dict[str, Any], numbers: list[Number], batch: list[Row]) -> None:
        columns: list[Any] = [[] if column[0] is None else list(column) for column in zip(*batch, strict=True)]
        params, grads, steps, *others = columns
        ops = torch.ops.jepa_kernels
        home = steps[0].device if torch.compiler.is_compiling() else None  # compiled: create them where they are read
        ready = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device=home) for x in numbers]
        coefficients = ops.adamw_ema_coefficients_(steps, ready, *group["betas"])
        ops.adamw_ema_(params, grads, *others, coefficients, *group["betas"], group["eps"])
        if not torch.compiler.is_compiling():
            written = [t for tensors in (params, *others[2:]) for t in tensors]
            torch.autograd.graph.increment_version(written)


def _create(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    _check_weight(p, g)
    if is_capturing(p.device):
        raise RuntimeError(f"AdamWEMA.step: the state must exist before a CUDA graph is captured. {TO_CAPTURE}")
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")
        state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros_like(p)
    if group["ema"] and "ema" not in state:  # e.g. after loading torch.optim.AdamW's state
        state["ema"] = p.detach().clone()


def _check_options(options: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize", "differentiable"):  # from a loaded state of torch.optim.AdamW
        if options.get(name):
            raise ValueError(f"AdamWEMA: {name}=True is not supported; load a state, or pass a group, without it")
    for name in ("lr", "weight_decay", "momentum", "eps"):
        value = options[name]
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise ValueError(f"AdamWEMA: {name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
            if torch.compiler.is_compiling() or not value.is_cpu or type(value) is not Tensor:
                continue  # not read back; a subclass is a placeholder used in tracing
            value = value.item()
        if not 0 <= value <= (1 if name == "momentum" else float("inf")):
            raise ValueError(f"AdamWEMA: {name} must be >= 0 (momentum: also <= 1), got {value}")
    if len(options["betas"]) != 2 or not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"AdamWEMA: betas must be two numbers in [0, 1), got {options['betas']}")


def _check_place(kind: Kind, numbers: list[Number], may_skip: bool) -> None:
    device, steps_on_cpu, *_ = kind
    if steps_on_cpu and is_capturing(device):
        raise RuntimeError(f"AdamWEMA.step: a CUDA graph needs the step counters on the device. {TO_CAPTURE}")
    if steps_on_cpu and may_skip and device.type != "cpu":
        raise ValueError(
            f"AdamWEMA.step: found_inf needs the step counters on {device} like the parameters, got them on the "
            "CPU: create the optimizer with capturable=True"
        )
    for number in numbers:
        if isinstance(number, Tensor) and not number.is_cpu and number.device != device:
            raise ValueError(
                "AdamWEMA.step: lr, weight_decay, momentum, grad_scale and found_inf must be numbers, or tensors on "
                f"{device} or the CPU, got one on {number.device}"
            )


def _check(row: Row) -> Kind:
    """Checks a row and returns its kind; rows of different kinds cannot share a launch."""
    p, g, step, m, v, e, weight, average = row
    _check_weight(p, g)
    if step.dtype != torch.float32 or step.dim() or (step.device != p.device and not step.is_cpu):
        raise ValueError(
            f"AdamWEMA: state 'step' must be a 0-d float32 tensor on {p.device} or the CPU, "
            f"got {step.dtype}, shape {tuple(step.shape)}, on {step.device}"
        )
    for name, state in (("exp_avg", m), ("exp_avg_sq", v), ("ema", e)):
        _check_laid_out(f"state {name!r}", state, p, (torch.float32,))
    for name, copy in (("weight", weight), ("ema", average)):
        _check_laid_out(f"the {name} of set_copies", copy, p, DTYPES)
    return p.device, step.is_cpu, g.dtype, *(None if t is None else t.dtype for t in (weight, average))


def _check_weight(p: Tensor, grad: Tensor) -> None:
    if p.dtype != torch.float32:
        raise ValueError(
            f"AdamWEMA: parameters must be float32, got {p.dtype}, shape {tuple(p.shape)}: AdamW's updates vanish "
            "in 16 bits. Keep float32 weights (autocast, or ZeRO's partitions); set_copies writes the 16-bit ones"
        )
    if grad.layout != torch.strided or grad.dtype not in DTYPES or (grad.shape, grad.device) != (p.shape, p.device):
        raise ValueError(
            f"AdamWEMA: gradients must be dense float32, bfloat16 or float16 with their parameter's shape "
            f"{tuple(p.shape)} and device {p.device}, got {grad.dtype}, {grad.layout}, {tuple(grad.shape)}, "
            f"{grad.device}"
        )
    if not p.is_contiguous() and torch.empty_like(p, device="meta").stride() != p.stride():
        raise ValueError(
            f"AdamWEMA: a parameter must be non-overlapping and dense, got shape {tuple(p.shape)} "
            f"with strides {p.stride()}: make it contiguous() before passing it to the optimizer"
        )


def _check_laid_out(name: str, t: Tensor | None, p: Tensor, dtypes: Collection[torch.dtype]) -> None:
    """Kernels walk all of a parameter's tensors in memory order, so they must have the same shape and strides."""
    if t is not None and (t.dtype not in dtypes or (t.shape, t.stride(), t.device) != (p.shape, p.stride(), p.device)):
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"AdamWEMA: {name} must be {wanted} with its parameter's shape {tuple(p.shape)}, strides {p.stride()} "
            f"and device {p.device}, got {t.dtype}, {tuple(t.shape)}, {t.stride()}, {t.device}. "
            "torch.empty_like(p, dtype=...) makes such a tensor; load_state_dict(state_dict()) fixes all layouts"
        )


def _is_like(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)


def _in_layout_of(p: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` with the strides of p: kernels walk both in memory order."""
    return tensor if tensor.stride() == p.stride() else torch.empty_like(p, dtype=tensor.dtype).copy_(tensor)
