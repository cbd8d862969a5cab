"""The target encoder: the rounded exponential moving average of the encoder, the same on every rank.

The fp32 average is optimizer state (`AdamWEMA` keeps it), so under ZeRO each rank holds a part of it. After a step the
parts, rounded to the training precision, are gathered by one all-gather for each of the encoder's two param groups
(with and without weight decay). Where a parameter's parts come to lie one after another in the gathered buffer (stages
1 and 2, or one rank) the target encoder's weight is a view of it and nothing is copied.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .vit import VisionTransformer
from .zero import Flat, flats

PREFIX = "encoder."


class Teacher:
    """`encoder`: a copy of the encoder made before DeepSpeed took the model; it becomes the target encoder."""

    def __init__(self, encoder: VisionTransformer, engine: Any) -> None:
        self.encoder = encoder.requires_grad_(False).eval()
        self.optimizer = engine.basic_optimizer
        self.averaged = [flat for flat in flats(engine) if flat.group["ema"] and flat.weight.numel()]
        self.weights = {PREFIX + name: p for name, p in encoder.named_parameters()}
        self.sharded = engine.zero_optimization_stage() > 0
        self.gathered = [self._adopt(flat) for flat in self.averaged] if self.sharded else []

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Sequence[Tensor] = ()) -> Tensor:
        """uint8 images -> target features [B, N, D], or of the given rows, in the training precision, not yet
        layer-normed."""
        return self.encoder(images, rows=rows)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the average. Every rank calls it, after a step that was applied."""
        if not self.sharded:
            for flat in self.averaged:
                self.weights[flat.pieces[0].name].copy_(self.average(flat))
        for flat, (buffer, copies) in zip(self.averaged, self.gathered, strict=bool(self.gathered)):
            part = buffer[dist.get_rank()]
            part.copy_(self.average(flat))
            dist.all_gather_into_tensor(buffer.view(-1), part)
            for weight, source in copies:
                weight.copy_(source)

    @torch.no_grad()
    def distance(self) -> float:
        """How far the average lies from the encoder's weights, relative to their norm. Every rank calls it."""
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
        """The buffer [ranks, elements] that a flat is gathered into, and the (weight, source) pairs still to copy."""
        dtype, width = next(iter(self.weights.values())).dtype, flat.weight.numel()
        buffer = torch.zeros(dist.get_world_size(), width, dtype=dtype, device=flat.weight.device)
        tables: list[list] = [[] for _ in range(len(buffer))]
        dist.all_gather_object(tables, flat.pieces)
        places: dict[str, list[tuple[int, int, int]]] = {}
        for rank, pieces in enumerate(tables):
            for piece in pieces:
                place = rank * width + piece.offset
                places.setdefault(piece.name, []).append((place, piece.start, piece.length))
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
