"""Images decoded by Pillow in a process of its own, one at a time: for formats with which DALI's decoders fail.

Native decoders of JPEG 2000 read beyond the end of files that are cut short, and crash. Here a crash, a hang or too
much memory costs one image: the process is replaced. This file is both the caller and, run as a program, the process.
"""

import io
import struct
import subprocess
import sys
import threading
from typing import IO, Any

import numpy as np

SECONDS = 60.0  # for one image
MEMORY = 4 << 30  # bytes of address space: four of the largest images
FORMATS = ["JPEG2000", "TIFF"]
READY = b"ready\n"
ANSWER = struct.Struct("<qqq")  # height, width, 0; or 0, 0 and the length of what went wrong


class Apart:
    """The process starts with the first image and ends with this object."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, encoded: np.ndarray) -> np.ndarray:
        """uint8 [bytes] to uint8 [H, W, 3]. Raises OSError if the image is bad, ValueError without Pillow."""
        with self._lock:
            process = self._start()
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            try:
                return _ask(process, encoded)
            except (BrokenPipeError, EOFError):
                self._process = None
                process.kill()
                code = process.wait()
                raise OSError(f"its decoder ended, by exit code {code}") from None
            finally:
                timer.cancel()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            # A session of its own: signals to the run do not end it, the closed pipe does.
            words = [sys.executable, "-P", __file__]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
            self._process = subprocess.Popen(words, **pipes)
            if self._process.stdout.read(len(READY)) != READY:  # type: ignore[union-attr]
                self._process = None
                raise ValueError("images: some are decoded by Pillow, which cannot be imported: pip install pillow")
        return self._process


def _ask(process: subprocess.Popen[bytes], encoded: np.ndarray) -> np.ndarray:
    request, answer = process.stdin, process.stdout
    assert request is not None and answer is not None
    request.write(struct.pack("<q", len(encoded)) + encoded.tobytes())
    request.flush()
    height, width, length = ANSWER.unpack(_exactly(answer, ANSWER.size))
    if length:
        raise OSError(f"damaged; Pillow: {_exactly(answer, length).decode(errors='replace')}")
    return np.frombuffer(bytearray(_exactly(answer, height * width * 3)), np.uint8).reshape(height, width, 3)


def _exactly(file: IO[bytes], number: int) -> bytes:
    data = file.read(number)
    if len(data) < number:
        raise EOFError
    return data


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Decodes what is asked for until there is no more."""
    import resource
    import warnings

    from PIL import Image

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")  # of large images; the largest are an error
    answers.write(READY)
    answers.flush()
    while header := requests.read(8):
        try:
            file = io.BytesIO(requests.read(*struct.unpack("<q", header)))
            image: Image.Image = Image.open(file, formats=FORMATS)
            image.load()
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            pixels = image.convert("RGB")
            answers.write(ANSWER.pack(pixels.height, pixels.width, 0) + pixels.tobytes())
        except Exception as error:  # whatever is wrong with an image, the next one may be good
            text = f"{type(error).__name__}: {error}"[:500].encode()
            answers.write(ANSWER.pack(0, 0, len(text)) + text)
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
