"""C-JEPA (arXiv 2410.19560, Algorithm 1): I-JEPA, and VICReg between the predicted blocks.

The M predicted blocks of an image are its views. Their means over patches go through a projector, and VICReg's terms
are taken over all pairs of blocks, with statistics over all ranks:
    L = L_jepa + beta_vicreg * (beta_sim * sim + beta_std * std + beta_cov * cov)

Legend: that of I-JEPA.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.config.schema import Config, Loss, NonNegative, Widths
from jepa.model import cost
from jepa.model.cost import Kept
from jepa.model.layout import Layout
from jepa.model.packed import Ragged
from jepa.model.projector import projector
from jepa.ranks.distributed import world_group
from jepa_kernels import vicreg

from .ijepa import B16, B16_SHORT, IJEPA, L16

PUBLISHED = {
    ("linear", "ImageNet", "class"): {B16: 73.7, B16_SHORT: 69.5, L16: 78.1},
    ("finetune", "ImageNet", "class"): {B16: 84.5, L16: 86.2},
    ("clevr", "CLEVR", "count"): {L16: 86.8},
    ("clevr", "CLEVR", "distance"): {L16: 71.6},
    ("davis", "DAVIS 2017", "J&F"): {L16: 58.3},
    ("segment", "ADE20K", "mIoU"): {B16: 48.7},
    ("detect", "COCO", "box AP"): {B16: 50.7},
    ("detect", "COCO", "mask AP"): {B16: 45.3},
}


class CJEPA(IJEPA):
    class Settings(Loss):
        regularizer: Literal["vicreg", "cosine"] = "vicreg"
        vicreg_on: Literal["predictions", "context"] = "predictions"
        beta_vicreg: NonNegative = 0.001
        beta_sim: NonNegative = 25.0
        beta_std: NonNegative = 25.0
        beta_cov: NonNegative = 1.0
        projector: Widths | None = None  # output widths of its layers; null: three layers of the encoder's width

    terms = ("jepa", "sim", "std", "cov")
    published = PUBLISHED

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.loss = self.settings(config)
        self.projector: nn.Sequential | None = None
        if self.loss.regularizer == "vicreg":
            self.projector = projector(self.projector_widths(config)[1:], config.vit.embed_dim)

    @classmethod
    def conflicts(cls, config: Config) -> Iterator[tuple[str, str]]:
        loss = cls.settings(config)
        if (loss.regularizer, loss.vicreg_on) == ("cosine", "context"):
            yield "loss.vicreg_on", "must be predictions: the cosine regularizer compares those"
        elif loss.vicreg_on == "predictions" and config.mask.num_pred_masks < 2:
            yield "mask.num_pred_masks", "must be at least 2: C-JEPA compares the predicted blocks of an image"

    @classmethod
    def couples_images(cls, config: Config) -> bool:
        return cls.settings(config).regularizer == "vicreg"

    @classmethod
    def reads_all_targets(cls, config: Config) -> bool:
        return cls.couples_images(config) and cls.settings(config).vicreg_on == "context"

    @classmethod
    def projector_widths(cls, config: Config) -> tuple[int, ...]:
        width, given = config.vit.embed_dim, cls.settings(config).projector
        return (width, *(given or (width,) * 3)) if cls.couples_images(config) else ()

    def losses(
        self, layout: Layout, context: Tensor | Ragged, z: Tensor, p_RKD: Tensor, h_BUD: Tensor
    ) -> tuple[Tensor, ...]:
        jepa, _ = super().losses(layout, context, z, p_RKD, h_BUD)
        (M, B, _), loss = layout.places_MBK.shape, self.loss
        views_BMD = p_RKD.mean(1).view(M, B, -1).transpose(0, 1)
        std, cov = jepa.new_zeros(()), jepa.new_zeros(())
        if self.projector is None:
            sim = mean_pairwise_cosine(views_BMD)
            total = jepa - loss.beta_vicreg * sim
        else:
            if loss.vicreg_on == "context":
                z_BD = context.contexts.means(z)[:B] if isinstance(context, Ragged) else z.mean(1)
                sim, std, cov = vicreg_of_context(self.projector, z_BD, h_BUD.mean(1))
            else:
                sim, std, cov = vicreg_of_blocks(self.projector, views_BMD)
            total = jepa + loss.beta_vicreg * (loss.beta_sim * sim + loss.beta_std * std + loss.beta_cov * cov)
        return total, *(term.detach() for term in (jepa, sim, std, cov))

    @classmethod
    def flops(cls, config: Config, kept: Kept) -> dict[str, float]:
        contexts, regularizer = config.mask.num_enc_masks, 0.0
        if cls.couples_images(config):
            widths = cls.projector_widths(config)
            covariance = 2 * widths[-1] ** 2
            projected, compared = (2, 1) if cls.reads_all_targets(config) else (config.mask.num_pred_masks,) * 2
            regularizer = contexts * (3 * projected * cost.mlp_flops(widths) + 2 * compared * covariance)
        return super().flops(config, kept) | {"regularizer": regularizer}

    @classmethod
    def saved(cls, config: Config, kept: Kept, size: int) -> tuple[float, float]:
        encoder, predictor = super().saved(config, kept, size)
        projected = 2 if cls.reads_all_targets(config) else config.mask.num_pred_masks
        rows = config.data.batch_size * config.mask.num_enc_masks * projected
        more = cost.mlp_bytes(cls.projector_widths(config), rows, size) if cls.couples_images(config) else 0
        return encoder, predictor + more


def mean_pairwise_cosine(z_BMD: Tensor) -> Tensor:
    """Mean cosine similarity over ordered pairs of different blocks, fp32. With unit rows u_i,
    sum over i != j of u_i . u_j = |sum_i u_i|^2 - M."""
    M = z_BMD.shape[1]
    unit = F.normalize(z_BMD.float(), dim=-1)
    return (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))).mean() / (M * (M - 1))


def vicreg_of_blocks(project: nn.Module, views_BMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1: the views are the predicted blocks."""
    B, M, D = views_BMD.shape
    return vicreg(project(views_BMD.reshape(B * M, D)).view(B, M, -1), group=world_group())


def vicreg_of_context(project: nn.Module, z_BD: Tensor, h_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Appendix C.2: variance and covariance of the context encoder's pooled output, and its MSE to the pooled target
    features."""
    context, target = project(torch.cat([z_BD, h_BD])).view(2, len(z_BD), -1)
    _, std, cov = vicreg(context[:, None], group=world_group())
    return F.mse_loss(context.float(), target.float()), std, cov
