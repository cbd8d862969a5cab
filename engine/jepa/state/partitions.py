"""Where DeepSpeed keeps each parameter's fp32 weights, at any ZeRO stage.

Under ZeRO the optimizer sees flat fp32 tensors, not the model's parameters. `flats` maps between the two: it lists each
rank's fp32 tensors and which slice of which named parameter is stored where in them. The optimizer state (moments, EMA)
has the same layout, because AdamWEMA keeps it per tensor. The teacher and the checkpoints rely on this map and on
nothing else in DeepSpeed's optimizers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """`length` elements of the parameter `name`, beginning at its element `start`, at `offset` in a flat tensor."""

    name: str
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Flat:
    """One fp32 tensor that the optimizer updates on this rank, and the fragments of parameters it holds.

    `group` is the optimizer's param group. `training_weight`: the same elements of the model's training weights, if the
    optimizer writes them too (jepa.train.zero_step).
    """

    weight: Tensor
    fragments: list[Fragment]
    group: dict[str, Any]
    training_weight: Tensor | None = None


def names_of(model_engine: Any) -> dict[int, str]:
    return {id(p): name for name, p in model_engine.module.named_parameters()}


def flats(model_engine: Any) -> list[Flat]:
    """This rank's fp32 tensors in a DeepSpeed engine, in the optimizer's order."""
    stage, wrapper, names = model_engine.zero_optimization_stage(), model_engine.optimizer, names_of(model_engine)
    if stage == 0:
        return _replicated(wrapper, names)
    return _flat_partitions(wrapper, names) if stage < 3 else _parameter_partitions(wrapper, names)


def _replicated(wrapper: Any, names: dict[int, str]) -> list[Flat]:
    """Stage 0: every rank has every parameter; in bf16 DeepSpeed keeps fp32 copies of the weights in the same order."""
    optimizer = getattr(wrapper, "optimizer", wrapper)
    trained = [group["params"] for group in optimizer.param_groups]  # in fp32
    params, fp32s = getattr(wrapper, "fp16_groups", trained), getattr(wrapper, "fp32_groups", trained)
    return [
        Flat(fp32, [Fragment(names[id(param)], 0, 0, param.numel())], group)
        for i, group in enumerate(optimizer.param_groups)
        for param, fp32 in zip(params[i], fp32s[i], strict=True)
    ]


def _flat_partitions(wrapper: Any, names: dict[int, str]) -> list[Flat]:
    """Stages 1 and 2: a group's parameters are contiguous in one buffer, which is split into one partition per rank.

    A parameter's position is derived from its address in the buffer, because DeepSpeed may have reordered them.
    """
    result = []
    for i, group in enumerate(wrapper.optimizer.param_groups):
        weight, buffer = wrapper.single_partition_of_fp32_groups[i], wrapper.bit16_groups_flat[i]
        low = dist.get_rank(group=wrapper.real_dp_process_group[i]) * weight.numel()
        fragments = []
        for param in wrapper.bit16_groups[i]:
            place = (param.data_ptr() - buffer.data_ptr()) // buffer.element_size()
            begin, end = max(place, low), min(place + param.numel(), low + weight.numel())
            if begin < end:
                fragments.append(Fragment(names[id(param)], begin - place, begin - low, end - begin))
        written = getattr(wrapper, "passes_joined", False)
        result.append(Flat(weight, fragments, group, buffer[low : low + weight.numel()] if written else None))
    return result


def _parameter_partitions(wrapper: Any, names: dict[int, str]) -> list[Flat]:
    """Stage 3: each parameter is split into one equal, padded partition per rank; a flat has a partition of each."""
    rank = dist.get_rank(group=wrapper.dp_process_group)
    result = []
    for i, (params, weight) in enumerate(zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True)):
        fragments, offset = [], 0
        for param in params:
            part = param.ds_tensor.numel()
            length = min(part, param.ds_numel - rank * part)
            if length > 0:
                fragments.append(Fragment(names[id(param)], rank * part, offset, length))
            offset += part
        group = wrapper.optimizer.param_groups[wrapper.sub_group_to_group_id[i]]
        result.append(Flat(weight, fragments, group))
    return result


@torch.no_grad()
def refresh_training_weights(model_engine: Any) -> None:
    """Rounds the fp32 weights into the model's training weights, after the fp32 weights were written from outside."""
    stage, wrapper = model_engine.zero_optimization_stage(), model_engine.optimizer
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
