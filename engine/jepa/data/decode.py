"""Images to uint8 pixels on the device. DALI decodes; it is imported here and nowhere else, when a Decoder is made.

As with torchvision's default loader, EXIF orientation is ignored: pixels are used as they are stored.

Decoded on CPU cores, an image's pixels depend on its file and its crop alone. The GPU's hardware JPEG decoder takes a
batch at once, and an image that it fails on can send its neighbours to another decoder, whose pixels differ slightly.
So there pixels may depend on the batch: `Config.decoder` is the CPU for runs that must be deterministic.
"""

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .apart import Apart
from .augment import Colour, recolour
from .encoded import prepare, require_plausible

Frame = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Crops(NamedTuple):
    """One crop or more of each of B images, all of one size: N = B times their number, the first of every image first.

    `frame` maps the images' heights and widths, int64 [B, 2], to the boxes to cut out, int32 [N, 4], and the part of
    each box to show, float32 [N, 4]; pixels outside the box do not bleed in. Boxes are (top, left, height, width) in
    pixels. `flip`: int32 [N], 1 for a horizontal flip. `colour`: what happens to colours afterwards.
    """

    size: int
    frame: Frame
    flip: np.ndarray | None = None
    colour: Colour | None = None


def dali() -> Any:
    """DALI's imperative mode. Raises ValueError that says how to install it if it cannot be found."""
    try:
        import nvidia.dali.experimental.dynamic as ndd
    except ModuleNotFoundError as error:
        extra = "engine-cu12" if (torch.version.cuda or "").startswith("12.") else "engine-cu13"
        raise ValueError(
            f"NVIDIA DALI, which decodes images on CPUs and GPUs, cannot be imported ({error}). Get it by "
            f'pip install --no-build-isolation -e ".[{extra}]"; to time or test a run without it, data.synthetic=10000'
        ) from error
    return ndd


class _Delivery:
    """Moves images to a device, on a stream of their own.

    `threads`: the maximum for preparing them, capped at the number of cores available to this process.
    """

    def __init__(self, device: torch.device | str, threads: int) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.threads = max(1, min(threads, len(os.sched_getaffinity(0))))
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _deliver(self, take: Callable[[], Tensor]) -> Tensor:
        """What `take` returns, on the device; from a GPU a copy, as DALI reuses its own memory without notice."""
        if self._stream is None:
            return take()
        with torch.cuda.stream(self._stream):
            images = take()
            images = images.clone() if images.is_cuda else images.pin_memory().to(self.device, non_blocking=True)
        self._stream.synchronize()  # blocks this thread, not the training step's stream
        return images

    def _recolour(self, images: Tensor, colour: Colour) -> None:
        """Changes the colours of what was delivered, where it was delivered."""
        with torch.cuda.stream(self._stream):  # of None: nothing
            recolour(images, colour)
        if self._stream:
            self._stream.synchronize()


def _nearest(images: Sequence[np.ndarray], box_N4: np.ndarray, size: int) -> Tensor:
    """The boxes of the images, resized to the nearest pixel: uint8 [N, size, size, 3]."""
    at_N2S = box_N4[:, :2, None] + box_N4[:, 2:, None] * (2 * np.arange(size) + 1) // (2 * size)
    rows_N, columns_N = at_N2S.transpose(1, 0, 2)
    pixels = [images[i % len(images)][rows_N[i]][:, columns_N[i]] for i in range(len(box_N4))]
    return torch.from_numpy(np.stack(pixels))


class Stack(_Delivery):
    """Delivers images that are pixels already, uint8 [size, size, 3] (jepa.data.synthetic.SyntheticImages).

    Like a Decoder's, but the first crop of an image is the whole of it, others are resized to the nearest pixel, and
    nothing is flipped or recoloured.
    """

    def crops(self, images: Sequence[np.ndarray], wanted: Sequence[Crops]) -> list[Tensor]:
        sizes = np.array([image.shape[:2] for image in images])
        boxes = [crops.frame(sizes)[0] for crops in wanted]
        boxes[0][: len(images)] = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        return [self._deliver(partial(_nearest, images, box, of.size)) for box, of in zip(boxes, wanted, strict=True)]

    def raise_unless_bad(self, error: OSError | RuntimeError, read: Callable[[], list[np.ndarray]]) -> None:
        """Re-raises `error`: no image is bad."""
        raise error


class Decoder(_Delivery):
    """Decodes images to one uint8 tensor, on CPU cores or on the GPU (JPEGs by its hardware decoder).

    `kind`: "auto" (the GPU, if `device` is one), "cpu" or "gpu". `options`: arguments of DALI's decoder. Concurrent
    calls decode one at a time. Raises ValueError if `kind` is "gpu" and `device` is not a GPU, and like `dali`.
    """

    def __init__(self, kind: str, device: torch.device | str, threads: int) -> None:
        super().__init__(device, threads)
        if kind not in ("auto", "cpu", "gpu") or (kind == "gpu" and self.device.type != "cuda"):
            raise ValueError(
                f"data.decoder: given {kind!r} for images on {self.device}; "
                "wanted auto, cpu or, when training on a GPU, gpu"
            )
        self._ndd = ndd = dali()
        self.on_gpu = self.device.type == "cuda" and kind != "cpu"
        self._lock = threading.Lock()
        self._apart = Apart()
        self.options: dict[str, Any] = {"device": "cpu"}
        if self.on_gpu:
            self._context = ndd.EvalContext(
                num_threads=self.threads, device_id=self.device.index, cuda_stream=self._stream
            )
            # All JPEGs on the hardware decoder: split between two by load, an image's pixels would depend on its place.
            self.options = {"device": "gpu", "hw_decoder_load": 1.0, "jpeg_fancy_upsampling": True}
            self.options["affine"] = False  # else all ranks of a machine would pin threads to the same cores
        else:
            with ndd.Device("cpu"):
                self._context = ndd.EvalContext(num_threads=self.threads)

    def __call__(self, encoded: Sequence[np.ndarray], size: int, frame: Frame) -> Tensor:
        """Decodes B images and resizes a part of each: uint8 [B, size, size, 3]. Otherwise as `crops`."""
        (images,) = self.crops(encoded, [Crops(size, frame)])
        return images

    def crops(self, encoded: Sequence[np.ndarray], wanted: Sequence[Crops]) -> list[Tensor]:
        """Decodes B images and resizes parts of each, antialiased bilinear: uint8 [N, size, size, 3] for each `wanted`.

        An image is decoded once, as far as all its boxes need. Raises RuntimeError if any image cannot be decoded, and
        OSError if any is of no known format or claims more than it can hold.
        """
        ndd, encoded = self._ndd, [prepare(image, self._apart) for image in encoded]
        with self._lock, ndd.EvalMode.sync_cpu, self._context:
            batch = ndd.as_batch(encoded)
            sizes_B2 = np.asarray(ndd.as_tensor(ndd.peek_image_shape(batch, adjust_orientation=False)))[:, :2]
            require_plausible(encoded, sizes_B2)
            frames = [crops.frame(sizes_B2) for crops in wanted]
            boxes_CB4 = np.concatenate([box_N4 for box_N4, _ in frames]).reshape(-1, len(encoded), 4)
            start_B2 = boxes_CB4[..., :2].min(axis=0)
            pixels = ndd.decoders.image_slice(
                batch,
                start=ndd.as_batch(start_B2),
                shape=ndd.as_batch((boxes_CB4[..., :2] + boxes_CB4[..., 2:]).max(axis=0) - start_B2),
                axes=[0, 1],
                adjust_orientation=False,
                **self.options,
            )
            made = []
            for crops, (box_N4, view_N4) in zip(wanted, frames, strict=True):
                part = pixels
                if len(boxes_CB4) > 1:
                    number = len(box_N4) // len(encoded)
                    part = ndd.slice(
                        ndd.as_batch(list(pixels.tensors) * number),
                        start=ndd.as_batch(box_N4[:, :2] - np.tile(start_B2, (number, 1))),
                        shape=ndd.as_batch(box_N4[:, 2:].copy()),
                        axes=[0, 1],
                    )
                part = ndd.resize(
                    part,
                    size=[crops.size, crops.size],
                    roi_start=ndd.as_batch(view_N4[:, :2].copy()),
                    roi_end=ndd.as_batch(view_N4[:, :2] + view_N4[:, 2:]),
                    antialias=True,
                )
                if crops.flip is not None:
                    part = ndd.flip(part, horizontal=ndd.as_batch(crops.flip))
                made.append(self._deliver(ndd.as_tensor(part).torch))
        for images, crops in zip(made, wanted, strict=True):
            if crops.colour:
                self._recolour(images, crops.colour)
        return made

    def raise_unless_bad(self, error: OSError | RuntimeError, read: Callable[[], list[np.ndarray]]) -> None:
        """Re-raises `error` if it is the GPU's fault: the CPU can decode the image."""
        ndd = self._ndd
        if isinstance(error, RuntimeError) and self.on_gpu:
            try:
                encoded = [prepare(image, self._apart) for image in read()]
                with ndd.EvalMode.sync_cpu:
                    ndd.as_tensor(ndd.decoders.image(ndd.as_batch(encoded), device="cpu"))
            except (OSError, RuntimeError):
                return
            raise error
