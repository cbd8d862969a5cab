"""Colours: each change against Pillow's or a float64 definition, their order, and the numbers that choose them.

The loader's views, which use them, are in test_loader.py.
"""

import colorsys
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from jepa.data import augment
from jepa.data.augment import COLOUR_WORDS, UNCHANGED, Colour, View, random_colour, recolour
from jepa.data.synthetic import noise

rng = np.random.default_rng()
PLAIN = View(8, (0.3, 1.0))


@pytest.fixture(autouse=True)
def fresh_numbers(inputs_of_its_own: None) -> None:
    global rng
    rng = np.random.default_rng(random.getrandbits(64))


def pictures(number: int, size: int) -> np.ndarray:
    """Smooth images, and as many rough ones, in which every level occurs."""
    smooth = noise(number // 2, size, random.getrandbits(63))
    rough = rng.integers(0, 256, (number - len(smooth), size, size, 3), np.uint8)
    return np.concatenate([smooth, rough])


def colour(number: int, **changes: np.ndarray) -> Colour:
    """No change but these."""
    none = np.zeros(number, bool)
    order, factor = np.tile(np.arange(4), (number, 1)), np.tile(UNCHANGED, (number, 1))
    return Colour(order, factor, none, np.zeros(number), none)._replace(**changes)


def recoloured(images: np.ndarray, changes: Colour) -> np.ndarray:
    ours = torch.from_numpy(images.copy())
    recolour(ours, changes)
    return ours.numpy()


def assert_nearly_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal but for a rounding that float32 may turn over: one level, in at most one value of a thousand."""
    gap = np.abs(ours.astype(int) - theirs.astype(int))
    assert gap.max() <= 1 and (gap > 0).mean() <= 1e-3, (gap.max(), (gap > 0).mean())


def with_pillow(kind: int, image: np.ndarray, factor: float) -> np.ndarray:
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
    return np.asarray(enhance(Image.fromarray(image)).enhance(factor))


def shifted(image: np.ndarray, shift: float) -> np.ndarray:
    """Hue shifted in HSV, in float64."""
    turned = []
    for red, green, blue in image.reshape(-1, 3) / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        turned.append(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
    return 255 * np.array(turned).reshape(image.shape)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["brightness", "contrast", "saturation"])
def test_a_factor_is_pillows(kind: int) -> None:
    images, factor = pictures(12, 37), np.tile(UNCHANGED, (12, 1))
    factor[:, kind] = rng.uniform(0, 2.5, 12)
    factor[3, kind], factor[9, kind] = 0, 1
    ours = recoloured(images, colour(12, factor=factor))
    assert_nearly_equal(ours, np.stack([with_pillow(kind, i, f) for i, f in zip(images, factor[:, kind], strict=True)]))
    assert np.array_equal(ours[9], images[9]) and not np.array_equal(ours[8], images[8])


def test_a_shift_of_hue_is_one_in_hsv() -> None:
    """Within half a level, the rounding to whole levels, whatever the hues and the shift."""
    images, factor = pictures(10, 16), np.tile(UNCHANGED, (10, 1))
    factor[:, 3] = rng.uniform(-0.5, 0.5, 10)
    factor[:2, 3] = -0.5, 0.5
    images[4, :4, :4] = rng.choice([0, 255], (4, 4, 3))  # corners of the cube: two channels are alike
    images[4, 4:8] = images[4, 4:8, :, :1]  # grey
    ours = recoloured(images, colour(10, factor=factor))
    for image, (*_, shift), found in zip(images, factor.astype(np.float64), ours, strict=True):
        assert np.abs(found - shifted(image, shift)).max() <= 0.5 + 1e-3
    assert np.array_equal(ours[4, 4:8], images[4, 4:8])


def test_grey_and_inverted_are_pillows() -> None:
    images, grey, solarize = pictures(16, 29), rng.random(16) < 0.5, rng.random(16) < 0.5
    theirs = []
    for image, g, s in zip(map(Image.fromarray, images), grey, solarize, strict=True):
        image = image.convert("L").convert("RGB") if g else image
        theirs.append(np.asarray(ImageOps.solarize(image, 128) if s else image))
    assert np.array_equal(recoloured(images, colour(16, grey=grey, solarize=solarize)), np.stack(theirs))


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """The Gaussian of 3 sigma to each side, in float64; the outermost pixels are repeated beyond the edges."""
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for axis in (0, 1):
        wide = np.pad(image.astype(np.float64), [(reach, reach) if axis == a else (0, 0) for a in range(3)], "edge")
        windows = np.lib.stride_tricks.sliding_window_view(wide, 2 * reach + 1, axis)
        image = windows @ (weights / weights.sum())
    return image


@pytest.mark.parametrize("size", [5, 48])
def test_blur_is_a_gaussian(size: int) -> None:
    images, sigma = pictures(10, size), rng.uniform(0.1, 2.0, 10)
    sigma[::4] = 0, 0.1, 2.0
    ours = recoloured(images, colour(10, sigma=sigma))
    assert np.array_equal(ours[0], images[0])
    for image, s, found in zip(images[1:], sigma[1:], ours[1:], strict=True):
        assert np.abs(found - blurred(image, s)).max() <= 0.5 + 1e-3


def test_blur_is_nearly_pillows() -> None:
    """Pillow approximates the Gaussian by three box blurs and rounds after each: on images with the grain of a
    photograph that is less than 1.5 levels on average away."""
    sigma = rng.uniform(0.1, 2.0, 24)
    grainy = noise(24, 64, random.getrandbits(63)) + rng.normal(0, 8, (24, 64, 64, 3))
    images = np.clip(grainy, 0, 255).astype(np.uint8)
    pillows = [
        Image.fromarray(i).filter(ImageFilter.GaussianBlur(float(s))) for i, s in zip(images, sigma, strict=True)
    ]
    gap = np.abs(recoloured(images, colour(24, sigma=sigma)).astype(int) - np.stack(pillows)).mean((1, 2, 3))
    assert gap.max() < 1.5


def test_jitter_has_an_order_of_its_own_for_every_image_and_is_cut_to_levels_in_between() -> None:
    """As torchvision does it: one change after the other on uint8 images."""
    number = 16
    factor = np.concatenate([rng.uniform(0.2, 1.8, (number, 3)), rng.uniform(-0.2, 0.2, (number, 1))], axis=1)
    order, factor = rng.permuted(np.tile(np.arange(4), (number, 1)), axis=1), factor.astype(np.float32)
    images, theirs = pictures(number, 16), []
    for image, kinds, factors in zip(images, order, factor, strict=True):
        for kind in kinds:
            f = float(factors[kind])
            image = np.rint(shifted(image, f)).astype(np.uint8) if kind == 3 else with_pillow(kind, image, f)
        theirs.append(image)
    gap = np.abs(recoloured(images, colour(number, order=order, factor=factor)).astype(int) - np.stack(theirs))
    assert gap.max() <= 3 and (gap > 0).mean() < 0.005  # a rounding of hue may turn over, and be enlarged later


def all_changes(number: int) -> Colour:
    view = replace(PLAIN, jitter=(0.8, 0.8, 0.8, 0.2), grey=0.2, blur=0.5, solarize=0.2)
    return random_colour(view, rng.random((number, COLOUR_WORDS)))


def test_an_image_does_not_depend_on_the_others() -> None:
    """Whether all are changed at once, as on a GPU, or one by one, as on a CPU."""
    images, changes = pictures(24, 20), all_changes(24)
    together, order = torch.from_numpy(images.copy()), rng.permutation(24)
    augment._recolour(together, changes)
    alone = recoloured(images[order], Colour(*(numbers[order] for numbers in changes)))
    assert np.array_equal(together.numpy()[order], alone)
    assert sum(not np.array_equal(a, b) for a, b in zip(alone, images[order], strict=True)) > 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_changes_colours_as_a_cpu_does() -> None:
    images, changes = pictures(32, 96), all_changes(32)
    there = torch.from_numpy(images).cuda()
    recolour(there, changes)
    assert_nearly_equal(there.cpu().numpy(), recoloured(images, changes))


# --- random numbers


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    gap = np.abs(np.sort((values - low) / (high - low)) - (np.arange(len(values)) + 0.5) / len(values)).max()
    assert gap < 3 / math.sqrt(len(values))  # Kolmogorov-Smirnov, p < 1e-7


def assert_share(happened: np.ndarray, probability: float) -> None:
    assert abs(happened.mean() - probability) < 6 * math.sqrt(probability * (1 - probability) / happened.size)


def test_probabilities_and_ranges_are_the_views() -> None:
    view = View(
        8,
        (0.3, 1.0),
        jitter=(0.4, 1.5, 0.2, 0.1),
        jitter_probability=0.7,
        grey=0.2,
        blur=0.6,
        blur_sigma=(0.5, 1.5),
        solarize=0.1,
    )
    drawn = random_colour(view, rng.random((30_000, COLOUR_WORDS)))
    jittered = (drawn.factor != UNCHANGED).any(axis=1)
    for happened, probability in ((jittered, 0.7), (drawn.grey, 0.2), (drawn.sigma > 0, 0.6), (drawn.solarize, 0.1)):
        assert_share(happened, probability)
        assert_share(happened & jittered[::-1], probability * 0.7)
    for kind, (low, high) in enumerate([(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)]):
        assert_uniform(drawn.factor[jittered, kind], low, high)
    assert_uniform(drawn.sigma[drawn.sigma > 0], 0.5, 1.5)
    _, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(counts) == 24 and np.abs(counts / 30_000 - 1 / 24).max() < 6 * math.sqrt(1 / 24 / 30_000)
    assert abs(np.corrcoef(drawn.factor[jittered].T) - np.eye(4)).max() < 6 / math.sqrt(20_000)


def test_strengths_and_probabilities_of_zero_change_nothing() -> None:
    images = pictures(8, 12)
    uniform = rng.random((8, COLOUR_WORDS))
    assert np.array_equal(recoloured(images, random_colour(replace(PLAIN, jitter_probability=1.0), uniform)), images)
    never = replace(PLAIN, jitter=(1.0, 1.0, 1.0, 0.5), jitter_probability=0.0)
    assert np.array_equal(recoloured(images, random_colour(never, uniform)), images)
    assert not PLAIN.colours and not never.colours and replace(PLAIN, grey=0.1).colours


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": 1.5},
        {"grey": -0.1},
        {"jitter": (0.4, 0.4, 0.4, 0.6)},
        {"jitter": (-1, 0, 0, 0)},
        {"blur_sigma": (0, 1)},
    ],
)
def test_what_no_view_can_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"View\.{next(iter(wrong))}: given .*; wanted"):
        replace(PLAIN, **wrong)  # type: ignore[arg-type]
