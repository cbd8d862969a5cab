"""The teacher: the rounded exponential moving averages of a method's submodules, the same on every rank.

The fp32 average is optimizer state, so under ZeRO each rank holds a part of it. The optimizer writes its part, rounded
to the training precision, in the same pass that updates it; one asynchronous all-gather for each of the two averaged
param groups (with and without weight decay) then assembles the parts before the teacher is next used. If a parameter's
parts are contiguous in the gathered buffer (stages 1 and 2, or one rank), the average's weight is a view of it and
nothing is copied. With `engine.target_precision: fp8` the targets are made with e4m3 copies of these weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa.model.fp8 import Encoder
from jepa.state.partitions import Flat, flats


class Teacher:
    """`copies`: of the averaged submodules, by name, made before DeepSpeed wrapped the model; they become the averages.
    `in_fp8`: the forward of the encoder's in fp8, if that is to make the targets."""

    def __init__(self, copies: dict[str, nn.Module], model_engine: Any, in_fp8: Encoder | None = None) -> None:
        self.in_fp8, self.written = in_fp8, True
        self._averages = nn.ModuleDict(copies).requires_grad_(False).eval()
        self.optimizer = model_engine.basic_optimizer
        self.averaged = [flat for flat in flats(model_engine) if flat.group["ema"] and flat.weight.numel()]
        self.weights = dict(self._averages.named_parameters())
        self.sharded = model_engine.zero_optimization_stage() > 0
        self.gathered = [self._adopt(flat) for flat in self.averaged] if self.sharded else []
        if self.sharded:
            self.parts = [buffer[dist.get_rank()] for buffer, _ in self.gathered]
        else:
            self.parts = [self.weights[flat.fragments[0].name].data for flat in self.averaged]
        self.unwritten = []  # stage 3 gives the optimizer its tensors only during the step
        for flat, part in zip(self.averaged, self.parts, strict=True):
            if any(flat.weight is p for p in flat.group["params"]):
                low = {} if flat.training_weight is None else {"weight": flat.training_weight}
                self.optimizer.set_copies(flat.weight, ema=part, **low)
            else:
                self.unwritten.append((flat, part))
        self.under_way: list[dist.Work] = []

    @property
    def averages(self) -> nn.ModuleDict:
        """The averaged submodules, once their all-gathers have completed."""
        if self.under_way:
            for work in self.under_way:
                work.wait()
            self.under_way = []
            for _, copies in self.gathered:
                for weight, source in copies:
                    weight.copy_(source)
        return self._averages

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Sequence[Tensor] = ()) -> Tensor:
        """By the average of `encoder`: uint8 images -> features [B, N, D], or those of the given rows, in the training
        precision."""
        averages = self.averages
        if self.in_fp8 is None:
            return averages["encoder"](images, rows=rows)
        if self.written:  # once per step, not in every micro-batch
            self.in_fp8.refresh()
            self.written = False
        return self.in_fp8(images, rows)

    @torch.no_grad()
    def follow(self) -> None:
        """Updates the teacher with what the optimizer has written. Every rank calls it after every step; a skipped step
        wrote nothing, so the weights stay the same. The next step begins with the teacher's features, so the
        all-gathers started here finish before the optimizer writes again."""
        self.written = True
        for flat, part in self.unwritten:
            if flat.weight in self.optimizer.state:  # it is not if the first step was skipped
                part.copy_(self.average(flat))
        if dist.get_world_size() == 1:
            return  # this rank's part is the whole
        for (buffer, _), part in zip(self.gathered, self.parts, strict=self.sharded):
            work = dist.all_gather_into_tensor(buffer.view(-1), part, async_op=True)
            assert work is not None
            self.under_way.append(work)

    @torch.no_grad()
    def refresh(self) -> None:
        """Updates the teacher from the optimizer's state. Every rank calls it after a resume."""
        for flat, part in zip(self.averaged, self.parts, strict=True):
            part.copy_(self.average(flat))
        self.follow()

    @torch.no_grad()
    def distance(self) -> float:
        """Distance between the average and the encoder's weights, relative to their norm. Every rank calls it."""
        sums = torch.zeros(2, device=self.averaged[0].weight.device)
        for flat in self.averaged:
            if flat.weight in self.optimizer.state:
                apart = self.average(flat) - flat.weight
                sums += torch.stack([apart.square().sum(), flat.weight.square().sum()])
        if self.sharded:
            dist.all_reduce(sums)
        return float((sums[0] / sums[1].clamp_min(1e-30)).sqrt())

    def average(self, flat: Flat) -> Tensor:
        return self.optimizer.state[flat.weight]["ema"]

    def _adopt(self, flat: Flat) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The buffer [ranks, elements] a flat is gathered into, and (weight, source) pairs to copy after a gather."""
        dtype, width = next(iter(self.weights.values())).dtype, flat.weight.numel()
        buffer = torch.zeros(dist.get_world_size(), width, dtype=dtype, device=flat.weight.device)
        tables: list[list] = [[] for _ in range(len(buffer))]
        dist.all_gather_object(tables, flat.fragments)
        places: dict[str, list[tuple[int, int, int]]] = {}
        for rank, fragments in enumerate(tables):
            for fragment in fragments:
                place = rank * width + fragment.offset
                places.setdefault(fragment.name, []).append((place, fragment.start, fragment.length))
        copies = []
        for name, parts in places.items():
            weight, line = self.weights[name], buffer.view(-1)
            origin = parts[0][0] - parts[0][1]
            if all(place - start == origin for place, start, _ in parts):
                view = line[origin : origin + weight.numel()].view_as(weight)
                view.copy_(weight)
                weight.data = view
            else:
                flat_weight = weight.view(-1)
                copies += [(flat_weight[s : s + n], line[place : place + n]) for place, s, n in parts]
        return buffer, copies
