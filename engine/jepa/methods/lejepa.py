"""LeJEPA (arXiv 2511.08544): views predict the mean of the global ones, and embeddings are kept Gaussian.

Each image gives a few global and several smaller local views; the encoder's features, averaged over patches, go through
a projector: z_v = projector(mean(encoder(x_v))). With the mean m of the global views' z,
    L = (1 - weight) * mean_v |z_v - m|^2 / D + weight * mean_v SIGReg({z_v over all images})
SIGReg compares the distribution of embeddings on random directions, new ones in each step, with the standard normal: it
alone keeps features from collapsing. No teacher, no stop-gradient, no predictor.

Legend: B images, G global and L local views, V = G + L, D width of the embeddings, S directions.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from jepa.config.schema import Config, Count, Loss, Natural, Pixels, ScaleRange, Share, Widths
from jepa.data.augment import View
from jepa.model import cost
from jepa.model.cost import Held, Kept
from jepa.model.layout import Place
from jepa.model.projector import projector
from jepa.model.vit import build_encoder
from jepa.ranks.distributed import world_group
from jepa_kernels import sigreg, sigreg_slices

from .base import Method, Output, augmented


class LeJEPA(Method):
    class Settings(Loss):
        weight: Share = 0.05  # of SIGReg; the paper's lambda
        slices: Natural = 1024  # random directions
        projector: Widths = (2048, 2048, 128)  # output widths of its layers
        global_views: Natural = 2
        local_views: Count = 6
        local_size: Pixels = 96  # pixels a side
        local_scale: ScaleRange = (0.05, 0.3)  # area, as a fraction of the image's; of global views data.crop_scale
        blur: Share = 0.5  # probability
        solarize: Share = 0.2

    terms = ("prediction", "sigreg")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.loss = self.settings(config)
        self.encoder = build_encoder(config)
        if self.loss.local_size != config.data.crop_size:
            self.encoder.allow(self.loss.local_size)
        self.projector = projector(self.loss.projector, config.vit.embed_dim)

    @classmethod
    def conflicts(cls, config: Config) -> Iterator[tuple[str, str]]:
        if cls.settings(config).local_size % config.mask.patch_size:
            yield "loss.local_size", f"must be a multiple of mask.patch_size {config.mask.patch_size}"

    @classmethod
    def views(cls, config: Config) -> list[View]:
        loss = cls.settings(config)
        whole = augmented(config, blur=loss.blur, solarize=loss.solarize)
        part = augmented(config, blur=loss.blur, solarize=loss.solarize, size=loss.local_size, scale=loss.local_scale)
        return [whole] * loss.global_views + [part] * loss.local_views

    @classmethod
    def couples_images(cls, config: Config) -> bool:
        return True

    @classmethod
    def layout(cls, config: Config, place: Place, device: torch.device, whole: bool = False) -> Tensor:
        """Random directions [D, S], the same on all ranks."""
        loss, accumulation = cls.settings(config), config.batch(place.world_size).accumulation
        micro_batch = place.step * accumulation + place.micro
        return sigreg_slices(loss.projector[-1], loss.slices, seed=config.engine.seed, step=micro_batch, device=device)

    def forward(self, views: list[Tensor], layout: Tensor, targets: Any) -> Output:
        B, G = len(views[0]), self.loss.global_views
        same_size = filter(None, (views[:G], views[G:]))
        y = torch.cat([self.encoder(torch.cat(some)).mean(1) for some in same_size])
        z_VBD = self.projector(y).view(len(views), B, -1).float()
        prediction = (z_VBD - z_VBD[:G].mean(0)).square().mean()
        regularizer = sigreg(z_VBD, layout, group=world_group())
        loss = (1 - self.loss.weight) * prediction + self.loss.weight * regularizer
        features = {"feature": y[: G * B].detach(), "embedding": z_VBD[:G].detach().flatten(0, 1)}
        return Output(loss, (prediction.detach(), regularizer.detach()), features)

    @classmethod
    def flops(cls, config: Config, kept: Kept) -> dict[str, float]:
        loss, patches = cls.settings(config), (cls.settings(config).local_size // config.mask.patch_size) ** 2
        views, width = loss.global_views + loss.local_views, loss.projector[-1]
        return {
            "global": loss.global_views * cost.encoder_flops(config, config.grid**2),
            "local": loss.local_views * cost.encoder_flops(config, patches),
            "projector": 3 * views * cost.mlp_flops((config.vit.embed_dim, *loss.projector)),
            "sigreg": 2 * views * 2 * width * loss.slices,  # directions have no gradient
        }

    @classmethod
    def activations(cls, config: Config, kept: Kept, size: int, ranks: int) -> Held:
        """SIGReg keeps the directions, the projections on them, and two fp32 sums at each of 16 knots."""
        loss, sizes = cls.settings(config), [view.size for view in cls.views(config)]
        rows, width = len(sizes) * config.data.batch_size, loss.projector[-1]
        of_sigreg = 4 * loss.slices * (width + rows + 2 * 16 * len(sizes))
        return cost.views_held(config, sizes, [loss.projector], size, of_sigreg)
