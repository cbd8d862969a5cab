"""VICReg (arXiv 2105.04906): two views of an image get the same embedding, and embeddings do not collapse.

Each image gives two augmented views; the encoder's features, averaged over patches, go through an expander:
    z = expander(mean(encoder(x))),    z' the same of the other view
    L = beta_sim * |z - z'|^2 / D + beta_std * (v(z) + v(z')) / 2 + beta_cov * (c(z) + c(z'))
with the hinge v = mean max(0, 1 - std) and c = off-diagonal covariances^2 / D over the images of all ranks. The means
are the authors' code's; equation 6 has v(z) + v(z'). Each view has a batch norm of its own. No teacher, no
stop-gradient, no predictor.

Legend: B images, V = 2 views, D width of the embedding.
"""

from typing import Any

import torch
from torch import Tensor

from jepa.config.schema import Config, Loss, NonNegative, SharePair, Widths
from jepa.data.augment import View
from jepa.model import cost
from jepa.model.cost import Held, Kept
from jepa.model.projector import projector
from jepa.model.vit import build_encoder
from jepa.ranks.distributed import world_group
from jepa_kernels import vicreg

from .base import Method, Output, augmented


class VICReg(Method):
    class Settings(Loss):
        beta_sim: NonNegative = 25.0
        beta_std: NonNegative = 25.0
        beta_cov: NonNegative = 1.0
        expander: Widths = (8192, 8192, 8192)  # output widths of its layers
        blur: SharePair = (1.0, 0.1)  # probability in the first and in the second view
        solarize: SharePair = (0.0, 0.2)

    terms = ("sim", "std", "cov")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.loss = self.settings(config)
        self.encoder = build_encoder(config)
        self.expander = projector(self.loss.expander, config.vit.embed_dim)

    @classmethod
    def views(cls, config: Config) -> list[View]:
        loss = cls.settings(config)
        pairs = zip(loss.blur, loss.solarize, strict=True)
        return [augmented(config, blur=blur, solarize=solarize) for blur, solarize in pairs]

    @classmethod
    def couples_images(cls, config: Config) -> bool:
        return True

    def forward(self, views: list[Tensor], layout: Any, targets: Any) -> Output:
        loss = self.loss
        y = self.encoder(torch.cat(views)).mean(1)
        z_BVD = torch.stack([self.expander(y_BD) for y_BD in y.chunk(2)], 1)
        sim, std, cov = vicreg(z_BVD, group=world_group())
        total = loss.beta_sim * sim + loss.beta_std * std + loss.beta_cov * cov
        terms = sim.detach(), std.detach(), cov.detach()
        return Output(total, terms, {"feature": y.detach(), "embedding": z_BVD.detach().transpose(0, 1).flatten(0, 1)})

    @classmethod
    def flops(cls, config: Config, kept: Kept) -> dict[str, float]:
        widths = (config.vit.embed_dim, *cls.settings(config).expander)
        return {
            "encoder": 2 * cost.encoder_flops(config, config.grid**2),
            "expander": 2 * 3 * cost.mlp_flops(widths),
            "covariance": 2 * 2 * 2 * widths[-1] ** 2,
        }

    @classmethod
    def activations(cls, config: Config, kept: Kept, size: int, ranks: int) -> Held:
        return cost.views_held(config, [view.size for view in cls.views(config)], [cls.settings(config).expander], size)
