"""Which patches are visible and which are predicted: I-JEPA's multi-block masks (arXiv 2301.08243, section 3).

An image is a grid of height x width patches, numbered in raster order. M target blocks are placed on it at
random; E larger context blocks are placed likewise, and the patches of the targets removed from them. Modes:

  reference  the published sampler, quirks included: one random number sets both the area and the aspect
             ratio of the targets, blocks never reach the last row and column, and contexts are truncated, in
             raster order, to the shortest of the batch, so that the bottom of an image is hardly ever visible
  unbiased   the same blocks with independent area and aspect ratio, every position allowed, and contexts
             cut to the shortest by dropping random patches
  packed     as unbiased, but nothing is cut: contexts of unequal length are concatenated

Masks are a pure function of (seed, step, index of the image in the step's global batch): any rank can sample
any image's, and there is no state to save. Block sizes depend only on (seed, step). Random words come from
Philox4x32-10 (Salmon et al., SC 2011), with the seed as key and (4 * (draw // 4) + stream, image, step) as
counter. An integer below n is floor(word * n / 2^32), which biases no probability by more than 2^-32.

Shapes: B images, E contexts, M targets, Kc and Kt patches kept of each. `_sample_ref` is the specification;
the CPU kernel in csrc/masks.cpp is bitwise equal.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import jepa_kernels  # noqa: F401  loads csrc, which has the CPU kernel

MODES = ("reference", "unbiased", "packed")
TRIES = 20  # failed placements of a context before it may overlap one more target
MAX_SIDE = MAX_BLOCKS = 1024
MAX_IMAGES = 2**32  # the image's index is one word of the counter
BLOCK_SIZES, PLACES, CUTS, THIN = range(4)  # streams of random words

Extent = tuple[int, int]  # height and width in patches


@dataclass(frozen=True)
class MaskSpec:
    """The distribution of the masks, with the key names of I-JEPA's YAML and its ImageNet settings as defaults.

    Scales are fractions of the grid's area, aspect ratios are height / width; a context's is 1.
    `min_keep`: a context has more patches than this before the cut. It does not apply to targets (the published
    sampler applies it to them too, and never returns if they are not larger).
    Raises ValueError for settings that cannot be sampled, so that sampling never fails or loops forever.
    """

    height: int
    width: int
    enc_mask_scale: tuple[float, float] = (0.85, 1.0)
    pred_mask_scale: tuple[float, float] = (0.15, 0.2)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)
    num_enc_masks: int = 1
    num_pred_masks: int = 4
    min_keep: int = 10
    allow_overlap: bool = False
    mode: str = "reference"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        side = 2 if self.mode == "reference" else 1
        for name, low, high in (
            ("height", side, MAX_SIDE),
            ("width", side, MAX_SIDE),
            ("num_enc_masks", 1, MAX_BLOCKS),
            ("num_pred_masks", 1, MAX_BLOCKS),
            ("min_keep", 0, MAX_SIDE**2),
        ):
            _check_int(name, getattr(self, name), low, high)
        for name, limit in (("enc_mask_scale", 1.0), ("pred_mask_scale", 1.0), ("aspect_ratio", math.inf)):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= limit or math.isinf(pair[1]):
                bound = "low <= high" if math.isinf(limit) else f"low <= high <= {limit:g}"
                raise ValueError(f"{name} is {pair!r}; it must be two numbers (low, high) with 0 < {bound}")

        grid, scale = f"a grid of {self.height} x {self.width} patches", self.pred_mask_scale[0]
        flat, narrow = (_block_size(self, scale, aspect) for aspect in self.aspect_ratio)
        if flat[0] < 1 or narrow[1] < 1:
            raise ValueError(
                f"pred_mask_scale {self.pred_mask_scale} with aspect_ratio {self.aspect_ratio} allows "
                f"targets without a patch on {grid}; raise pred_mask_scale or move aspect_ratio closer to 1"
            )
        height, width = _block_size(self, self.enc_mask_scale[0], 1.0)
        if height * width <= self.min_keep:
            raise ValueError(
                f"min_keep is {self.min_keep}, but enc_mask_scale {self.enc_mask_scale} allows contexts of "
                f"{height} x {width} = {height * width} patches on {grid}, before targets are removed; "
                f"lower min_keep below {height * width}, or raise enc_mask_scale"
            )


class Masks(NamedTuple):
    """Patch indices, int64, on the CPU, ascending within a block."""

    context: Tensor  # [E, B, Kc]; packed: [lengths.sum()], concatenated in the order of lengths.flatten()
    target: Tensor  # [M, B, Kt]
    lengths: Tensor | None = None  # packed only: [E, B], the number of patches of each context


def sample_masks(
    spec: MaskSpec, *, seed: int, step: int, first: int, batch: int, cut: tuple[int, int] | None = None
) -> Masks:
    """Masks of images `first` .. `first + batch - 1` of the global batch of step `step`.

    seed, step: 0 .. 2^64 - 1. cut = (first, count): the range of the global batch whose shortest context sets
    Kc; the default is this batch. Ranks that all pass the global batch agree on Kc without communication: each
    also counts the patches of the other ranks' contexts. Packed masks are not cut and ignore it.
    Raises ValueError for arguments out of range and for a `cut` that does not contain the batch.
    """
    return _sample(torch.ops.jepa_masks.sample, spec, seed, step, first, batch, cut)


def sample_masks_ref(
    spec: MaskSpec, *, seed: int, step: int, first: int, batch: int, cut: tuple[int, int] | None = None
) -> Masks:
    """The specification of `sample_masks` in plain Python: bitwise equal, hundreds of times slower."""
    return _sample(_sample_ref, spec, seed, step, first, batch, cut)


def thin(masks: Masks, most: int, *, seed: int, step: int, first: int) -> Masks:
    """Limits packed masks to at most `most` context patches in total, for each of the E context masks.

    The excess is dropped at random from the patches of all images, but never an image's first. Depends only on
    (seed, step, first) and the masks. Raises ValueError if `most` is less than one patch per image.
    """
    assert masks.lengths is not None
    if most < masks.lengths.shape[1]:
        raise ValueError(f"most is {most}; it must be at least {masks.lengths.shape[1]}, one patch per image")
    parts, lengths = masks.context.split(masks.lengths.sum(1).tolist()), masks.lengths.clone()
    contexts = []
    for e, part in enumerate(parts):
        owner = torch.arange(lengths.shape[1]).repeat_interleave(lengths[e])
        words = np.random.Philox(key=[seed, step], counter=[0, first, e, THIN]).random_raw(len(part)) >> 1
        places = torch.from_numpy(words.astype(np.int64))
        places[lengths[e].cumsum(0) - lengths[e]] = -1
        kept = places.argsort(stable=True)[:most].sort().values
        contexts.append(part[kept])
        lengths[e] = owner[kept].bincount(minlength=lengths.shape[1])
    return Masks(torch.cat(contexts), masks.target, lengths)


def block_sizes(spec: MaskSpec, *, seed: int, step: int) -> tuple[Extent, Extent]:
    """(height, width) of a step's contexts and of its targets, in patches.

    k = int(HW s), h = round(sqrt(k a)), w = round(sqrt(k / a)), with scale s and aspect ratio a uniform in
    their ranges, clipped to the grid (`reference`: to the grid without its last row and column).
    """
    words = _words(seed, step, 0, BLOCK_SIZES)
    target, context, aspect = (next(words) / 2**32 for _ in range(3))
    if spec.mode == "reference":
        aspect = target  # one number for both, so larger blocks are taller

    def within(limits: tuple[float, float], r: float) -> float:
        return limits[0] + r * (limits[1] - limits[0])

    return (
        _block_size(spec, within(spec.enc_mask_scale, context), 1.0),
        _block_size(spec, within(spec.pred_mask_scale, target), within(spec.aspect_ratio, aspect)),
    )


def _block_size(spec: MaskSpec, scale: float, aspect: float) -> Extent:
    area = int(spec.height * spec.width * scale)
    margin = 1 if spec.mode == "reference" else 0  # a block is never as high or wide as the grid
    height = min(round(math.sqrt(area * aspect)), spec.height - margin)
    return height, min(round(math.sqrt(area / aspect)), spec.width - margin)


def _sample(
    op: Callable[..., tuple[Tensor, Tensor, Tensor]],
    spec: MaskSpec,
    seed: int,
    step: int,
    first: int,
    batch: int,
    cut: tuple[int, int] | None,
) -> Masks:
    _check_int("seed", seed, 0, 2**64 - 1)
    _check_int("step", step, 0, 2**64 - 1)
    _check_int("first", first, 0, MAX_IMAGES - 1)
    _check_int("batch", batch, 1, MAX_IMAGES - first)
    start, extent = cut or (first, batch)
    if not 0 <= start <= first or not first + batch <= start + extent <= MAX_IMAGES:
        raise ValueError(
            f"cut is images {start} .. {start + extent - 1} of the global batch; it must contain this batch, "
            f"{first} .. {first + batch - 1}, and lie in 0 .. 2^32 - 1: give cut=(0, global batch size)"
        )
    context, target, lengths = op(
        torch.tensor(block_sizes(spec, seed=seed, step=step), device="cpu"),
        spec.mode,
        spec.height,
        spec.width,
        spec.num_enc_masks,
        spec.num_pred_masks,
        spec.min_keep,
        spec.allow_overlap,
        *(n - 2**64 if n >= 2**63 else n for n in (seed, step)),  # the dispatcher's integers are signed
        first,
        batch,
        start,
        extent,
    )
    return Masks(context, target, lengths if spec.mode == "packed" else None)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be an int from {low} to {high}")


# --- specification, fallback without csrc, and reference of the tests


def _sample_ref(
    sizes: Tensor,
    mode: str,
    height: int,
    width: int,
    contexts: int,
    targets: int,
    min_keep: int,
    allow_overlap: bool,
    seed: int,
    step: int,
    first: int,
    batch: int,
    cut_first: int,
    cut_count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """sizes [2, 2]: (height, width) of contexts, of targets. Returns `Masks`, with the lengths before the cut."""
    context_size, target_size = sizes.tolist()
    last = 0 if mode == "reference" else 1  # reference excludes the last position in each direction

    def place(words: Iterator[int], size: Extent) -> list[int]:
        top = _below(next(words), height - size[0] + last)
        left = _below(next(words), width - size[1] + last)
        return [row * width + left + x for row in range(top, top + size[0]) for x in range(size[1])]

    def draw(image: int) -> tuple[list[list[int]], list[list[int]]]:
        words = _words(seed, step, image, PLACES)
        target = [place(words, target_size) for _ in range(targets)]
        return [draw_context(words, [] if allow_overlap else target) for _ in range(contexts)], target

    def draw_context(words: Iterator[int], target: list[list[int]]) -> list[int]:
        tries = 0
        while True:  # terminates: MaskSpec checked that the block alone is larger than min_keep
            hidden: set[int] = set().union(*target[: max(len(target) - tries // TRIES, 0)])
            kept = [patch for patch in place(words, context_size) if patch not in hidden]
            if len(kept) > min_keep:
                return kept
            tries += 1

    def shorten(words: Iterator[int], kept: list[int], length: int) -> list[int]:
        if mode == "reference":
            return kept[:length]
        chosen: list[int] = []  # selection sampling: Knuth, TAOCP volume 2, 3.4.2, algorithm S
        for seen, patch in enumerate(kept):
            if len(chosen) == length:
                break
            if _below(next(words), len(kept) - seen) < length - len(chosen):
                chosen.append(patch)
        return chosen

    drawn = {image: draw(image) for image in range(cut_first, cut_first + cut_count)}
    images = range(first, first + batch)
    lengths = sizes.new_tensor([[len(drawn[image][0][e]) for image in images] for e in range(contexts)])
    target = sizes.new_tensor([[drawn[image][1][m] for image in images] for m in range(targets)])
    if mode == "packed":
        flat = [patch for e in range(contexts) for image in images for patch in drawn[image][0][e]]
        return sizes.new_tensor(flat), target, lengths

    shortest = min(len(kept) for all_kept, _ in drawn.values() for kept in all_kept)
    cut = []
    for image in images:
        words = _words(seed, step, image, CUTS)
        cut.append([shorten(words, kept, shortest) for kept in drawn[image][0]])
    return sizes.new_tensor(cut).transpose(0, 1).contiguous(), target, lengths


def _words(seed: int, step: int, image: int, stream: int) -> Iterator[int]:
    """The random 32-bit words of one image (0 for the block sizes, which the whole step shares)."""
    low = 2**32 - 1
    key = (seed & low, seed >> 32 & low)
    for block in count():
        yield from philox4x32((4 * block + stream, image, step & low, step >> 32 & low), key)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: 128 random bits from a 128-bit counter and a 64-bit key."""
    low = 2**32 - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _below(word: int, n: int) -> int:
    return word * n >> 32


# --- registration; csrc adds the CPU kernel. `sizes` is a tensor because the dispatcher selects kernels by device
torch.library.define(
    "jepa_masks::sample",
    "(Tensor sizes, str mode, int height, int width, int contexts, int targets, int min_keep, "
    "bool allow_overlap, int seed, int step, int first, int batch, int cut_first, int cut_count) "
    "-> (Tensor context, Tensor target, Tensor lengths)",
)
torch.library.impl("jepa_masks::sample", "default", _sample_ref)
