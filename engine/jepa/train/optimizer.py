"""The AdamW a run uses (`engine.optimizer`): our one-pass AdamWEMA, or a stock AdamW plus a separate EMA pass.

They look the same to the rest of the engine: `state[p]` holds `exp_avg`, `exp_avg_sq` and `ema` in fp32; `set_copies`
sets where the rounded average is also written; and `gate`, if used (`gated`, `Config.gated`), sets the factor by which
the next step multiplies the gradient and whether the step is applied at all. Both are read on the device, without a
host sync. `reads_tensors`: learning rate, weight decay and momentum may be tensors, which are read on the device too.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from jepa.config.schema import Config, ConfigError
from jepa_kernels import AdamWEMA

HOW_TO_GET = {
    "deepspeed": "it compiles a CUDA extension, which needs a GPU, the CUDA toolkit (CUDA_HOME) and ninja",
    "apex": "NVIDIA apex is not on PyPI (the package of that name is a different one): "
    "build github.com/NVIDIA/apex with its CUDA extensions",
}


class Gated(AdamWEMA):
    """AdamWEMA that takes the arguments of `step` from `gate`, because DeepSpeed calls `step()` without any."""

    gated: bool
    reads_tensors = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate(None, None)

    def gate(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """0-d fp32 tensors on the parameters' device: the factor on the gradients; nonzero if the step is skipped."""
        self._scale, self._found_inf = 1.0 if grad_scale is None else grad_scale, found_inf

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return super().step(closure, grad_scale=self._scale, found_inf=self._found_inf)


class Averaged:
    """Mixin for a stock AdamW: also keeps `state[p]["ema"]` for groups with `ema` set, in a second pass."""

    gated: bool
    reads_tensors = False
    param_groups: list[dict[str, Any]]
    state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._copies: dict[Tensor, Tensor] = {}

    def set_copies(self, param: Tensor, *, ema: Tensor) -> None:
        """From the next step on, the rounded average is also written to `ema`."""
        self._copies[param] = ema

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        first = {p: p.detach().clone() for p, group in moved if group["ema"] and "ema" not in self.state.get(p, {})}
        loss = super().step(closure)  # type: ignore[misc]
        for p, group in moved:
            if group["ema"]:
                average: Tensor = self.state[p].setdefault("ema", first.get(p))
                average.lerp_(p, (1 - group["momentum"]) * self.applied())
                if p in self._copies:
                    self._copies[p].copy_(average)
        return loss

    def applied(self) -> Tensor | float:
        """1 if the last step updated the weights, else 0."""
        return 1.0


class FusedAdamW(Averaged, torch.optim.AdamW):
    """torch's fused AdamW, which reads `grad_scale` and `found_inf` from its own attributes."""

    def gate(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Like `Gated.gate`. (torch divides by its scale.)"""
        self.grad_scale = None if grad_scale is None else 1 / grad_scale
        self.found_inf = found_inf

    def applied(self) -> Tensor | float:
        found_inf = getattr(self, "found_inf", None)
        return 1.0 if found_inf is None else (found_inf == 0).float()


def make_optimizer(config: Config, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer named by `engine.optimizer`, on param groups with an `ema` key; lr and decay are set per step.

    Raises ConfigError, which says how to get it, if it is not installed.
    """
    name, settings = config.engine.optimizer, config.optimization
    options: dict[str, Any] = {"lr": 0.0, "betas": settings.betas, "eps": settings.eps, "weight_decay": 0.0}
    stock = [group | {"momentum": 0.0} for group in groups]
    optimizer: Any
    if name == "adamw_ema":
        optimizer = Gated(groups, **options, capturable=True)
    elif name == "torch":
        optimizer = FusedAdamW(stock, **options, fused=True)
    else:
        optimizer = foreign(name, device)(stock, **options)
    optimizer.gated = config.gated
    return optimizer


def foreign(name: str, device: torch.device) -> type:
    """DeepSpeed's or apex's FusedAdam, with the average. Raises ConfigError if it is not available."""
    module = {"deepspeed": "deepspeed.ops.adam", "apex": "apex.optimizers"}[name]
    here = device.type == "cuda" and find_spec(name) and find_spec(module)
    if not here or (name == "deepspeed" and cpp_extension.CUDA_HOME is None):
        problem = f"engine.optimizer = {name!r}: not available here, on {device.type}; {HOW_TO_GET[name]}"
        raise ConfigError([f"{problem}. adamw_ema and torch need none of this"])
    stock = import_module(module).FusedAdam

    class FusedAdam(Averaged, stock):  # type: ignore[misc, valid-type]
        def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
            for group in self.param_groups:
                for p in group["params"]:  # these count steps with an int, a checkpoint with a tensor
                    if "step" in self.state.get(p, {}):
                        self.state[p]["step"] = group["step"] = int(self.state[p]["step"])
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    if p in self.state:
                        self.state[p].setdefault("step", group.get("step", 0))
            return loss

    return FusedAdam
