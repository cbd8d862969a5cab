"""The input pipeline: shuffling, views of images, and batches of them made ahead of the step that needs them.

Order and views come from counter-based random numbers (Philox) keyed by (seed, epoch) and (seed, step), indexed by the
view and an image's position in the global batch. So which images and views a batch has depends neither on earlier
batches nor on the number of ranks: any step's batch can be reproduced alone, and resuming needs only the step number.
On when the pixels of a crop depend on its batch, see jepa.data.decode.

Legend: B images per micro-batch, V views of each, S pixels a side. Boxes are (top, left, height, width) in pixels.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .augment import COLOUR_WORDS, CROP_WORDS, FLIP, View, random_boxes, random_colour
from .decode import Crops, Decoder, Stack
from .sources import ImageSource
from .synthetic import SyntheticImages

ORDER, CROP, COLOUR = 1, 2, 4  # streams of random numbers; jepa.data.masks has 3
ENOUGH_BAD = 10  # bad files before their fraction is judged

logger = logging.getLogger(__name__)
A = TypeVar("A", bound=tuple[Any, ...])
T = TypeVar("T")


class Batch(NamedTuple):
    """`views`: one uint8 [B, S, S, 3] per view, RGB, on the loader's device. `files`: the images' names. `replaced`:
    how many of them replace a file that cannot be used. `indices`: where they are in the source."""

    views: list[Tensor]
    files: list[str]
    replaced: int = 0
    indices: Sequence[int] = ()

    @property
    def images(self) -> Tensor:
        """The first view."""
        return self.views[0]


def _random_words(seed: int, stream: int, index: int, first: int, number: int, view: int = 0) -> np.ndarray:
    """The uint64 words [first, first + number) of a stream. Each counter gives 4: `first` is a multiple of that."""
    return np.random.Philox(key=[seed, index], counter=[first // 4, 0, view, stream]).random_raw(number)


def usual_resize(crop: int) -> int:
    """What the shorter side is resized to before a centre crop: ImageNet evaluation's ratio, 256 / 224, or below 96
    pixels (CIFAR and the like, whose subjects fill the frame) the crop itself."""
    return crop if crop < 96 else round(crop * 256 / 224)


def centre_frame(sizes_B2: np.ndarray, crop: int, resize: int) -> tuple[np.ndarray, np.ndarray]:
    """What `Crops.frame` returns for a centre crop of images of these sizes."""
    whole_B4 = np.concatenate([np.zeros_like(sizes_B2), sizes_B2], axis=1).astype(np.int32)
    return whole_B4, centre_views(sizes_B2, crop, resize)


def centre_views(sizes_B2: np.ndarray, crop: int, resize: int) -> np.ndarray:
    """The box that torchvision's Resize(resize) and CenterCrop(crop) keep, in pixels of the original: [B, 4]."""
    resized_B2 = resize * sizes_B2 // sizes_B2.min(axis=1, keepdims=True)
    scale_B2 = sizes_B2 / resized_B2
    start_B2 = np.rint((resized_B2 - crop) / 2)
    return np.concatenate([start_B2 * scale_B2, crop * scale_B2], axis=1).astype(np.float32)


def _use_here(views: Sequence[Tensor]) -> None:
    """Tells torch's allocator that work on this thread's stream may still read them when they are freed."""
    for images in views:
        if images.is_cuda:
            images.record_stream(torch.cuda.current_stream(images.device))


class _Reader:
    """Reads files in several threads: on network file systems latency is the bottleneck."""

    def __init__(self, source: ImageSource | SyntheticImages, threads: int) -> None:
        self.source, self.threads = source, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="jepa-read")

    def __call__(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The images as the source has them. Raises OSError if one is missing, empty or truncated."""
        parts = [indices[k :: self.threads] for k in range(min(self.threads, len(indices)))]
        images = [np.empty(0, np.uint8)] * len(indices)
        for k, part in enumerate(self._pool.map(lambda part: [self.source.read(i) for i in part], parts)):
            images[k :: self.threads] = part
        return images


def _ahead(
    function: Callable[..., T], arguments: Iterator[A], depth: int, device: torch.device
) -> Iterator[tuple[A, T, float]]:
    """Yields each of `arguments` (`it`), function(*it) and the seconds waited, in order; up to `depth` are made ahead.

    Two threads, so that one reads files while the other decodes. Exceptions of `function` are raised here. When
    the caller stops, running calls finish and the others are cancelled.
    """
    # A new thread's current device is GPU 0, on which DALI would create a context for every rank.
    here = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    workers = ThreadPoolExecutor(2, thread_name_prefix="jepa-data", initializer=here)
    begun: deque[tuple[A, Future[T]]] = deque()
    try:
        while True:
            for given in islice(arguments, depth + 1 - len(begun)):
                begun.append((given, workers.submit(function, *given)))
            if not begun:
                return
            given, future = begun.popleft()
            asked = time.perf_counter()
            result = future.result()
            yield given, result, time.perf_counter() - asked
    finally:
        workers.shutdown(cancel_futures=True)


def _reason(error: OSError | RuntimeError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"damaged or not an image; DALI: {error}".rstrip(" :\n")


def _crops(view: View, uniform_BnK: np.ndarray) -> Crops:
    """n views of each of B images."""
    number = uniform_BnK.shape[1]
    uniform_NK = uniform_BnK.swapaxes(0, 1).reshape(-1, uniform_BnK.shape[2])

    def frame(sizes_B2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes_N2 = np.tile(sizes_B2, (number, 1))
        if view.scale is None:
            return centre_frame(sizes_N2, view.size, usual_resize(view.size))
        box_N4 = random_boxes(sizes_N2, uniform_NK, view.scale)
        return box_N4, (box_N4 * [0, 0, 1, 1]).astype(np.float32)

    flip_N = (uniform_NK[:, FLIP] < view.flip).astype(np.int32) if view.flip else None
    return Crops(view.size, frame, flip_N, random_colour(view, uniform_NK[:, CROP_WORDS:]) if view.colours else None)


class Loader:
    """The batches of one rank of a training run: views of image files, or of synthetic images (Stack).

    `views`: how each view of an image is made, one or more; `batch_size`: B, per micro-batch of this rank;
    `accumulation`: micro-batches per step; `seed` >= 0; `decoder`, `num_workers` (threads): see Decoder; `prefetch`:
    micro-batches to prepare ahead; `max_bad_fraction`: of the files seen.

    A file that cannot be read or decoded is named once, counted, and replaced in all views by the next good one in the
    epoch's order. This is decided anew for every step, regardless of earlier failures (half of a truncated file
    may decode), so that a replayed batch has the same images.
    Raises ValueError if there is no view or the source has fewer images than a step needs, and like Decoder.
    """

    def __init__(
        self,
        source: ImageSource | SyntheticImages,
        views: Sequence[View],
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        decoder: str = "auto",
        num_workers: int = 4,
        prefetch: int = 2,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.source, self.views = source, list(views)
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.rank, self.world_size = rank, world_size
        self.prefetch, self.max_bad_fraction = prefetch, max_bad_fraction
        self.global_batch_size = batch_size * accumulation * world_size
        self.steps_per_epoch = len(source) // self.global_batch_size
        if not self.views:
            raise ValueError("views: given none; wanted one View or more")
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"data: {source.path} has {len(source)} images, fewer than the {self.global_batch_size} of a "
                f"step ({batch_size} per rank x {accumulation} micro-batches x {world_size} ranks); wanted at "
                f"least as many: lower data.batch_size, or give more images (found: {source.found})"
            )
        self.wait_seconds = 0.0  # total time that the consumer of `batches` has waited
        self.bad: dict[int, str] = {}  # images that failed at least once, and why
        self._seen = np.zeros(len(source), bool)
        self._epoch_order = (-1, np.empty(0, np.int64))
        files = isinstance(source, ImageSource)
        self._decode = Decoder(decoder, device, num_workers) if files else Stack(device, num_workers)
        self._read = _Reader(source, self._decode.threads)

    def batch(self, step: int, micro: int = 0) -> Batch:
        """Micro-batch `micro` of the 0-based step `step`, which depends only on these, the seed and the rank.

        Raises ValueError if more than `max_bad_fraction` of the files seen so far are bad, or if the storage fails
        (`ImageSource.read`).
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        first = (micro * self.world_size + self.rank) * self.batch_size
        uniform_BVK = self.uniform(step, first)
        start = place * self.global_batch_size + first
        slots = range(start, start + self.batch_size)
        wanted = [int(i) for i in order[start : start + self.batch_size]]
        self._seen[wanted] = True
        # Images known to be bad are tried separately, so that the others are decoded only once.
        picks = [
            self._first_good(order, slot, uniform_VK) if index in self.bad else index
            for index, slot, uniform_VK in zip(wanted, slots, uniform_BVK, strict=True)
        ]
        try:
            views = self._make(picks, uniform_BVK)
        except (OSError, RuntimeError):
            picks = [self._first_good(order, slot, u_VK) for slot, u_VK in zip(slots, uniform_BVK, strict=True)]
            views = self._make(picks, uniform_BVK)
        _use_here(views)
        replaced = sum(pick != index for pick, index in zip(picks, wanted, strict=True))
        return Batch(views, [self.source.name(i) for i in picks], replaced, picks)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, Batch]]:
        """Yields (step, micro-batch, Batch) from step `start` up to, not including, `stop` (None: forever), prefetched.

        Abandoning or closing the iterator ends its threads. The time spent waiting is added to `wait_seconds`.
        """
        steps = count(start) if stop is None else range(start, stop)
        places = ((step, micro) for step in steps for micro in range(self.accumulation))
        for (step, micro), batch, waited in _ahead(self.batch, places, self.prefetch, self._decode.device):
            self.wait_seconds += waited
            _use_here(batch.views)
            yield step, micro, batch

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of all images."""
        kept, order = self._epoch_order  # one atomic read: two threads make batches
        if kept != epoch:
            order = np.argsort(_random_words(self.seed, ORDER, epoch, 0, len(self.source)))
            self._epoch_order = epoch, order
        return order

    def uniform(self, step: int, first: int) -> np.ndarray:
        """Random numbers in [0, 1) for a micro-batch whose first image is `first` of the step: [B, V, words]."""

        def of(view: int) -> np.ndarray:
            parts = [
                _random_words(self.seed, stream, step, first * number, self.batch_size * number, view)
                for stream, number in ((CROP, CROP_WORDS), (COLOUR, COLOUR_WORDS))
            ]
            return np.concatenate([(words >> 11).reshape(self.batch_size, -1) for words in parts], axis=1) * 2.0**-53

        return np.stack([of(view) for view in range(len(self.views))], axis=1)

    def _make(self, indices: Sequence[int], uniform_BVK: np.ndarray) -> list[Tensor]:
        """The views of these images, equal ones in one call."""
        wanted = {
            view: _crops(view, uniform_BVK[:, [v for v, other in enumerate(self.views) if other == view]])
            for view in self.views
        }
        made = self._decode.crops(self._read(indices), list(wanted.values()))
        rest = {view: iter(images.split(len(indices))) for view, images in zip(wanted, made, strict=True)}
        return [next(rest[view]) for view in self.views]

    def _first_good(self, order: np.ndarray, slot: int, uniform_VK: np.ndarray) -> int:
        """The first image from `slot` on in the epoch's order of which these views can be decoded."""
        for place in range(slot, slot + len(order)):
            index = int(order[place % len(order)])
            self._seen[index] = True
            try:
                self._make([index], uniform_VK[None])
                return index
            except (OSError, RuntimeError) as error:
                self._decode.raise_unless_bad(error, lambda: self._read([index]))  # noqa: B023 (called at once)
                self._note_bad(index, _reason(error))
        raise ValueError(f"data: none of the {len(order)} images of {self.source.path} can be decoded")

    def _note_bad(self, index: int, reason: str) -> None:
        if index in self.bad:
            return
        self.bad[index] = reason
        logger.warning("%s cannot be used (%s); the next good image replaces it", self.source.name(index), reason)
        bad, seen = len(self.bad), int(self._seen.sum())
        if bad >= ENOUGH_BAD and bad > self.max_bad_fraction * seen:
            first = "".join(f"\n  {self.source.name(i)}: {why}" for i, why in islice(self.bad.items(), 5))
            raise ValueError(
                f"data: {bad} of the {seen} images seen so far cannot be used, a larger fraction than "
                f"data.max_bad_fraction={self.max_bad_fraction}; remove them, or raise it. The first:{first}"
            )


def eval_batches(
    source: ImageSource,
    *,
    crop_size: int,
    batch_size: int,
    resize: int | None = None,
    indices: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    decoder: str = "auto",
    num_workers: int = 4,
) -> Iterator[tuple[Tensor, list[int]]]:
    """Images without augmentation: the shorter side resized to `resize` pixels, then a centre crop to `crop_size`.

    Yields (images uint8 [b, S, S, 3] on `device`, their b indices in the source), in the order of `indices` (default:
    all). b is batch_size, or less in the last batch or if files are bad: those are named and skipped. `resize` defaults
    to `usual_resize`.
    Raises ValueError if `resize` is smaller than `crop_size`, and like Decoder.
    """
    if resize is None:
        resize = usual_resize(crop_size)
    if resize < crop_size:
        raise ValueError(f"resize: given {resize}; wanted at least the crop size, {crop_size}")
    decode = Decoder(decoder, device, num_workers)
    read = _Reader(source, decode.threads)

    frame = partial(centre_frame, crop=crop_size, resize=resize)

    def is_good(index: int) -> bool:
        try:
            decode(read([index]), crop_size, frame)
            return True
        except (OSError, RuntimeError) as error:
            decode.raise_unless_bad(error, lambda: read([index]))
            logger.warning("%s cannot be used (%s); it is skipped", source.name(index), _reason(error))
            return False

    def load(chunk: list[int]) -> tuple[list[int], Tensor | None]:
        try:
            return chunk, decode(read(chunk), crop_size, frame)
        except (OSError, RuntimeError):
            good = [index for index in chunk if is_good(index)]
            return good, decode(read(good), crop_size, frame) if good else None

    wanted = list(range(len(source))) if indices is None else [int(i) for i in indices]
    chunks = ((wanted[i : i + batch_size],) for i in range(0, len(wanted), batch_size))
    for _, (good, images), _ in _ahead(load, chunks, 2, decode.device):
        if images is not None:
            _use_here([images])
            yield images, good
