"""DeepSpeed: its config, how a run starts it, and how a step ends."""

import contextlib
import importlib
import logging
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jepa.config.schema import Config
from jepa.methods.base import Method

from .optimizer import make_optimizer
from .zero_step import join_passes, require, send_nothing

BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 makes a single buffer larger than most of these models
LIVE = 100_000_000  # elements ZeRO-3 keeps gathered; its default of 1e9 would hold all of a ViT-H until the backward


def deepspeed_config(config: Config, world_size: int, parameters: int) -> dict[str, Any]:
    """The DeepSpeed (0.19) config of this run for a model of `parameters` elements on `world_size` ranks. Raises
    ConfigError like `Config.batch`.

    It has no optimizer and no schedules: the engine has its own (jepa.train.optimizer, schedules), as it does for the
    gradient norm, overflow check and clipping if `Config.gated`. Gradients are reduced in the training precision.
    DeepSpeed's throughput timer is off because it synchronizes with the GPU twice per step.
    """
    batch, stage, bf16 = config.batch(world_size), config.engine.zero_stage, config.precision == "bf16"
    zero: dict[str, Any] = {"stage": stage}
    half: dict[str, Any] = {"enabled": bf16}
    if stage:  # buckets take memory: the gradients' is no larger than the model
        zero |= {"reduce_bucket_size": min(BUCKET, parameters), "allgather_bucket_size": BUCKET}
    if stage in (1, 2):  # buckets and their stream serve communication, and one rank has none
        zero |= {"overlap_comm": config.engine.overlap_comm and world_size > 1, "contiguous_gradients": world_size > 1}
    if stage == 3:
        zero |= {"stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": LIVE}
    if stage and config.gated:
        zero["compute_grad_norm"] = half["check_grad_overflow"] = False
    return {
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "train_batch_size": batch.global_batch,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": half,
        "communication_data_type": config.precision,
        "timers": {"throughput": {"enabled": False}},
        "gradient_clipping": 0.0 if config.gated else config.optimization.clip_grad or 0.0,
        "wall_clock_breakdown": False,
    }


def param_groups(model: Method, lr: float) -> list[dict[str, Any]]:
    """Separate groups for the submodules that have an EMA, those whose learning rate is always `lr`, and the rest; each
    split into parameters with and without weight decay (biases and one-dimensional weights). The mask token, [1, 1, D],
    decays as in the published code."""
    groups: dict[tuple[bool, bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        key = part in model.averaged, parameter.ndim > 1, part not in model.constant_lr
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "ema": ema, "decays": decays, "rate": None if scheduled else lr}
        for (ema, decays, scheduled), params in groups.items()
    ]


def start(model: Method, config: Config) -> Any:
    """Wraps the model in a DeepSpeed engine with the optimizer named by `engine.optimizer`. Raises ConfigError."""
    groups, device = param_groups(model, config.optimization.lr), next(model.parameters()).device
    optimizer: Any = make_optimizer(config, groups, device)
    settings = deepspeed_config(config, dist.get_world_size(), sum(p.numel() for p in model.parameters()))
    model_engine = wrap(model, optimizer, settings)
    if config.engine.zero_stage in (1, 2):
        if dist.get_world_size() == 1:
            send_nothing(model_engine.optimizer)
        if optimizer.reads_tensors:
            join_passes(model_engine)
    return model_engine


def wrap(model: torch.nn.Module, optimizer: Any, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine of any model, its own optimizer and a DeepSpeed config. Raises ConfigError.

    All learning rates of the optimizer must be 0: DeepSpeed may take a step with zero gradients to allocate memory.
    """
    import deepspeed

    require(deepspeed.__version__)
    # Skips compiling an op that only CPU inference uses: a killed process leaves the build lock behind, and every later
    # process waits for it. (Accessed as an attribute, `deepspeed.comm.torch` is PyTorch.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.utils.logger.setLevel(logging.ERROR)  # hides warnings about the custom optimizer and skipped steps
    with contextlib.redirect_stdout(sys.stderr):
        model_engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)
    return model_engine


class Update(NamedTuple):
    """The outcome of a step. If the device decides it, both tensors are on the device and reading them synchronizes."""

    applied: Tensor
    """Whether the weights were updated, bool, 0-d."""
    grad_norm: Tensor | None
    """The gradient norm before clipping, 0-d; None if DeepSpeed does not report it."""


def schedule_device(model_engine: Any) -> torch.device:
    """Where to look up the schedules: on the model's device if the optimizer gates steps and reads its hyperparameters
    there, else on the CPU."""
    optimizer = model_engine.basic_optimizer
    on_device = optimizer.gated and optimizer.reads_tensors
    return next(model_engine.module.parameters()).device if on_device else torch.device("cpu")


def schedule(model_engine: Any, numbers: Tensor) -> None:
    """Sets learning rate, weight decay and momentum (`numbers`, float64 [3]) for the next step."""
    optimizer = model_engine.basic_optimizer
    lr, weight_decay, momentum = numbers.unbind() if optimizer.reads_tensors else numbers.tolist()
    for group in optimizer.param_groups:
        rate = lr if group["rate"] is None else group["rate"]
        group |= {"lr": rate, "momentum": momentum, "weight_decay": weight_decay if group["decays"] else 0.0}


def step(model_engine: Any, clip_grad: float | None = None) -> Update | None:
    """Ends a micro-batch. After the last one of an accumulation, clips the gradient to the norm `clip_grad`, updates
    the weights unless the gradient is non-finite, and returns the outcome; before that, returns None."""
    if not model_engine.is_gradient_accumulation_boundary():
        model_engine.step()
        return None
    if not model_engine.basic_optimizer.gated:
        model_engine.step()
        norm = model_engine.get_global_grad_norm()
        norm = None if norm is None else torch.as_tensor(float(norm))
        return Update(
            torch.as_tensor(model_engine.was_step_applied() and (norm is None or bool(norm.isfinite()))), norm
        )
    norm = _gradient_norm(model_engine)
    scale = (clip_grad / (norm + 1e-6)).clamp(max=1.0) if clip_grad else None
    model_engine.basic_optimizer.gate(scale, (~norm.isfinite()).float())
    model_engine.step()
    return Update(norm.isfinite(), norm)


def gradient(parameter: torch.nn.Parameter) -> Tensor | None:
    """The whole gradient of a parameter, averaged over the ranks, from the last backward of a step to the step's end;
    None if it has none. Every rank calls it."""
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def weight(parameter: torch.nn.Parameter) -> Tensor:
    """The whole weight of a parameter, fp32. Every rank calls it."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def _gradient_norm(model_engine: Any) -> Tensor:
    """The 2-norm of the whole gradient, fp32 on the device, equal on all ranks; non-finite if any element is."""
    if model_engine.zero_optimization_stage() == 0:
        return torch.nn.utils.get_total_norm(
            [p.grad for p in model_engine.module.parameters() if p.grad is not None]
        ).float()
    mine = [grad.flatten() for group in model_engine.optimizer.averaged_gradients.values() for grad in group]
    squares = torch.stack(torch._foreach_norm(mine, dtype=torch.float32)).square().sum()
    dist.all_reduce(squares)
    return squares.sqrt()
