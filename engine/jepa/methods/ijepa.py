"""I-JEPA (arXiv 2301.08243): predict the target encoder's features of hidden blocks from one visible block.

For each image: M target blocks and a context block without their patches are drawn; the encoder sees the context, and
the predictor, given the context's features and the places of a target block, predicts the features that the target
encoder, the moving average of the encoder, computes there from the whole image. The loss is smooth L1 between the
prediction and the layer-normed target features.

Legend: B images, M target blocks, Kc/Kt kept patches of a context and of a target, N patches, U of them whose target
features are computed, D width; R = M * B.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from jepa.config.schema import Config, Loss
from jepa.model import cost
from jepa.model.cost import Held, Kept
from jepa.model.layout import Layout, Place, lay_out, masks_of
from jepa.model.packed import Ragged
from jepa.model.predictor import build_predictor
from jepa.model.vit import build_encoder
from jepa_kernels import prediction_loss

from .base import Method, Output

# model, patch size, crop size, epochs of ImageNet-1K
B16, B16_SHORT, L16 = ("vit_base", 16, 224, 600), ("vit_base", 16, 224, 100), ("vit_large", 16, 224, 600)
B16_300 = ("vit_base", 16, 224, 300)
H14, H16 = ("vit_huge", 14, 224, 300), ("vit_huge", 16, 448, 300)
PUBLISHED = {  # 100 epochs, ADE20K, COCO and DAVIS as the C-JEPA paper gives them
    ("linear", "ImageNet", "class"): {B16: 72.9, B16_SHORT: 63.7, L16: 77.5, H14: 79.3, H16: 81.1},
    ("linear", "CIFAR-100", "class"): {H14: 87.5},
    ("linear", "Places205", "class"): {H14: 58.4},
    ("linear", "iNaturalist 2018", "class"): {H14: 47.6},
    ("lowshot", "ImageNet", "1%"): {B16_300: 54.2, L16: 69.4, H14: 73.3, H16: 77.3},
    ("finetune", "ImageNet", "class"): {B16: 83.5, L16: 85.3, H16: 87.1},
    ("clevr", "CLEVR", "count"): {L16: 85.6, H14: 86.7},
    ("clevr", "CLEVR", "distance"): {L16: 71.2, H14: 72.4},
    ("davis", "DAVIS 2017", "J&F"): {L16: 56.6},
    ("segment", "ADE20K", "mIoU"): {B16: 47.6},
    ("detect", "COCO", "box AP"): {B16: 49.9},
    ("detect", "COCO", "mask AP"): {B16: 44.5},
}


class IJEPA(Method):
    class Settings(Loss):
        """I-JEPA's loss has no settings."""

    terms: ClassVar[tuple[str, ...]] = ("jepa",)
    averaged = ("encoder",)
    masked = True
    published = PUBLISHED

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.encoder = build_encoder(config)
        self.predictor = build_predictor(config)

    @classmethod
    def layout(cls, config: Config, place: Place, device: torch.device, whole: bool = False) -> Layout:
        all_read = cls.reads_all_targets(config)
        return lay_out(masks_of(config, place), config, device, whole=whole, all_read=all_read)

    @classmethod
    def reads_all_targets(cls, config: Config) -> bool:
        """Whether the loss reads target features outside the target blocks."""
        return False

    @classmethod
    def projector_widths(cls, config: Config) -> tuple[int, ...]:
        """Of the MLP behind the predictions: its input, then its layers' outputs; empty if there is none."""
        return ()

    @staticmethod
    def targets(teacher: Any, views: list[Tensor], layout: Layout) -> Tensor:
        """h [B, U, D]."""
        return teacher(views[0], layout.computed)

    def forward(self, views: list[Tensor], layout: Layout, targets: Any) -> Output:
        """With several context masks the loss is the mean over them."""
        (images,) = views
        seen = [self.encoder(images, context) for context in layout.contexts]
        predicted = [self.predictor(z, c, layout.target_MBK) for z, c in zip(seen, layout.contexts, strict=True)]
        h_BUD = targets() if callable(targets) else targets
        every = zip(layout.contexts, seen, predicted, strict=True)
        each = [self.losses(layout, context, z, p_RKD, h_BUD) for context, z, p_RKD in every]
        loss, *terms = (torch.stack(values).mean(0) for values in zip(*each, strict=True))
        blocks = torch.cat([p_RKD.detach().mean(1) for p_RKD in predicted])
        return Output(loss, tuple(terms), {"target": h_BUD, "pred": blocks})

    def losses(
        self, layout: Layout, context: Tensor | Ragged, z: Tensor, p_RKD: Tensor, h_BUD: Tensor
    ) -> tuple[Tensor, ...]:
        """The loss of one context, encoded as z, and its terms."""
        jepa = prediction_loss(p_RKD, h_BUD, layout.places_MBK)
        return jepa, jepa.detach()

    @classmethod
    def flops(cls, config: Config, kept: Kept) -> dict[str, float]:
        context, target, rows = kept
        E, M, N = config.mask.num_enc_masks, config.mask.num_pred_masks, config.grid**2
        D, Dp, skip = config.vit.embed_dim, config.predictor.embed_dim, config.engine.skip_unread
        needed = rows if skip and not cls.reads_all_targets(config) else None
        blocks = M * cost.blocks_flops(config.predictor, context + target, target if skip else None)
        return {
            "target": N * cost.embedding_flops(config) + cost.blocks_flops(config.vit, N, needed),
            "context": E * cost.encoder_flops(config, context),
            "predictor": 3 * E * (2 * context * D * Dp + blocks + M * 2 * target * Dp * D),
        }

    @classmethod
    def saved(cls, config: Config, kept: Kept, size: int) -> tuple[float, float]:
        """Bytes that the encoder, and what follows it, keep for the backward. Of a last block that outputs few rows 4 D
        of its input's values and 6 D + 2 F of theirs; at the end the last norm, and the loss's gradient."""
        narrow, again, M = config.predictor, config.engine.activation_checkpointing, config.mask.num_pred_masks
        D, Dp, Fp = config.vit.embed_dim, narrow.embed_dim, cost.hidden(config.predictor)
        images = config.data.batch_size * config.mask.num_enc_masks
        contexts, targets = images * kept.context, images * M * kept.target
        sequences = M * contexts + targets
        if config.engine.skip_unread:
            last = sequences * Dp + targets * Dp if again else sequences * 4 * Dp + targets * (6 * Dp + 2 * Fp)
            predictor = cost.blocks_bytes(config, narrow, sequences, narrow.depth - 1, size) + size * last
        else:
            predictor = cost.blocks_bytes(config, narrow, sequences, narrow.depth, size)
        return cost.encoder_bytes(config, contexts, size), predictor + size * targets * (2 * Dp + D)

    @classmethod
    def activations(cls, config: Config, kept: Kept, size: int, ranks: int) -> Held:
        """Also: the target features, the images, and the gradients that the first blocks of a backward need beside."""
        B, M, N = config.data.batch_size, config.mask.num_pred_masks, config.grid**2
        D, F, narrow = config.vit.embed_dim, cost.hidden(config.vit), config.predictor
        encoder, predictor = cls.saved(config, kept, size)
        few = config.engine.skip_unread and not cls.reads_all_targets(config)
        features = size * B * D * (kept.rows if few else N)
        images = B * 3 * config.data.crop_size**2 * (1 + config.data.prefetch)
        seen = B * config.mask.num_enc_masks
        predictors_first = size * seen * M * kept.target * (D + narrow.embed_dim + cost.hidden(narrow))
        encoders_first = size * seen * kept.context * (2 * D + F)
        if config.engine.activation_checkpointing:  # the block at hand is computed again
            predictors_first += seen * M * (kept.context + kept.target) * cost.block_bytes(narrow, size)
            encoders_first += seen * kept.context * cost.block_bytes(config.vit, size)
        # One rank computes the targets before anything else, several while they hold all that the predictor saved.
        teacher = size * B * N * (2 * D + 2 * F) + (encoder + predictor if ranks > 1 else 0)
        return Held(
            peak=max(encoder + predictor + features + predictors_first, teacher) + images,
            encoder=encoder + features + encoders_first + images,
            features=features + images,
        )
