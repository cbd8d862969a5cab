"""Encoded images as a native decoder may have them: of a known format, claiming no more than they can hold.

What DALI's decoders get wrong is turned into what they get right: a PNM, whose largest value they ignore unless it is
255 or 65535; JPEG 2000, on which they crash; a TIFF of grey and alpha, of which they make a colour.
"""

import re
import struct
from collections.abc import Callable, Sequence

import numpy as np

LARGEST = 178_956_970  # pixels of an image: Pillow's bound, and so that of torchvision's loaders
JPEG_2000 = "JPEG 2000"
SAMPLES_PER_PIXEL, SAMPLE_FORMAT = 277, 339  # tags of TIFF
FLOATS = 3  # a sample format
STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", JPEG_2000),
    (b"\xff\x4f\xff\x51", JPEG_2000),
    *((b"P%d" % number, "PNM") for number in range(1, 7)),
)
# Pixels that a byte can stand for at most. JPEG: a block of 64 takes a bit. PNG: deflate packs 1032 bytes of 8 pixels
# into one. BMP: run lengths, 255 pixels in two bytes. WebP and TIFF have codings without a bound.
PIXELS_PER_BYTE = {"JPEG": 512, "PNG": 1032 * 8, "BMP": 128, "PNM": 8}

_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM = re.compile(rb"P([2356])" + 3 * (_GAP + rb"(\d{1,9})") + rb"(?:#[^\r\n]*)?\s")
_HEADER = 1 << 16  # bytes of a PNM in which its header must end


def kind_of(encoded: np.ndarray) -> str:
    """The format of an image, uint8 [bytes]. Raises OSError if it is none of those that are decoded."""
    start = encoded[:16].tobytes()
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WebP"
    for known, kind in STARTS:
        if start.startswith(known):
            return kind
    raise OSError(f"not an image of a known format: it begins with {start!r}")


def prepare(encoded: np.ndarray, apart: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The image as DALI may have it, uint8 [bytes]: itself, or the same pixels as a PNM of 8 bits.

    `apart` decodes what DALI cannot to uint8 [H, W, 3] (jepa.data.apart). Raises OSError if the image is bad.
    """
    kind = kind_of(encoded)
    if kind == "PNM":
        return _prepare_pnm(encoded)
    if kind == "TIFF" and _tag(encoded, SAMPLE_FORMAT) == FLOATS:
        raise OSError("a TIFF of floating-point numbers, which does not say what is white; wanted 8 or 16 bits")
    if kind == JPEG_2000 or (kind == "TIFF" and _tag(encoded, SAMPLES_PER_PIXEL) == 2):
        return _pnm(apart(encoded))
    return encoded


def require_plausible(encoded: Sequence[np.ndarray], sizes_B2: np.ndarray) -> None:
    """Raises OSError if an image claims a height and width, in pixels, that it cannot hold or nobody should decode."""
    for image, (height, width) in zip(encoded, sizes_B2.tolist(), strict=True):
        most = min(LARGEST, len(image) * PIXELS_PER_BYTE.get(kind_of(image), LARGEST))
        if not 0 < height * width <= most:
            raise OSError(_claim(width, height, f"its {len(image)} bytes hold at most {most}, of any image"))


def _claim(width: int, height: int, reason: str) -> str:
    return f"its header claims {width} x {height} pixels; {reason}"


def _tag(encoded: np.ndarray, wanted: int) -> int:
    """A number about the first image in a TIFF; 1 if it does not say, or in a BigTIFF."""
    tiff = encoded.data
    order = "<" if tiff[0] == ord("I") else ">"
    try:
        version, first = struct.unpack_from(f"{order}HI", tiff, 2)
        (entries,) = struct.unpack_from(f"{order}H", tiff, first) if version == 42 else (0,)
        for entry in range(entries):
            at = first + 2 + 12 * entry
            tag, _, values = struct.unpack_from(f"{order}HHI", tiff, at)
            if tag == wanted:  # the first of its values, which are elsewhere if there are more than two
                (at,) = struct.unpack_from(f"{order}I", tiff, at + 8) if values > 2 else (at + 8,)
                return int(struct.unpack_from(f"{order}H", tiff, at)[0])
    except struct.error:
        pass  # beyond the end: the decoder will say so
    return 1


def _pnm(pixels: np.ndarray) -> np.ndarray:
    """Pixels, uint8 [H, W, 1 or 3], as a PNM."""
    height, width, channels = pixels.shape
    header = b"P%d %d %d 255\n" % (5 if channels == 1 else 6, width, height)
    return np.concatenate([np.frombuffer(header, np.uint8), pixels.reshape(-1)])


def _prepare_pnm(encoded: np.ndarray) -> np.ndarray:
    if encoded[1:2].tobytes() in b"14":  # bits: there is no largest value
        return encoded
    match = _PNM.match(encoded[:_HEADER].tobytes())
    if match is None:
        raise OSError("a PNM without a proper header")
    kind, width, height, largest = (int(number) for number in match.groups())
    if not 0 < largest < 65536:
        raise OSError(f"a PNM whose largest value is {largest}; wanted 1 to 65535")
    channels = 3 if kind in (3, 6) else 1
    body, values = encoded[match.end() :], width * height * channels
    each = 2 if kind < 4 or largest > 255 else 1  # bytes: of a digit and a blank, or of a number
    if not 0 < width * height <= LARGEST or values * each > len(body) + (kind < 4):
        raise OSError(_claim(width, height, f"{len(body)} bytes follow"))
    if kind > 4:
        levels = np.frombuffer(body.data, ">u2" if each == 2 else np.uint8, values)
    else:
        text = re.sub(rb"#[^\r\n]*", b"", body.tobytes())
        levels = np.fromstring(text, np.int64, sep=" ") if re.fullmatch(rb"[\d\s]*", text) else np.empty(0, np.int64)
        if len(levels) < values:
            raise OSError(_claim(width, height, f"{len(levels)} of {values} numbers follow"))
        levels = levels[:values]
    if largest != 255:
        levels = (np.minimum(levels, largest).astype(np.uint32) * 255 + largest // 2) // largest
    return _pnm(levels.astype(np.uint8).reshape(height, width, channels))
