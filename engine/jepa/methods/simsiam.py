"""SimSiam (arXiv 2011.10566): each of two views predicts the other's projection, which gets no gradient.

    z = projector(mean(encoder(x))),    p = predictor(z),    z' and p' the same of the other view
    L = -cos(p, stop(z')) / 2 - cos(p', stop(z)) / 2
No teacher and no negative pairs: it is the stop-gradient and the predictor that keep features from collapsing. The
predictor's learning rate is not decayed. Each view has a batch norm of its own.

Legend: B images, D width of the projections.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.config.schema import Config, Loss, Share, Width
from jepa.data.augment import View
from jepa.model import cost
from jepa.model.cost import Held, Kept
from jepa.model.projector import GlobalBatchNorm, projector
from jepa.model.vit import build_encoder

from .base import Method, Output, augmented


class SimSiam(Method):
    class Settings(Loss):
        projector: Width = 2048  # width of its three layers
        bottleneck: Width = 512  # of the predictor
        blur: Share = 0.5  # probability

    terms = ("cosine",)
    constant_lr = ("prediction",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, dim = self.settings(config).projector, config.vit.embed_dim
        self.encoder = build_encoder(config)
        self.projector = nn.Sequential(*projector((width, width, width), dim), GlobalBatchNorm(width, affine=False))
        self.prediction = projector((self.settings(config).bottleneck, width), width)

    @classmethod
    def views(cls, config: Config) -> list[View]:
        return [augmented(config, blur=cls.settings(config).blur, jitter=(0.4, 0.4, 0.4, 0.1))] * 2

    @classmethod
    def couples_images(cls, config: Config) -> bool:
        return True

    def forward(self, views: list[Tensor], layout: Any, targets: Any) -> Output:
        y = self.encoder(torch.cat(views)).mean(1)
        z1, z2 = (self.projector(y_BD) for y_BD in y.chunk(2))
        p1, p2 = self.prediction(z1), self.prediction(z2)
        cosine = (mean_cosine(p1, z2.detach()) + mean_cosine(p2, z1.detach())) / 2
        features = {"feature": y.detach(), "projection": torch.cat([z1, z2]).detach()}
        return Output(-cosine, (cosine.detach(),), features)

    @classmethod
    def flops(cls, config: Config, kept: Kept) -> dict[str, float]:
        width, bottleneck = cls.settings(config).projector, cls.settings(config).bottleneck
        return {
            "encoder": 2 * cost.encoder_flops(config, config.grid**2),
            "projector": 2 * 3 * cost.mlp_flops((config.vit.embed_dim, width, width, width)),
            "prediction": 2 * 3 * cost.mlp_flops((width, bottleneck, width)),
        }

    @classmethod
    def activations(cls, config: Config, kept: Kept, size: int, ranks: int) -> Held:
        width, bottleneck = cls.settings(config).projector, cls.settings(config).bottleneck
        sizes = [view.size for view in cls.views(config)]
        return cost.views_held(config, sizes, [(width, width, width), (bottleneck, width)], size)


def mean_cosine(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Mean cosine similarity of the rows, fp32."""
    return F.cosine_similarity(a_BD.float(), b_BD.float(), dim=-1).mean()
