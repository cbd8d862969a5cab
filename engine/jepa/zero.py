"""DeepSpeed: its config, how a run starts it, and where it keeps the fp32 weights of each parameter at any ZeRO stage.

An optimizer under ZeRO sees flat fp32 tensors, not the model's parameters. `flats` is the map between the two: each
rank's fp32 tensors, and which part of which named parameter lies where in them. The optimizer's state (moments, EMA)
has the same layout, because AdamWEMA keeps it by tensor. The teacher and the checkpoints are written on this map and
know nothing else of DeepSpeed's optimizers.
"""

import contextlib
import importlib
import logging
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .config import Config
from .objective import JepaModel
from .optimizer import make_optimizer

BUCKET = 50_000_000  # elements; DeepSpeed's default, 5e8, makes one buffer larger than most of these models
LIVE = 100_000_000  # elements that ZeRO-3 keeps gathered; by default, 1e9, it would keep a ViT-H until its backward


def deepspeed_config(config: Config, world_size: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's config (0.19) of this run of so many parameters on `world_size` ranks. Raises ConfigError as
    `Config.batch` does.

    Optimizer and schedules are not in it: both are the engine's own (jepa.optimizer, jepa.schedules), and so are norm,
    overflow check and clipping where `Config.gated`. Gradients are reduced in the training precision. DeepSpeed's
    throughput timer is off: it waits for the GPU twice a step.
    """
    batch, stage, bf16 = config.batch(world_size), config.engine.zero_stage, config.precision == "bf16"
    zero: dict[str, Any] = {"stage": stage}
    half: dict[str, Any] = {"enabled": bf16}
    if stage:  # buckets are memory: no more than the model needs
        zero |= {"reduce_bucket_size": min(BUCKET, parameters), "allgather_bucket_size": BUCKET}
    if stage in (1, 2):  # buckets and their stream are for sending: one rank sends nothing
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


def param_groups(model: JepaModel) -> list[dict[str, Any]]:
    """The encoder apart (it has an average) and the rest; of each, what weight decay touches and what it does not
    (biases and one-dimensional weights). The mask token, [1, 1, D], decays as in the published code."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((name.startswith("encoder."), parameter.ndim > 1), []).append(parameter)
    return [{"params": params, "ema": ema, "decays": decays} for (ema, decays), params in groups.items()]


def start(model: JepaModel, config: Config) -> Any:
    """The DeepSpeed engine around the model, with the optimizer of `engine.optimizer`. Raises ConfigError."""
    import deepspeed

    # It would compile what only inference on CPUs uses, under a lock that a killed process leaves behind and on which
    # every later one waits. (As an attribute, `deepspeed.comm.torch` is PyTorch.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.utils.logger.setLevel(logging.ERROR)  # what it warns of, a foreign optimizer and skipped steps, is meant
    # DeepSpeed may take a step with zero gradients to allocate memory: at lr 0 it moves nothing; it is forgotten here.
    optimizer: Any = make_optimizer(config, param_groups(model), next(model.parameters()).device)
    settings = deepspeed_config(config, dist.get_world_size(), sum(p.numel() for p in model.parameters()))
    with contextlib.redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)
    if config.engine.zero_stage in (1, 2):
        if dist.get_world_size() == 1:
            _send_nothing(engine.optimizer)
        if optimizer.reads_tensors:
            _join_passes(engine)
    return engine


def _send_nothing(wrapper: Any) -> None:
    """One rank, ZeRO 1 and 2: the mean of one gradient is itself. Until the step it stays where it was written."""
    assert not wrapper.contiguous_gradients and callable(wrapper.buffered_reduce_fallback)
    wrapper.buffered_reduce_fallback = lambda *args, **kwargs: None


def _join_passes(engine: Any) -> None:
    """ZeRO 1 and 2: AdamWEMA reads the gradient as it is, and writes the weights that the model computes with as well.

    DeepSpeed's own step writes a 16-bit gradient once more in fp32 before, and reads the fp32 weights once more behind:
    in bf16 12 bytes a parameter that this leaves out, and not a bit changes.
    """
    from deepspeed.runtime.utils import all_gather_dp_groups

    wrapper = engine.optimizer

    @torch.no_grad()
    def step(closure: None = None) -> None:
        """DeepSpeedZeroOptimizer.step of 0.19, without offload, loss scale, clipping and a check of its own."""
        wrapper.micro_step_id, wrapper.overflow, wrapper._global_grad_norm = -1, False, None
        for i, weight in enumerate(wrapper.single_partition_of_fp32_groups):
            wrapper.free_grad_in_param_list(wrapper.params_not_in_partition[i])
            weight.grad = wrapper.flatten_dense_tensors_aligned(wrapper.averaged_gradients[i], weight.numel())
            wrapper.free_grad_in_param_list(wrapper.params_in_partition[i])
            wrapper.averaged_gradients[i] = wrapper.all_grad_tensors[i] = None
            wrapper._optimizer_step(i)
            weight.grad = None
        all_gather_dp_groups(
            groups_flat=wrapper.bit16_groups_flat,
            partitioned_param_groups=wrapper.parallel_partitioned_bit16_groups,
            dp_process_group=wrapper.real_dp_process_group,
            start_alignment_factor=wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=wrapper.allgather_bucket_size,
        )

    assert not (wrapper.cpu_offload or wrapper.loss_scaler.dynamic or wrapper.clip_grad)
    wrapper.step, wrapper.passes_joined = step, True
    for flat in flats(engine):
        flat.weight.grad_dtype = wrapper.dtype
        engine.basic_optimizer.set_copies(flat.weight, weight=flat.training_weight)


class Outcome(NamedTuple):
    """What became of a step. Where the device decides, both lie there, and reading them waits for it."""

    applied: Tensor
    """Whether the weights moved, bool, 0-d."""
    grad_norm: Tensor | None
    """The gradient's norm before it was clipped, 0-d; None where DeepSpeed does not tell."""


def schedule_device(engine: Any) -> torch.device:
    """Where the schedules are looked up: on the model's device if the step is gated there and its optimizer reads them
    there, else on the CPU."""
    optimizer = engine.basic_optimizer
    on_device = optimizer.gated and optimizer.reads_tensors
    return next(engine.module.parameters()).device if on_device else torch.device("cpu")


def schedule(engine: Any, numbers: Tensor) -> None:
    """Sets the numbers of the next step: learning rate, weight decay and momentum, float64 [3]."""
    optimizer = engine.basic_optimizer
    lr, weight_decay, momentum = numbers.unbind() if optimizer.reads_tensors else numbers.tolist()
    for group in optimizer.param_groups:
        group |= {"lr": lr, "momentum": momentum, "weight_decay": weight_decay if group["decays"] else 0.0}


def step(engine: Any, clip_grad: float | None = None) -> Outcome | None:
    """Ends a micro-batch. At the end of an accumulation it updates the weights unless the gradient is not finite, after
    clipping it to the norm `clip_grad`, and returns what became of that; before, None."""
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    if not engine.basic_optimizer.gated:
        engine.step()
        norm = engine.get_global_grad_norm()
        norm = None if norm is None else torch.as_tensor(float(norm))
        return Outcome(torch.as_tensor(engine.was_step_applied() and (norm is None or bool(norm.isfinite()))), norm)
    norm = _gradient_norm(engine)
    scale = (clip_grad / (norm + 1e-6)).clamp(max=1.0) if clip_grad else None
    engine.basic_optimizer.gate(scale, (~norm.isfinite()).float())
    engine.step()
    return Outcome(norm.isfinite(), norm)


def _gradient_norm(engine: Any) -> Tensor:
    """The 2-norm of the whole gradient, fp32 on the device, the same on every rank; not finite where any element is."""
    if engine.zero_optimization_stage() == 0:
        return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).float()
    mine = [grad.flatten() for group in engine.optimizer.averaged_gradients.values() for grad in group]
    squares = torch.stack(torch._foreach_norm(mine, dtype=torch.float32)).square().sum()
    dist.all_reduce(squares)
    return squares.sqrt()


@dataclass(frozen=True)
class Piece:
    """`length` elements of the parameter `name` from its element `start` on, at `offset` in a flat tensor."""

    name: str
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Flat:
    """One fp32 tensor that the optimizer updates on this rank, and the pieces of parameters that it holds.

    `group` is the optimizer's param group. `training_weight`: the same elements of the weights that the model computes
    with, if the optimizer writes them too (`_join_passes`).
    """

    weight: Tensor
    pieces: list[Piece]
    group: dict[str, Any]
    training_weight: Tensor | None = None


def names_of(engine: Any) -> dict[int, str]:
    return {id(p): name for name, p in engine.module.named_parameters()}


def flats(engine: Any) -> list[Flat]:
    """This rank's fp32 tensors under a DeepSpeed engine, in the optimizer's order."""
    stage, wrapper, names = engine.zero_optimization_stage(), engine.optimizer, names_of(engine)
    if stage == 0:
        return _replicated(wrapper, names)
    return _flat_partitions(wrapper, names) if stage < 3 else _parameter_partitions(wrapper, names)


def _replicated(wrapper: Any, names: dict[int, str]) -> list[Flat]:
    """Stage 0: every rank has every parameter; in bf16 the fp32 weights are copies that DeepSpeed keeps in order."""
    optimizer = getattr(wrapper, "optimizer", wrapper)
    trained = [group["params"] for group in optimizer.param_groups]  # in fp32
    params, fp32s = getattr(wrapper, "fp16_groups", trained), getattr(wrapper, "fp32_groups", trained)
    return [
        Flat(fp32, [Piece(names[id(param)], 0, 0, param.numel())], group)
        for i, group in enumerate(optimizer.param_groups)
        for param, fp32 in zip(params[i], fp32s[i], strict=True)
    ]


def _flat_partitions(wrapper: Any, names: dict[int, str]) -> list[Flat]:
    """Stages 1 and 2: a group's parameters lie one after another in a buffer that is cut into one part a rank.

    The place of a parameter is read off its address in the buffer: DeepSpeed may have reordered them.
    """
    result = []
    for i, group in enumerate(wrapper.optimizer.param_groups):
        weight, buffer = wrapper.single_partition_of_fp32_groups[i], wrapper.bit16_groups_flat[i]
        low = dist.get_rank(group=wrapper.real_dp_process_group[i]) * weight.numel()
        pieces = []
        for param in wrapper.bit16_groups[i]:
            place = (param.data_ptr() - buffer.data_ptr()) // buffer.element_size()
            begin, end = max(place, low), min(place + param.numel(), low + weight.numel())
            if begin < end:
                pieces.append(Piece(names[id(param)], begin - place, begin - low, end - begin))
        written = getattr(wrapper, "passes_joined", False)
        result.append(Flat(weight, pieces, group, buffer[low : low + weight.numel()] if written else None))
    return result


def _parameter_partitions(wrapper: Any, names: dict[int, str]) -> list[Flat]:
    """Stage 3: each parameter is cut into one equal part a rank, the last ones padded; a flat holds a part of each."""
    rank = dist.get_rank(group=wrapper.dp_process_group)
    result = []
    for i, (params, weight) in enumerate(zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True)):
        pieces, offset = [], 0
        for param in params:
            part = param.ds_tensor.numel()
            length = min(part, param.ds_numel - rank * part)
            if length > 0:
                pieces.append(Piece(names[id(param)], rank * part, offset, length))
            offset += part
        group = wrapper.optimizer.param_groups[wrapper.sub_group_to_group_id[i]]
        result.append(Flat(weight, pieces, group))
    return result


@torch.no_grad()
def refresh_training_weights(engine: Any) -> None:
    """Rounds the fp32 weights into the weights that the model computes with, after they were written from outside."""
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for params, fp32s in zip(getattr(wrapper, "fp16_groups", ()), getattr(wrapper, "fp32_groups", ()), strict=True):
            torch._foreach_copy_(params, fp32s)
    elif stage < 3:
        for weight, buffer in zip(wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups_flat, strict=True):
            part = buffer.view(-1, weight.numel())[dist.get_rank()]
            part.copy_(weight)
            dist.all_gather_into_tensor(buffer, part)
    else:
        for params, weight in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for param in params:
                part = param.ds_tensor
                part.copy_(weight[offset : offset + part.numel()].view_as(part))
                offset += part.numel()
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
