"""What a view of an image is: a random crop, a flip, and changes of its colours as torchvision and Pillow define them.

Crops and flips are made by DALI (jepa.data.decode); here are the numbers for them. The colours are changed here, by
torch, in one code for CPUs and GPUs. DALI has operators for them, but none does what torchvision does: its hue is a
rotation in YIQ, which on photographs is further from torchvision's HSV than no change of hue at all, its contrast is
about mid-grey, and its order is the same for every image.

Between two changes pixels are whole levels, 0 to 255. Brightness, contrast, saturation, greyscale and solarisation are
Pillow's, bit for bit on a CPU without fused multiply-add. Hue is torchvision's for tensors within one level; Pillow's,
whose hue has 8 bits, is 0.3 levels away on average. Blur is the Gaussian that Pillow approximates by three box blurs.
What an image becomes does not depend on the others of its batch.

Legend: N crops, K random numbers of each, S pixels a side.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Random numbers of a crop: 10 areas, 10 ratios, top, left, flip, and one unused.
TRIES, TOP, LEFT, FLIP, CROP_WORDS = 10, 20, 21, 22, 24
# And of its colours: whether and in which order to jitter, 4 factors, whether the others, sigma, and two unused.
JITTER, ORDER, FACTORS, GREY, BLUR, SIGMA, SOLARIZE, COLOUR_WORDS = 0, 1, slice(2, 6), 6, 7, 8, 9, 12

RATIO = (3 / 4, 4 / 3)
ORDERS = np.array(list(itertools.permutations(range(4))))
UNCHANGED = np.array([1, 1, 1, 0], np.float32)  # brightness, contrast, saturation and hue that change nothing


@dataclass(frozen=True)
class View:
    """How one view of an image is made: crop, flip, jitter, greyscale, blur, solarisation, in this order.

    Each is applied with its own probability. Raises ValueError if a value is out of range.
    """

    size: int  # pixels a side
    scale: tuple[float, float] | None  # area of the random crop, as a fraction of the image's; None: no random crop but
    # the part that evaluation sees (jepa.data.loader.eval_batches)
    flip: float = 0.0  # probability of a horizontal flip
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # strengths as torchvision's ColorJitter has them:
    # of brightness, contrast, saturation and hue (at most 0.5, half a turn)
    jitter_probability: float = 0.8
    grey: float = 0.0  # probability
    blur: float = 0.0  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize: float = 0.0  # probability of inverting the channel values of 128 and more

    @property
    def colours(self) -> bool:
        """Whether it changes colours."""
        return bool((any(self.jitter) and self.jitter_probability) or self.grey or self.blur or self.solarize)

    def __post_init__(self) -> None:
        for name in ("flip", "jitter_probability", "grey", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"View.{name}: given {getattr(self, name)}; wanted a probability, 0 to 1")
        if not (all(strength >= 0 for strength in self.jitter) and self.jitter[3] <= 0.5):
            raise ValueError(f"View.jitter: given {self.jitter}; wanted four strengths from 0, the last at most 0.5")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"View.blur_sigma: given {self.blur_sigma}; wanted a range above 0, smallest first")


def random_boxes(sizes_B2: np.ndarray, uniform_BK: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """The boxes of torchvision's RandomResizedCrop for B images, (top, left, height, width) in pixels, int32 [B, 4].

    `sizes_B2`: heights and widths. `uniform_BK`: at least 22 random numbers in [0, 1) per image. `scale`: the
    smallest and largest fraction of the image's area. Ten areas and aspect ratios (log-uniform in 3/4 .. 4/3) are
    drawn, and the first pair that fits is placed at random. If none fits, the box is the largest centred one with
    a ratio in that range.
    """
    height_B1, width_B1 = sizes_B2[:, :1].astype(np.float64), sizes_B2[:, 1:].astype(np.float64)
    area = height_B1 * width_B1 * (scale[0] + (scale[1] - scale[0]) * uniform_BK[:, :TRIES])
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = np.exp(low + (high - low) * uniform_BK[:, TRIES : 2 * TRIES])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width_B1) & (h > 0) & (h <= height_B1)

    row, first, height, width = np.arange(len(fits)), fits.argmax(axis=1), height_B1[:, 0], width_B1[:, 0]
    h, w = h[row, first], w[row, first]
    top = np.floor(uniform_BK[:, TOP] * (height - h + 1))
    left = np.floor(uniform_BK[:, LEFT] * (width - w + 1))
    placed = np.stack([top, left, h, w], axis=1)

    h, w = np.minimum(height, np.rint(width / RATIO[0])), np.minimum(width, np.rint(height * RATIO[1]))
    centred = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), placed, centred).astype(np.int32)


class Colour(NamedTuple):
    """What happens to the colours of N crops.

    `order`: int [N, 4], which of brightness, contrast, saturation and hue (0 to 3) is first, ..., last; `factor`:
    float32 [N, 4], of the first three, and by what part of a turn to shift hue; `grey`, `solarize`: bool [N]; `sigma`:
    float64 [N], of the blur in pixels, 0 for none.
    """

    order: np.ndarray
    factor: np.ndarray
    grey: np.ndarray
    sigma: np.ndarray
    solarize: np.ndarray


def random_colour(view: View, uniform_NK: np.ndarray) -> Colour:
    """Draws `view`'s changes for N crops from `COLOUR_WORDS` random numbers in [0, 1) of each.

    Factors of brightness, contrast and saturation are uniform in max(0, 1 - strength) .. 1 + strength, shifts of hue in
    -strength .. strength, as in torchvision's ColorJitter.
    """
    middle, strength = UNCHANGED.astype(np.float64), np.array(view.jitter)
    low, high = np.maximum(middle - strength, [0, 0, 0, -0.5]), middle + strength
    factor_N4 = (low + (high - low) * uniform_NK[:, FACTORS]).astype(np.float32)
    jittered_N1 = uniform_NK[:, JITTER, None] < view.jitter_probability
    sigma_N = view.blur_sigma[0] + (view.blur_sigma[1] - view.blur_sigma[0]) * uniform_NK[:, SIGMA]
    return Colour(
        ORDERS[(uniform_NK[:, ORDER] * len(ORDERS)).astype(np.int64)],
        np.where(jittered_N1, factor_N4, UNCHANGED),
        uniform_NK[:, GREY] < view.grey,
        np.where(uniform_NK[:, BLUR] < view.blur, sigma_N, 0.0),
        uniform_NK[:, SOLARIZE] < view.solarize,
    )


def recolour(images_NSS3: Tensor, colour: Colour) -> None:
    """Changes the colours of uint8 [N, S, S, 3] in place: jitter, greyscale, blur, solarisation."""
    # One at a time, an image stays in the CPU's cache.
    size = 1 if images_NSS3.device.type == "cpu" else len(images_NSS3)
    for first in range(0, len(images_NSS3), size):
        some = slice(first, first + size)
        _recolour(images_NSS3[some], Colour(*(numbers[some] for numbers in colour)))


def _recolour(images_NSS3: Tensor, colour: Colour) -> None:
    x_N3SS = images_NSS3.permute(0, 3, 1, 2).contiguous().float()

    def change(which_N: np.ndarray, how: Callable[[Tensor, np.ndarray], None], numbers_N: np.ndarray) -> None:
        """Applies `how`, which works in place, to some of the images."""
        if which_N.all():
            how(x_N3SS, numbers_N)
        elif which_N.any():
            which = torch.from_numpy(which_N.nonzero()[0]).to(x_N3SS.device)
            part = x_N3SS[which]
            how(part, numbers_N[which_N])
            x_N3SS[which] = part

    for place in range(4):
        for kind, how in enumerate((_brightness, _contrast, _saturation, _hue)):
            factor_N = colour.factor[:, kind]
            change((colour.order[:, place] == kind) & (factor_N != UNCHANGED[kind]), how, factor_N)
    change(colour.grey, _grey, colour.grey)
    change(colour.sigma > 0, _blur, colour.sigma)
    change(colour.solarize, _solarize, colour.solarize)
    images_NSS3.copy_(x_N3SS.permute(0, 2, 3, 1))


def _like(numbers_N: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(numbers_N).to(x).view(-1, 1, 1, 1)


def _luma(x: Tensor) -> Tensor:
    """Pillow's grey level, [N, 1, S, S]: exact, as every number here is an integer below 2^24."""
    red, green, blue = x.split(1, dim=1)
    return red.mul(19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(2**15).div_(2**16).floor_()


def _blend(x: Tensor, other: Tensor | float, factor_N: np.ndarray) -> None:
    x.sub_(other).mul_(_like(factor_N, x)).add_(other).clamp_(0, 255).floor_()


def _brightness(x: Tensor, factor_N: np.ndarray) -> None:
    _blend(x, 0.0, factor_N)


def _contrast(x: Tensor, factor_N: np.ndarray) -> None:
    mean_N111 = _luma(x).mean((1, 2, 3), dtype=torch.float64, keepdim=True)
    _blend(x, mean_N111.add_(0.5).floor_().float(), factor_N)


def _saturation(x: Tensor, factor_N: np.ndarray) -> None:
    _blend(x, _luma(x), factor_N)


def _hue(x: Tensor, shift_N: np.ndarray) -> None:
    """Shifts hue in HSV by a part of a turn, -0.5 to 0.5.

    With hue on a circle of six, a channel falls from the largest value by (distance of the hue from the channel's own,
    0, 2 or 4, minus 1), cut to 0 .. 1, times the chroma. Everything is multiplied by the chroma: nothing is divided.
    """
    red, green, blue = x.split(1, dim=1)
    top = torch.maximum(torch.maximum(red, green), blue)
    chroma = top - torch.minimum(torch.minimum(red, green), blue)
    beside_green, beside_blue = (blue - red).add_(chroma, alpha=2), (red - green).sub_(chroma, alpha=2)
    hue = torch.where(top == red, green - blue, torch.where(top == green, beside_green, beside_blue))
    hue.add_(chroma * _like(6 * shift_N, x))  # -6 to 6 chromas
    half = 3 * chroma
    torch.sub(half, hue.abs().sub_(half).abs_(), out=red)
    torch.add(hue, chroma, out=green).abs_().sub_(half).abs_()
    torch.sub(hue, chroma, out=blue).abs_().sub_(half).abs_()
    x.sub_(chroma).clamp_(min=0)
    torch.minimum(x, chroma, out=x)
    torch.sub(top, x, out=x).round_()


def _grey(x: Tensor, _: np.ndarray) -> None:
    x.copy_(_luma(x))


def _blur(x: Tensor, sigma_N: np.ndarray) -> None:
    """A Gaussian over 3 sigma, rounded up, to each side; beyond the edges the outermost pixels are repeated."""
    reach_N = np.ceil(3 * sigma_N)
    reach, size = int(reach_N.max()), x.shape[-1]
    away_R = np.arange(reach + 1)
    weight_NR = np.exp(-0.5 * (away_R / sigma_N[:, None]) ** 2) * (away_R <= reach_N[:, None])
    weight_NR /= 2 * weight_NR.sum(axis=1, keepdims=True) - weight_NR[:, :1]
    for axis, pad in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        wide = F.pad(x, pad, mode="replicate")
        torch.mul(wide.narrow(axis, reach, size), _like(weight_NR[:, 0], x), out=x)
        for away in away_R[1:].tolist():
            pair = wide.narrow(axis, reach - away, size) + wide.narrow(axis, reach + away, size)
            x.add_(pair.mul_(_like(weight_NR[:, away], x)))
    x.round_()


def _solarize(x: Tensor, _: np.ndarray) -> None:
    """Inverts what is 128 or more."""
    x.copy_(torch.where(x < 128, x, 255 - x))
