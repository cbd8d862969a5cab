"""From a plain vision transformer's maps, which all have one scale, to maps of several.

Legend: B images, D width, C channels, G patches along a side; a patch of 16 pixels makes strides of 4, 8, 16 and 32.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import Conv2dNormActivation

EPS = 1e-6  # of layer norms


class Rescaling(nn.ModuleList):
    """Four maps [B, D, G, G] -> [B, D / 4, 4 G, 4 G], [B, D / 2, 2 G, 2 G], [B, D, G, G] and [B, D, G / 2, G / 2].

    By transposed convolutions and pooling, as in ViTDet (arXiv 2203.16527, section 3). `widths`: of the four outputs.
    """

    def __init__(self, dim: int) -> None:
        half, quarter = dim // 2, dim // 4
        super().__init__(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dim, half, 2, 2), LayerNorm2d(half, EPS), nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ),
                nn.ConvTranspose2d(dim, half, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )  # fmt: skip
        self.widths = (quarter, half, dim, dim)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [scale(x) for scale, x in zip(self, maps, strict=True)]


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid: the last map [B, D, G, G] -> five maps of C channels by name.

    "0" to "3" at 4, 2, 1 and 1/2 times G, and "pool", every second position of "3", from which only proposals come.
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.rescaling = Rescaling(dim)

        def norm(width: int) -> nn.Module:
            return LayerNorm2d(width, EPS)

        self.smooth = nn.ModuleList(
            nn.Sequential(
                Conv2dNormActivation(width, channels, 1, norm_layer=norm, activation_layer=None),
                Conv2dNormActivation(channels, channels, 3, norm_layer=norm, activation_layer=None),
            )
            for width in self.rescaling.widths
        )

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        scales = self.rescaling([x] * 4)
        maps = OrderedDict((str(i), smooth(x)) for i, (smooth, x) in enumerate(zip(self.smooth, scales, strict=True)))
        maps["pool"] = F.max_pool2d(maps["3"], 1, 2)
        return maps
