"""Looks at every image of a source before a run does: what it is, whether it can be decoded, which are the same.

Processes of their own read, hash and decode whole images, as training would. One that an image kills is replaced and
the image named. What was seen is kept in a file, a line per image: an interrupted scan goes on, and a later one looks
only at what is new or has changed.
"""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .decode import Decoder, dali
from .encoded import LARGEST
from .sources import ImageSource, open_images

CHUNK = 16  # images that a process is given at once
SHOWN = 32  # pixels a side of the resized image, which is thrown away
SAID = 120  # characters of a reason
CRASHES = "decoding it ends the process that tries"

logger = logging.getLogger(__name__)


class Seen(NamedTuple):
    """What was found of one image."""

    stamp: str  # of the file when it was read: an image with the same name and stamp is not read again
    bytes: int
    digest: str  # of the encoded bytes
    format: str  # as Pillow names it, like `mode`; empty if it knows none
    mode: str
    width: int
    height: int
    fault: str  # why training cannot use it; empty if it can


class Findings(NamedTuple):
    """What was found of all. Images are named by their index in the source."""

    seen: list[Seen]
    unreadable: list[int]
    copies: dict[int, int]  # of each image whose bytes an earlier one has: the first that has them
    decoder: str  # what decoded them

    def usable(self) -> list[int]:
        """The images to train on: every content once, and none that cannot be decoded."""
        left_out = {*self.unreadable, *self.copies}
        return [i for i in range(len(self.seen)) if i not in left_out]


class Broken(RuntimeError):
    """Processes cannot be started, or end before they have looked at anything."""


def scan(source: ImageSource, kept: Path | None, workers: int, progress: Any = None) -> Findings:
    """Looks at all images of `source` with `workers` processes.

    `kept`: the file of what was seen, which is continued; None: nothing is kept. `progress`: has `update(n)`, as tqdm.
    Raises ValueError if the storage fails (`ImageSource.read`).
    """
    decoder = "DALI"
    try:
        dali()
    except (ValueError, ImportError, OSError, RuntimeError):  # missing, or broken
        decoder = "Pillow"
    names = [source.name(i) for i in range(len(source))]
    before = _read_kept(kept, decoder) if kept else {}
    known = _unchanged(source, names, before)
    seen: list[Seen | None] = [before[name] if is_known else None for name, is_known in zip(names, known, strict=True)]
    todo = [i for i, one in enumerate(seen) if one is None]
    if progress is not None:
        progress.update(len(names) - len(todo))
    keep = _Keeper(kept if todo else None, decoder)
    with keep, closing(_look_at(source, todo, workers, decoder == "DALI")) as looked:  # its processes end with it
        for i, found in looked:
            seen[i] = found
            keep.add(names[i], found)
            if progress is not None:
                progress.update(1)
    whole = [one for one in seen if one is not None]
    assert len(whole) == len(names)
    return Findings(whole, [i for i, one in enumerate(whole) if one.fault], _copies(whole), decoder)


def count(source: ImageSource, findings: Findings) -> dict[str, Any]:
    """What a person or a program wants to know of it, as JSON can hold it. Names are the source's."""
    seen = findings.seen
    good = [one for one in seen if not one.fault]
    sides = sorted(min(one.width, one.height) for one in good if one.width)
    labels = source.labels
    apart = [i for i, first in findings.copies.items() if labels is not None and labels[i] != labels[first]]
    return {
        "path": source.path,
        "images": len(seen),
        "classes": len(source.classes),
        "bytes": sum(one.bytes for one in seen),
        "formats": dict(Counter(one.format or "unknown" for one in good).most_common()),
        "modes": dict(Counter(one.mode or "unknown" for one in good).most_common()),
        "shorter side": [sides[0], sides[len(sides) // 2], sides[-1]] if sides else [],
        "unreadable": {source.name(i): seen[i].fault for i in findings.unreadable},
        "copies": {source.name(i): source.name(first) for i, first in findings.copies.items()},
        "copies in another class": [source.name(i) for i in apart],
        "usable": len(findings.usable()),
        "decoder": findings.decoder,
    }


_UNFIT = {*"\t\r\n"}  # in a name: they end it in a list


def write_list(path: Path, source: ImageSource, findings: Findings) -> list[str]:
    """Writes the usable images as a list that `open_images` reads, with their classes if they have any. Returns the
    names that a list cannot hold, which are left out.

    Raises ValueError if they are members of tars, if none is left, or if the list, opened again, is not what was
    written; OSError.
    """
    refuse_tars(source)
    wanted = [(i, os.path.join(os.getcwd(), source.name(i))) for i in findings.usable()]
    held = [(i, name) for i, name in wanted if not _UNFIT & {*name}]
    if not held:
        raise ValueError(f"--list: no image of {source.path} can be used; nothing was written")
    classes = None if source.labels is None else [source.classes[source.labels[i]] for i, _ in held]
    lines = (
        [name for _, name in held]
        if classes is None
        else [f"{n}\t{c}" for (_, n), c in zip(held, classes, strict=True)]
    )
    part = path.with_name(f"{path.name}.part.txt")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    again = open_images(part)
    labels = None if again.labels is None else [again.classes[label] for label in again.labels]
    if [again.name(i) for i in range(len(again))] != [name for _, name in held] or labels != classes:
        raise ValueError(f"--list: {part} does not open as the images that it lists; it is left for you to look at")
    part.replace(path)
    return [name for _, name in wanted if _UNFIT & {*name}]


def refuse_tars(source: ImageSource) -> None:
    """Raises ValueError for images that a list cannot name."""
    if source.members is not None:
        raise ValueError(
            f"--list: the images of {source.path} are members of tars, which a list cannot name. Training leaves out "
            "what it cannot read, up to data.max_bad_fraction; to leave out more, write tars without the members that "
            "--json names"
        )


def _copies(seen: Sequence[Seen]) -> dict[int, int]:
    first: dict[str, int] = {}
    copies = {}
    for i, one in enumerate(seen):
        if one.fault:
            continue
        earlier = first.setdefault(one.digest, i)
        if earlier != i:
            copies[i] = earlier
    return copies


# --- what was kept


class _Keeper:
    """Adds lines to the file of what was seen; begins it anew if another decoder filled it. A disk that takes no more
    is no reason to stop."""

    def __init__(self, kept: Path | None, decoder: str) -> None:
        self._kept, self._decoder = kept, decoder
        self._lines: TextIO | None = None

    def __enter__(self) -> None:
        if self._kept:
            is_new = _first_line(self._kept) != _head(self._decoder)
            try:
                self._kept.parent.mkdir(parents=True, exist_ok=True)
                self._lines = open(self._kept, "w" if is_new else "a", encoding="utf-8", buffering=1)
            except OSError as error:
                self._give_up(error)
            self._write(_head(self._decoder) if is_new else "\n")  # the last line may be half of one

    def add(self, name: str, seen: Seen) -> None:
        self._write(json.dumps([name, *seen]) + "\n")

    def _write(self, line: str) -> None:
        if self._lines:
            try:
                self._lines.write(line)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._lines = None
        logger.warning("%s: %s; after an interruption the scan will begin anew from there", self._kept, error.strerror)

    def __exit__(self, *_: object) -> None:
        if self._lines:
            self._lines.close()


def _head(decoder: str) -> str:
    return json.dumps({"scan": 1, "decoder": decoder}) + "\n"


def _first_line(kept: Path) -> str | None:
    try:
        with open(kept, encoding="utf-8", errors="replace") as lines:
            return lines.readline(1000)
    except OSError:
        return None


def _read_kept(kept: Path, decoder: str) -> dict[str, Seen]:
    if _first_line(kept) != _head(decoder):
        return {}
    found = {}
    with open(kept, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                name, *rest = json.loads(line)
                found[name] = Seen(*rest)
            except (ValueError, TypeError):
                continue  # the head, or a line that was not finished
    return found


def _unchanged(source: ImageSource, names: Sequence[str], before: dict[str, Seen]) -> list[bool]:
    def is_known(i: int) -> bool:
        one = before.get(names[i])
        return one is not None and one.stamp == _stamp(source, i) != ""

    if not before:
        return [False] * len(names)
    with ThreadPoolExecutor(16) as threads:  # on network file systems latency is the bottleneck
        return list(threads.map(is_known, range(len(names)), chunksize=256))


def _stamp(source: ImageSource, i: int) -> str:
    try:
        status = os.stat(source.files[source.file[i]])
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {source.offset[i]} {source.size[i]}"


# --- the processes


def _pool(workers: int, by_dali: bool) -> ProcessPoolExecutor:
    """Processes that are ready to look. Raises Broken."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_prepare, initargs=(by_dali,))
    try:
        _submit(pool, os.getpid).result()
    except BrokenProcessPool as error:
        raise Broken(
            "the processes that look at images end before they have begun; engine/doctor.py says why"
        ) from error
    return pool


def _submit(pool: ProcessPoolExecutor, work: Any, *arguments: Any) -> Future[Any]:
    """A process that this starts never sees Ctrl-C, which reaches the whole group: the first process ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(work, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _look_at(
    source: ImageSource, todo: Sequence[int], workers: int, by_dali: bool
) -> Generator[tuple[int, Seen], None, None]:
    """Yields what each image is, as it is known. Images that were in work when a process died are looked at alone."""
    chunks = deque(todo[start : start + CHUNK] for start in range(0, len(todo), CHUNK))
    while chunks:
        pool = _pool(min(workers, len(chunks)), by_dali)
        begun: dict[Future[list[Seen]], Sequence[int]] = {}
        died: list[Sequence[int]] = []
        try:
            while chunks or begun:
                while chunks and len(begun) < 2 * workers and not died:
                    chunk = chunks.popleft()
                    begun[_submit(pool, _look, _part(source, chunk))] = chunk
                for future in wait(begun, return_when=FIRST_COMPLETED).done:
                    chunk = begun.pop(future)
                    try:
                        yield from zip(chunk, future.result(), strict=True)
                    except BrokenProcessPool:
                        died.append(chunk)
                if died and not begun:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
        yield from _one_by_one(source, [i for chunk in died for i in chunk], by_dali)


def _one_by_one(source: ImageSource, images: Sequence[int], by_dali: bool) -> Iterator[tuple[int, Seen]]:
    pool = None
    try:
        for i in images:
            pool = pool or _pool(1, by_dali)
            future: Future[list[Seen]] = _submit(pool, _look, _part(source, [i]))
            try:
                yield i, future.result()[0]
            except BrokenProcessPool:
                pool.shutdown()
                pool = None
                yield i, Seen(_stamp(source, i), 0, "", "", "", 0, 0, CRASHES)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _part(source: ImageSource, indices: Sequence[int]) -> ImageSource:
    """These images with their own files alone: little to send to another process."""
    part = source.take(np.asarray(indices))
    used, file = np.unique(part.file, return_inverse=True)
    return replace(part, files=[part.files[k] for k in used], file=file)


_decoder: Decoder | None = None  # of a process that looks at images


def _prepare(by_dali: bool) -> None:
    global _decoder
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # native decoders complain there of what is reported anyway
    Image.MAX_IMAGE_PIXELS = None  # LARGEST instead
    _decoder = Decoder("cpu", "cpu", 1) if by_dali else None


def _look(part: ImageSource) -> list[Seen]:
    return [_look_at_one(part, i) for i in range(len(part))]


def _look_at_one(part: ImageSource, i: int) -> Seen:
    stamp = _stamp(part, i)
    try:
        data = part.read(i).tobytes()
    except OSError as error:
        return Seen(stamp, 0, "", "", "", 0, 0, _short(error.strerror or error))
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, mode, (width, height) = image.format or "", image.mode, image.size
        fault = f"its header claims {width} x {height} pixels" if width * height > LARGEST else ""
    except Exception as error:  # Pillow's plugins raise of every kind for damaged files
        kind, mode, width, height = "", "", 0, 0
        fault = "" if _decoder else _short(error)
    if not fault:
        try:
            if _decoder:
                _decoder([np.frombuffer(data, np.uint8)], SHOWN, _whole)
            else:
                _decode_by_pillow(data)
        except Exception as error:  # as above; DALI raises RuntimeError
            fault = _why(data, error)
    return Seen(stamp, len(data), digest, kind, mode, width, height, fault)


def _decode_by_pillow(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB")


def _why(data: bytes, error: Exception) -> str:
    """Pillow's reason, which is in words, if it has one; else the decoder's own."""
    try:
        _decode_by_pillow(data)
    except UnidentifiedImageError:
        return "not an image"
    except Exception as in_words:
        return _short(in_words)
    return f"DALI: {_short(error)}"


def _whole(sizes_B2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    box_B4 = np.concatenate([np.zeros_like(sizes_B2), sizes_B2], axis=1)
    return box_B4.astype(np.int32), box_B4.astype(np.float32)


def _short(reason: object) -> str:
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text if len(text) <= SAID else f"{text[:SAID]}..."
