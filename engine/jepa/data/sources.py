"""The image sources of a run: a folder tree, a file list, or WebDataset tars.

Each becomes one list of (file, offset, size) in a fixed order (by name, or as listed), so that image i is the same
bytes on every rank and after every restart. Nothing is decoded here.
"""

import errno
import glob
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np

from .folders import find_files
from .found import IMAGE_SUFFIXES, Found
from .lists import read_list
from .tars import choose, index_of

LARGEST = 2**29  # bytes of an encoded image
PAUSES = (0.2, 1.0, 5.0)  # seconds before each retry after a storage error
# errno of errors that are due to the image itself and recur on every read; None: it is empty or truncated.
ITS_OWN_FAULT = (
    *(None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENXIO, errno.ENODEV),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSource:
    """N images. Image i is `size[i]` bytes (-1: to the end) at `offset[i]` of `files[file[i]]`.

    `members`: the images' names within their tars, or None. `labels`: int64 [N], indices into `classes`, or None.
    `found`: what else lay there, and why it was left out.
    """

    path: str
    files: list[str]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    members: np.ndarray | None
    labels: np.ndarray | None
    classes: list[str]
    found: Found

    def __len__(self) -> int:
        return len(self.file)

    def name(self, i: int) -> str:
        """The file of image i; for a tar, the tar and the member."""
        file = self.files[self.file[i]]
        return file if self.members is None else f"{file}/{os.fsdecode(self.members[i])}"

    def take(self, indices: np.ndarray) -> "ImageSource":
        """The images with these indices alone, in this order; `classes` stay as they are."""
        members = None if self.members is None else self.members[indices]
        labels = None if self.labels is None else self.labels[indices]
        file, files = self.file[indices], self.files
        if members is None:  # only the files of these images, whose names are the fingerprint
            file, files = np.arange(len(file)), [files[i] for i in file]
        place = self.offset[indices], self.size[indices]
        return ImageSource(self.path, files, file, *place, members, labels, self.classes, self.found)

    @cached_property
    def fingerprint(self) -> dict[str, int | str]:
        """Must be the same on all ranks and after every restart: the number of images, and a digest of their names in
        order, relative to their common folder, and in tars of their positions. No file is read.
        """
        digest, ends = hashlib.sha256(), (min(self.files), max(self.files))
        shared = len(os.path.commonpath([os.path.dirname(name) for name in ends]))
        for first in range(0, len(self.files), 1 << 16):
            names = "\0".join(name[shared:] for name in self.files[first : first + (1 << 16)])
            digest.update(os.fsencode(names + "\0"))
        for column in () if self.members is None else (self.members, self.file, self.offset, self.size):
            digest.update(column.tobytes())
        return {"images": len(self), "list of images": digest.hexdigest()[:16]}

    @cached_property
    def contents(self) -> str:
        """A digest of the files' sizes and times of change: other images under the same names are other images."""
        digest = hashlib.sha256(self.file.tobytes())
        for file in self.files:
            try:
                status = os.stat(file)
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(b"missing\n")
        return digest.hexdigest()[:16]

    def read(self, i: int) -> np.ndarray:
        """The encoded bytes of image i, uint8.

        Raises OSError if the image is missing, empty or truncated, and ValueError if the image is not to blame: the
        disk, the network or this process fails, and retries do not help.
        """
        for pause in (*PAUSES, None):
            try:
                return self._read(i)
            except OSError as error:
                if error.errno in ITS_OWN_FAULT:
                    raise
                if pause is None:
                    raise ValueError(
                        f"images: {self.name(i)} cannot be read: {error}, {len(PAUSES) + 1} times in {sum(PAUSES)} s. "
                        "The image is not at fault: check the storage and this machine"
                    ) from error
                logger.warning("%s: %s; retrying in %s s", self.name(i), error, pause)
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _read(self, i: int) -> np.ndarray:
        size, offset = int(self.size[i]), int(self.offset[i])
        # np.fromfile mistakes a failed read for a short one.
        with open(self.files[self.file[i]], "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            if (encoded := status.st_size if size < 0 else size) > LARGEST:
                raise OSError(f"{encoded} bytes; no image of more than {LARGEST} is read")
            file.seek(offset)
            data = np.frombuffer(bytearray(file.read(size)), np.uint8)
        if len(data) == 0:
            raise OSError("the file is empty")
        if size >= 0 and len(data) < size:
            raise OSError(f"the tar ends {size - len(data)} bytes early")
        return data


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # for the writer of a named pipe


def open_images(path: str | os.PathLike[str], suffixes: Sequence[str] | None = None) -> ImageSource:
    """The images at `path`, which is one of

    - a folder: every image below it that is not hidden. The first-level sub-folders are the classes;
    - a folder without images but with .tar files, one .tar, or a pattern ("train-{000..146}.tar", "*.tar"):
      WebDataset shards. Classes are their .cls members or, without those, the first folder in the members'
      names. A shard's index is stored next to it (.index.npz) and rebuilt when its size or mtime changes;
    - a .txt file: one path per line, absolute or relative to the list's folder, optionally a tab and a class.

    `suffixes`: how the names of images end, in lower case; None: IMAGE_SUFFIXES, or in a list any. Of several images of
    a tar's sample, see `tars.choose`. The source's `found` says what was left out.
    Labels are indices into the sorted classes; if all are integers, they are sorted by value.
    Raises Nowhere if nothing is at `path`, and ValueError if there is no image, or if a shard or list cannot be read.
    """
    path, chosen = os.path.expanduser(os.fspath(path)), tuple(suffixes) if suffixes else None
    if os.path.isdir(path):
        return _from_folder(path, chosen)
    if os.path.isfile(path):
        if path.endswith(".txt"):
            files, classes, found = read_list(path, chosen)
            if not files:
                _refuse(path, f"lists no image ({found})")
            return _from_files(path, files, classes, found)
        if path.lower().endswith(".tar"):
            return _from_tars(path, [path], chosen, Found())
        _refuse(path, "is neither a .txt list nor an uncompressed .tar")
    if os.path.exists(path):
        _refuse(path, "is neither a file nor a folder")
    shards = [found for name in _expand_braces(path) for found in _expand_stars(name)]
    if os.path.islink(path):
        _refuse(path, f"is a link to {os.readlink(path)!r}, where nothing is", Nowhere)
    if not shards or shards == [path]:
        _refuse(path, "does not exist" if shards else "matches no file", Nowhere)
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        _refuse(path, f"names {len(missing)} shards that are no files, for example {missing[0]}")
    return _from_tars(path, shards, chosen, Found())


class Nowhere(ValueError):
    """There is nothing at the path of the images."""


def _refuse(path: str, reason: str, kind: type[ValueError] = ValueError) -> NoReturn:
    raise kind(
        f"images: given {path!r}, which {reason}; "
        "wanted a folder of images, a .txt list of them, or WebDataset tars (one, a folder, a pattern)"
    )


def _looked_for(suffixes: tuple[str, ...] | None) -> str:
    return f"looked for {' '.join(suffixes or IMAGE_SUFFIXES)}"


def _from_folder(path: str, suffixes: tuple[str, ...] | None) -> ImageSource:
    names, shards, found = find_files(path, suffixes or IMAGE_SUFFIXES)
    if names:
        if shards:
            pattern = os.path.join(path, os.path.dirname(shards[0]), "*.tar")
            found.leave(f".tar beside images (if you want their images, give {pattern})", shards[0], len(shards))
        tops = [name.partition(os.sep)[0] if os.sep in name else None for name in names]
        return _from_files(path, [os.path.join(path, name) for name in names], tops, found)
    if shards:
        return _from_tars(path, [os.path.join(path, name) for name in shards], suffixes, found)
    _refuse(path, f"contains no image ({_looked_for(suffixes)}) and no .tar, at any depth ({found})")


def _number(classes: Sequence[str | None]) -> tuple[np.ndarray | None, list[str]]:
    """Labels and class names; no labels unless every image has a class."""
    if not classes or None in classes:
        return None, []
    distinct = {str(c) for c in classes}
    names = sorted(distinct, key=int if all(c.isdecimal() for c in distinct) else None)
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[str(c)] for c in classes]), names


def _from_files(path: str, files: list[str], classes: Sequence[str | None], found: Found) -> ImageSource:
    labels, names = _number(classes)
    zero, whole = np.broadcast_to(np.int64(0), len(files)), np.broadcast_to(np.int64(-1), len(files))
    return ImageSource(path, files, np.arange(len(files)), zero, whole, None, labels, names, found)


def _expand_braces(pattern: str) -> list[str]:
    """ "a-{08..10}.tar" -> a-08.tar a-09.tar a-10.tar; "{a,b}.tar" -> a.tar b.tar."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    if match[3] is None:
        values = [str(i).zfill(len(match[1])) for i in range(int(match[1]), int(match[2]) + 1)]
    else:
        values = match[3].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [expanded for value in values for expanded in _expand_braces(head + value + tail)]


def _expand_stars(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]


def _from_tars(path: str, shards: list[str], suffixes: tuple[str, ...] | None, found: Found) -> ImageSource:
    once: dict[str, str] = {}  # by where they really are
    for shard in shards:
        if once.setdefault(real := os.path.realpath(shard), shard) is not shard:
            found.leave("tar given again", f"{shard}, which is {once[real]}")
    unsaved, parts = [], []
    for shard in once.values():
        index, saved = index_of(shard)
        parts.append(choose(index, suffixes, found, shard))
        unsaved += [] if saved else [shard]
    if unsaved:
        logger.warning("the index of %d tars is kept in memory only: cannot write next to %s", len(unsaved), unsaved[0])
    members, offset, size, text = (np.concatenate(column) for column in zip(*parts, strict=True))
    if len(members) == 0:
        _refuse(path, f"contains no image ({_looked_for(suffixes)}; {found})")
    file = np.repeat(np.arange(len(parts)), [len(part.names) for part in parts])
    if any(text):
        classes = [os.fsdecode(t) if t else None for t in text]
    else:
        classes = [os.fsdecode(m.partition(b"/")[0]) if b"/" in m else None for m in members]
    labels, names = _number(classes)
    return ImageSource(path, list(once.values()), file, offset, size, members, labels, names, found)
