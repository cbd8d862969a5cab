"""Heads for semantic segmentation: from a vision transformer's maps to scores of the classes.

Legend: B images, D width, C channels, G patches along a side, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from .pyramid import Rescaling

BINS = (1, 2, 3, 6)  # of the pyramid pooling, along a side
DROPOUT = 0.1  # of whole channels before the classifier


class Linear(nn.Module):
    """L maps [B, D, G, G], concatenated -> scores [B, K, G, G], by a batch norm and a 1 x 1 convolution."""

    def __init__(self, dim: int, layers: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim * layers)
        self.classify = nn.Conv2d(dim * layers, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classify(self.norm(torch.cat(maps, 1)))


class UPerNet(nn.Module):
    """Four maps [B, D, G, G], earlier blocks first -> scores [B, K, 4 G, 4 G]. Xiao et al. 2018, arXiv 1807.10221.

    The maps are rescaled to 4, 2, 1 and 1/2 times G. The coarsest is pooled at several scales; the pyramid then adds
    each map to the next finer one; the scores come from all of them together.
    """

    def __init__(self, dim: int, channels: int, classes: int) -> None:
        super().__init__()
        self.rescaling = Rescaling(dim)
        *finer, coarsest = self.rescaling.widths
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), Conv2dNormActivation(coarsest, channels, 1)) for bins in BINS
        )
        self.gather = Conv2dNormActivation(coarsest + len(BINS) * channels, channels, 3)
        self.lateral = nn.ModuleList(Conv2dNormActivation(width, channels, 1) for width in finer)
        self.smooth = nn.ModuleList(Conv2dNormActivation(channels, channels, 3) for _ in finer)
        self.fuse = Conv2dNormActivation(4 * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(channels, classes, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        *finer, coarsest = self.rescaling(maps)
        pools = [_resized(pool(coarsest), coarsest) for pool in self.pooled]
        levels = [self.gather(torch.cat([coarsest, *pools], 1))]
        for lateral, x in zip(reversed(self.lateral), reversed(finer), strict=True):
            x = lateral(x)
            levels.insert(0, x + _resized(levels[0], x))
        finest = [smooth(x) for smooth, x in zip(self.smooth, levels, strict=False)]
        joined = [_resized(x, finest[0]) for x in (*finest, levels[-1])]
        return self.classify(self.fuse(torch.cat(joined, 1)))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
