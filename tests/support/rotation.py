"""A method that only the tests know: which way up is an image (arXiv 1803.07728)? A copy of the engine gets this file.

Each image is turned by 0, 90, 180 or 270 degrees, and a linear head on the encoder's mean feature says by which:
    L = cross-entropy of the turn + confidence * entropy of what the head says
With an average of the encoder also the mean squared distance to its features of the image before the turn.

Legend: B images, D width.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.config.schema import Config, Loss, NonNegative
from jepa.methods.base import Method, Output
from jepa.model import cost
from jepa.model.cost import Held, Kept
from jepa.model.layout import Place
from jepa.model.vit import build_encoder


class Rotation(Method):
    class Settings(Loss):
        confidence: NonNegative = 0.1

    terms = ("turn", "entropy", "distance")
    averaged: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.confidence = config.loss.model_dump()["confidence"]
        self.encoder = build_encoder(config)
        self.head = nn.Linear(config.vit.embed_dim, 4)

    @classmethod
    def layout(cls, config: Config, place: Place, device: torch.device, whole: bool = False) -> Tensor:
        """The turns [B], which do not depend on the number of ranks."""
        micro_batch, _, total = config.batch(place.world_size)
        numbers = torch.Generator().manual_seed(config.engine.seed * 2**32 + place.step)
        turns = torch.randint(0, 4, (total,), generator=numbers)
        return turns.split(micro_batch)[place.micro * place.world_size + place.rank].to(device)

    @staticmethod
    def targets(teacher: Any, views: list[Tensor], layout: Tensor) -> Tensor | None:
        """[B, D]."""
        return None if teacher is None else teacher(views[0]).mean(1)

    def forward(self, views: list[Tensor], layout: Tensor, targets: Any | Callable[[], Any]) -> Output:
        every_turn = torch.stack([views[0].rot90(turn, (1, 2)) for turn in range(4)])
        y = self.encoder(every_turn[layout, torch.arange(len(layout))]).mean(1)
        said = self.head(y).float().log_softmax(1)
        turn, entropy = F.nll_loss(said, layout), -(said.exp() * said).sum(1).mean()
        wanted = targets() if callable(targets) else targets
        distance = turn.new_zeros(()) if wanted is None else F.mse_loss(y.float(), wanted.float())
        loss = turn + self.confidence * entropy + distance
        return Output(loss, (turn.detach(), entropy.detach(), distance.detach()), {"turned": y.detach()})

    @classmethod
    def flops(cls, config: Config, kept: Kept) -> dict[str, float]:
        return {"encoder": cost.encoder_flops(config, config.grid**2), "head": 3 * 2 * 4 * config.vit.embed_dim}

    @classmethod
    def activations(cls, config: Config, kept: Kept, size: int, ranks: int) -> Held:
        return cost.views_held(config, [config.data.crop_size], [(4,)], size)
