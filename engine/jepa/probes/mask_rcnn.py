"""torchvision's Mask R-CNN on a plain vision transformer, as in ViTDet (arXiv 2203.16527).

The pyramid, the heads' depths and their layer norms are ViTDet's; attention is global in all blocks.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from jepa.model.vit import VisionTransformer

from .pyramid import EPS, SimplePyramid

POOLED = 7  # the side of a box' features
RATIOS = (0.5, 1.0, 2.0)  # of an anchor's height to its width


def stride_of(encoder: VisionTransformer) -> int:
    """Pixels between the centres of patches in the detector's images: a power of two, which torchvision takes it to be.

    Images are resized for an encoder whose patches are of another size: those of 14 pixels stand for 16, as in ViTDet.
    """
    return 2 ** round(math.log2(encoder.patch_embed.patch_size))


def mask_rcnn(
    encoder: VisionTransformer, classes: int, size: int, channels: int, mean: Sequence[float], bf16: bool = False
) -> MaskRCNN:
    """A detector of `classes` classes, numbered from 1, on `encoder`, which is not copied.

    It takes images as torchvision's does, but in uint8; they are resized to a longer side of `size` pixels and padded
    to a square with the mean colour. `size` is a multiple of 4 * stride_of(encoder). `bf16`: the encoder and the
    pyramid run in bf16 by autocast.
    """
    stride = stride_of(encoder)

    def norm(width: int) -> nn.Module:
        return LayerNorm2d(width, EPS)

    detector = MaskRCNN(
        Backbone(encoder, size, channels, bf16),
        rpn_anchor_generator=AnchorGenerator(tuple((2 * stride * 2**i,) for i in range(5)), (RATIOS,) * 5),
        rpn_head=RPNHead(channels, len(RATIOS), conv_depth=2),
        box_head=FastRCNNConvFCHead((channels, POOLED, POOLED), [channels] * 4, [4 * channels], norm),
        box_predictor=FastRCNNPredictor(4 * channels, classes + 1),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1),
    )
    detector.transform = Square(size, mean)
    return detector


class Backbone(nn.Module):
    """uint8 images [B, 3, S, S] -> the pyramid's maps, fp32, by name."""

    def __init__(self, encoder: VisionTransformer, size: int, channels: int, bf16: bool) -> None:
        super().__init__()
        self.encoder, self.bf16 = encoder, bf16
        self.side = size // stride_of(encoder)
        self.pixels = self.side * encoder.patch_embed.patch_size
        if self.pixels != encoder.img_size:
            encoder.allow(self.pixels)
        self.pyramid = SimplePyramid(encoder.embed_dim, channels)
        self.out_channels = channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        if images.shape[2] != self.pixels:
            images = v2.functional.resize(images, [self.pixels, self.pixels], antialias=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.encoder(images.permute(0, 2, 3, 1).contiguous())
            maps = self.pyramid(x.transpose(1, 2).unflatten(2, (self.side, self.side)))
        return OrderedDict((name, x.float()) for name, x in maps.items())


class Square(GeneralizedRCNNTransform):
    """In place of torchvision's transform, which would normalise the images and not make them square.

    Training images have to be squares of `size` pixels already, so that their targets need no change. Detections are
    scaled back by torchvision's `postprocess`.
    """

    def __init__(self, size: int, mean: Sequence[float]) -> None:
        super().__init__(size, size, [0.0] * 3, [1.0] * 3)
        self.size = size
        self.grey: Tensor
        self.register_buffer("grey", torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8))

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]] | None = None) -> tuple[ImageList, Any]:
        S, squares, sizes = self.size, [], []
        for image in images:
            H, W = image.shape[1:]
            if targets is not None and (H, W) != (S, S):
                raise ValueError(f"a training image of {H} x {W} pixels, wanted {S} x {S}")
            h, w = (max(1, round(side * S / max(H, W))) for side in (H, W))
            square = self.grey[:, None, None].repeat(1, S, S)
            square[:, :h, :w] = v2.functional.resize(image, [h, w], antialias=True)
            squares.append(square)
            sizes.append((h, w))
        return ImageList(torch.stack(squares), sizes), targets
