"""Picture files as Pillow reads them. A damaged one is an error that names it, whatever Pillow raised."""

import struct
from pathlib import Path

from PIL import Image

# What Pillow raises for damaged files.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, struct.error, Image.DecompressionBombError)


def open_picture(path: Path) -> Image.Image:
    """The whole picture, in its own mode. Raises ValueError if it is missing or damaged."""
    try:
        picture = Image.open(path)
        picture.load()
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return picture
