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
import secrets
import tarfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
INDEX_FORMAT = 1
PAUSES = (0.2, 1.0, 5.0)  # seconds before each retry after a storage error
# errno of errors that are due to the image itself and recur on every read; None: it is empty or truncated.
ITS_OWN_FAULT = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSource:
    """N images. Image i is `size[i]` bytes (-1: to the end) at `offset[i]` of `files[file[i]]`.

    `members`: the images' names within their tars, or None. `labels`: int64 [N], indices into `classes`, or
    None.
    """

    path: str
    files: list[str]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    members: np.ndarray | None
    labels: np.ndarray | None
    classes: list[str]

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
        rows = self.file[indices], self.offset[indices], self.size[indices]
        return ImageSource(self.path, self.files, *rows, members, labels, self.classes)

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
        with open(self.files[self.file[i]], "rb") as file:  # np.fromfile mistakes a failed read for a short one
            file.seek(offset)
            data = np.frombuffer(bytearray(file.read(size)), np.uint8)
        if len(data) == 0:
            raise OSError("the file is empty")
        if size >= 0 and len(data) < size:
            raise OSError(f"the tar ends {size - len(data)} bytes early")
        return data


def open_images(path: str | os.PathLike[str]) -> ImageSource:
    """The images at `path`, which is one of

    - a folder: every image below it that is not hidden. The first-level sub-folders are the classes;
    - a folder without images but with .tar files, one .tar, or a pattern ("train-{000..146}.tar", "*.tar"):
      WebDataset shards. Classes are their .cls members or, without those, the first folder in the members'
      names. A shard's index is stored next to it (.index.npz) and rebuilt when its size or mtime changes;
    - a .txt file: one path per line, absolute or relative to the list's folder, optionally a tab and a class.

    Labels are indices into the sorted classes; if all are integers, they are sorted by value.
    Raises ValueError if `path` does not exist or has no images, or if a shard or list cannot be read.
    """
    path = os.path.expanduser(os.fspath(path))
    if os.path.isdir(path):
        names, shards = _walk(path)
        if names:
            tops = [name.partition(os.sep)[0] if os.sep in name else None for name in names]
            return _from_files(path, [os.path.join(path, name) for name in names], tops)
        if shards:
            return _from_tars(path, [os.path.join(path, name) for name in shards])
        _refuse(path, f"contains no image (looked for {' '.join(IMAGE_SUFFIXES)}) and no .tar, at any depth")
    if os.path.isfile(path):
        if path.endswith(".txt"):
            return _from_list(path)
        if path.endswith(".tar"):
            return _from_tars(path, [path])
        _refuse(path, "is neither a .txt list nor an uncompressed .tar")
    shards = [found for name in _expand_braces(path) for found in _expand_stars(name)]
    if not shards or shards == [path]:
        _refuse(path, "does not exist" if shards else "matches no file")
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        _refuse(path, f"names {len(missing)} shards that do not exist, for example {missing[0]}")
    return _from_tars(path, shards)


def _refuse(path: str, reason: str) -> NoReturn:
    raise ValueError(
        f"images: given {path!r}, which {reason}; "
        "wanted a folder of images, a .txt list of them, or WebDataset tars (one, a folder, a pattern)"
    )


def _walk(root: str) -> tuple[list[str], list[str]]:
    """The images and the tars below `root`, relative to it, folder by folder, each folder sorted."""

    def fail(error: OSError) -> NoReturn:
        raise ValueError(f"images: {error.filename} cannot be listed ({error.strerror})") from error

    images, shards = [], []
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        subfolders[:] = sorted(s for s in subfolders if s[0] != "." and not _leads_up(folder, s))
        prefix = os.path.relpath(folder, root) + os.sep if folder != root else ""
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if name[0] != "." and suffix in IMAGE_SUFFIXES:
                images.append(prefix + name)
            elif name[0] != "." and suffix == ".tar":
                shards.append(prefix + name)
    return images, shards


def _leads_up(folder: str, name: str) -> bool:
    """Whether `name` is a link to a folder that contains it, which a walk would follow forever."""
    path = os.path.join(folder, name)
    return os.path.islink(path) and (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(path) + os.sep)


def _number(classes: Sequence[str | None]) -> tuple[np.ndarray | None, list[str]]:
    """Labels and class names; no labels unless every image has a class."""
    if not classes or None in classes:
        return None, []
    distinct = {str(c) for c in classes}
    names = sorted(distinct, key=int if all(c.isdecimal() for c in distinct) else None)
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[str(c)] for c in classes]), names


def _from_files(path: str, files: list[str], classes: Sequence[str | None]) -> ImageSource:
    labels, names = _number(classes)
    zero, whole = np.broadcast_to(np.int64(0), len(files)), np.broadcast_to(np.int64(-1), len(files))
    return ImageSource(path, files, np.arange(len(files)), zero, whole, None, labels, names)


def _from_list(path: str) -> ImageSource:
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        entries = [line.rstrip("\r\n").partition("\t") for line in lines if line.strip()]
    if not entries:
        _refuse(path, "is an empty list")
    folder = os.path.dirname(os.path.abspath(path))
    classes = [label.strip() or None for _, _, label in entries]
    if None in classes and any(classes):
        line = classes.index(None)
        raise ValueError(f"images: {path} gives some images a class, but not {entries[line][0]!r}; wanted all or none")
    return _from_files(path, [os.path.join(folder, name) for name, _, _ in entries], classes)


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


def _from_tars(path: str, shards: list[str]) -> ImageSource:
    indices = [_index(shard) for shard in shards]
    unsaved = [shard for shard, (_, saved) in zip(shards, indices, strict=True) if not saved]
    if unsaved:
        logger.warning("the index of %d tars is kept in memory only: cannot write next to %s", len(unsaved), unsaved[0])
    columns = [columns for columns, _ in indices]
    members, offset, size, text = (np.concatenate([c[key] for c in columns]) for key in columns[0])
    if len(members) == 0:
        _refuse(path, f"contains no image (looked for {' '.join(IMAGE_SUFFIXES)})")
    file = np.repeat(np.arange(len(shards)), [len(c["members"]) for c in columns])
    if any(text):
        classes = [os.fsdecode(t) if t else None for t in text]
    else:
        classes = [os.fsdecode(m.partition(b"/")[0]) if b"/" in m else None for m in members]
    labels, names = _number(classes)
    return ImageSource(path, shards, file, offset, size, members, labels, names)


def _index(shard: str) -> tuple[dict[str, np.ndarray], bool]:
    """The index of one tar's images, and whether it is stored next to the tar."""
    status, path = os.stat(shard), shard + ".index.npz"
    key = np.array([INDEX_FORMAT, status.st_size, status.st_mtime_ns])
    try:
        with np.load(path) as stored:
            if np.array_equal(stored["key"], key):
                return {name: stored[name] for name in ("members", "offset", "size", "text")}, True
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # absent, incomplete, or not one of ours: rebuilt below
    columns = _scan(shard)
    part = f"{path}.{secrets.token_hex(4)}"
    try:
        with open(part, "xb") as file:
            np.savez(file, allow_pickle=False, key=key, **columns)
        os.replace(part, path)
    except OSError:
        if os.path.exists(part):
            os.remove(part)
        return columns, False
    return columns, True


def _scan(shard: str) -> dict[str, np.ndarray]:
    """Reads the headers and the .cls members of a tar; `text` is each image's class, or empty."""
    names: list[bytes] = []
    places: list[tuple[int, int]] = []
    classes: dict[bytes, bytes] = {}
    try:
        with tarfile.open(shard, "r:") as tar, open(shard, "rb") as data:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                name = os.path.normpath(member.name)
                hidden = os.path.basename(name).startswith(".")
                if member.isfile() and name.endswith(".cls"):
                    content = os.pread(data.fileno(), member.size, member.offset_data)
                    classes[_key(os.fsencode(name))] = content.strip()
                elif member.isfile() and not hidden and name.lower().endswith(IMAGE_SUFFIXES):
                    names.append(os.fsencode(name))
                    places.append((member.offset_data, member.size))
            rest = os.pread(data.fileno(), tarfile.BLOCKSIZE, tar.offset)
    except tarfile.TarError as error:
        raise ValueError(f"images: {shard} is not a complete, uncompressed tar ({error})") from error
    if rest.strip(b"\0"):
        raise ValueError(f"images: {shard} is damaged: there is no tar header at byte {tar.offset}")
    offset, size = np.array(places, np.int64).reshape(-1, 2).T
    text = [classes.get(_key(name), b"") for name in names]
    return {"members": np.array(names, "S"), "offset": offset, "size": size, "text": np.array(text, "S")}


def _key(name: bytes) -> bytes:
    """The key shared by the members of a WebDataset sample: the path up to the first dot of the file name."""
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.partition(b".")[0]
