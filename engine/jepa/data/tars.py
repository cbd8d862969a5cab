"""Tars of images: which files they hold and where, in an index that is stored beside each (.index.npz).

As in WebDataset, files of one tar whose names agree up to the first dot are one sample: `a/1.jpg`, `a/1.seg.png` and
`a/1.cls` have the key `a/1` and the extensions `.jpg`, `.seg.png`, `.cls`. Nothing is unpacked: an image is a range of
the tar's bytes, and a link is the range of the file that it leads to.
"""

import os
import secrets
import tarfile
import zipfile
from array import array
from collections.abc import Sequence
from typing import IO, NamedTuple, NoReturn

import numpy as np

from .found import IMAGE_SUFFIXES, Found, suffix_of

INDEX_FORMAT = 2
CLASS = ".cls"
LONGEST_CLASS = 4096  # bytes
MOST_LINKS = 40  # from one to the next, as in Linux
CHUNK = 1 << 20
# Why a member is no image, `Index.state`; 0: it is a file.
STATES = (
    "",
    "hidden",
    "link that leads to no file of the tar",
    "sparse file, which only unpacking restores",
    "named pipe or device",
    "member of unknown type",
    "file replaced by a later one of the same name",
)
HIDDEN, LINK, SPARSE, SPECIAL, UNKNOWN, REPLACED = range(1, len(STATES))


class Index(NamedTuple):
    """The F members of one tar, folders aside, in its order, of S samples, with E different extensions.

    A member's name is `keys[sample] + extensions[extension]`, and its bytes are `size` at `offset`.
    """

    sample: np.ndarray  # int64 [F]
    extension: np.ndarray  # int64 [F]
    offset: np.ndarray  # int64 [F]
    size: np.ndarray  # int64 [F]
    state: np.ndarray  # int8 [F]
    keys: np.ndarray  # bytes [S]
    classes: np.ndarray  # bytes [S], what is in the sample's .cls
    extensions: np.ndarray  # bytes [E]

    def names(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """bytes [rows]."""
        names = np.char.add(self.keys[self.sample[rows]], self.extensions[self.extension[rows]])
        return names.astype(f"S{max(1, np.char.str_len(names).max(initial=0))}")


class Members(NamedTuple):
    """Images of a tar: bytes, int64, int64 and bytes, all [N]. `classes`: what is in the .cls, or empty."""

    names: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    classes: np.ndarray


def choose(index: Index, suffixes: tuple[str, ...] | None, found: Found, shard: str) -> Members:
    """The images of a tar that end in one of `suffixes`, at first those of which this is the whole extension.

    Of a sample with several, those of the first suffix that it has; without `suffixes` (all kinds of images, in the
    order of IMAGE_SUFFIXES) only the first of these. `found` is told of all members.
    """
    order = suffixes or IMAGE_SUFFIXES
    ranks = np.array([_rank(os.fsdecode(e).lower(), order) for e in index.extensions], np.int64)
    worst = 2 * len(order)
    rank = ranks[index.extension]
    image, file = rank < worst, index.state == 0
    rows = np.flatnonzero(image & file)

    best = np.full(len(index.keys), worst)
    np.minimum.at(best, index.sample[rows], rank[rows])
    taken = rows[rank[rows] == best[index.sample[rows]]]
    if suffixes is None:
        taken = taken[np.sort(np.unique(index.sample[taken], return_index=True)[1])]

    others = np.setdiff1d(rows, taken, assume_unique=True)
    if len(others):
        found.leave("other images of a sample", _name(shard, index, others[0]), len(others))
    for state, reason in enumerate(STATES[1:], 1):
        lost = np.flatnonzero(image & (index.state == state))
        if len(lost):
            found.leave(reason, _name(shard, index, lost[0]), len(lost))
    suffix = [suffix_of("x" + os.fsdecode(e)) for e in index.extensions]
    for counts, chosen in ((found.taken, taken), (found.others, np.flatnonzero(~image & file))):
        for e, number in enumerate(np.bincount(index.extension[chosen], minlength=len(suffix)).tolist()):
            if number and not (counts is found.others and suffix[e] == CLASS):
                counts[suffix[e]] += number
    if not len(taken):
        found.leave("tar without images", shard)
    return Members(index.names(taken), index.offset[taken], index.size[taken], index.classes[index.sample[taken]])


def _rank(extension: str, suffixes: Sequence[str]) -> int:
    whole = [i for i, suffix in enumerate(suffixes) if extension == suffix]
    ends = [len(suffixes) + i for i, suffix in enumerate(suffixes) if extension.endswith(suffix)]
    return min(whole + ends, default=2 * len(suffixes))


def _name(shard: str, index: Index, row: int) -> str:
    return f"{shard}/{os.fsdecode(index.names(np.array([row]))[0])}"


def index_of(shard: str) -> tuple[Index, bool]:
    """The index of a tar, and whether it is stored next to it. It is made anew if the tar's size or time changes.

    Raises ValueError if the tar is damaged or cut short.
    """
    status, path = os.stat(shard), shard + ".index.npz"
    key = np.array([INDEX_FORMAT, status.st_size, status.st_mtime_ns])
    try:
        with np.load(path) as stored:
            if np.array_equal(stored["key"], key):
                return Index(*(stored[name] for name in Index._fields)), True
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # absent, incomplete, or not one of ours: rebuilt below
    index = scan(shard)
    part = f"{path}.{secrets.token_hex(4)}"
    try:
        with open(part, "xb") as file:
            np.savez(file, allow_pickle=False, key=key, **index._asdict())
        os.replace(part, path)
    except OSError:
        if os.path.exists(part):
            os.remove(part)
        return index, False
    return index, True


def scan(shard: str) -> Index:
    """Reads the headers and the .cls members of a tar, which may be several, one after the other (`cat`)."""
    found = _Members()
    with open(shard, "rb") as file:
        start = 0
        while True:
            end = _read_archive(shard, file, start, found)
            following = _skip_zeros(file, end)
            if following == end:
                _damaged(shard, f"there is no tar header at byte {end}")
            if following is None:
                return found.index(shard, file)
            start = following


def _damaged(shard: str, reason: str) -> NoReturn:
    raise ValueError(f"images: {shard} is not a complete, uncompressed tar: {reason}")


def _read_archive(shard: str, file: IO[bytes], start: int, found: "_Members") -> int:
    """Adds the members of the archive that begins at byte `start`, and returns where its end mark does."""
    size = os.fstat(file.fileno()).st_size
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                if member.size < 0 or tar.offset <= member.offset:
                    _damaged(shard, f"the header at byte {member.offset} claims a negative size")
                found.add(member)
            end = tar.offset
    # tarfile stumbles in many ways over headers that lie.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError, EOFError) as error:
        if isinstance(error, ValueError) and str(error).startswith("images: "):
            raise
        _damaged(shard, str(error) or type(error).__name__)
    if end >= size:
        _damaged(
            shard,
            f"it ends at byte {size} without an end mark, so files may be missing. If it is whole, add the mark: "
            "head -c 1024 /dev/zero >> FILE",
        )
    found.end_archive()
    return end


def _skip_zeros(file: IO[bytes], start: int) -> int | None:
    """The first block from byte `start` on that is not all zeros, or None."""
    file.seek(start)
    while chunk := file.read(CHUNK):
        if rest := chunk.lstrip(b"\0"):
            at = start + len(chunk) - len(rest)
            return at - (at - start) % tarfile.BLOCKSIZE
        start += len(chunk)
    return None


class _Members:
    """The columns of an Index while a tar is read."""

    def __init__(self) -> None:
        self.sample, self.extension, self.offset, self.size = (array("q") for _ in range(4))
        self.state = array("b")
        self.keys: list[bytes] = []
        self.extensions: dict[bytes, int] = {}
        self._begin_archive()

    def _begin_archive(self) -> None:
        self._first, self._samples = len(self.state), {}  # type: int, dict[bytes, int]
        self._links: dict[int, bytes] = {}  # rows of links, and the names that they lead to

    def add(self, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        name = os.path.normpath(member.name)
        if member.islnk():
            self._links[len(self.state)] = _encode(os.path.normpath(member.linkname))
        elif member.issym():
            self._links[len(self.state)] = _encode(os.path.normpath(os.path.join(name, "..", member.linkname)))
        key, extension = _split(_encode(name))
        self.sample.append(self._samples.setdefault(key, len(self.keys)))
        if self.sample[-1] == len(self.keys):
            self.keys.append(key)
        self.extension.append(self.extensions.setdefault(extension, len(self.extensions)))
        self.offset.append(member.offset_data)
        self.size.append(member.size)
        self.state.append(_state(member, name))

    def end_archive(self) -> None:
        """Lets links be the files that they lead to. Each archive has samples of its own."""
        if self._links:
            keys, extensions = self.keys, list(self.extensions)
            rows = list(range(self._first, len(self.state)))
            rows.sort(key=lambda row: row not in self._links)  # a file named twice is a link to itself
            place = {keys[self.sample[row]] + extensions[self.extension[row]]: row for row in rows}
            for link in self._links:
                self._follow(link, place)
        self._begin_archive()

    def _follow(self, link: int, place: dict[bytes, int]) -> None:
        row: int | None = link
        for _ in range(MOST_LINKS):
            if row is None or row not in self._links:
                break
            row = place.get(self._links[row])
        if row is None or row in self._links or self.state[row] not in (0, HIDDEN):
            self.state[link] = self.state[link] or LINK
        else:
            self.offset[link], self.size[link] = self.offset[row], self.size[row]

    def index(self, shard: str, file: IO[bytes]) -> Index:
        sample, extension, offset, size = (
            np.frombuffer(column, np.int64) if column else np.empty(0, np.int64)
            for column in (self.sample, self.extension, self.offset, self.size)
        )
        state = np.array(self.state, np.int8)
        name = sample * (1 + len(self.extensions)) + extension
        last = len(name) - 1 - np.unique(name[::-1], return_index=True)[1]
        earlier = np.ones(len(name), bool)
        earlier[last] = False
        state[earlier & (state == 0)] = REPLACED

        classes = [b""] * len(self.keys)
        labels = [number for text, number in self.extensions.items() if text.endswith(b".cls")]
        for row in np.flatnonzero(np.isin(extension, labels) & (state == 0)).tolist():
            if size[row] > LONGEST_CLASS:
                key = os.fsdecode(self.keys[sample[row]])
                raise ValueError(f"images: {shard}: the class of {key} has {size[row]} bytes; wanted a name or number")
            classes[sample[row]] = os.pread(file.fileno(), int(size[row]), int(offset[row])).strip()
        texts = (np.array(column, "S") for column in (self.keys, classes, list(self.extensions)))
        return Index(sample, extension, offset, size, state, *texts)


def _state(member: tarfile.TarInfo, name: str) -> int:
    if os.path.basename(name).startswith("."):
        return HIDDEN
    if member.islnk() or member.issym():
        return 0  # until it is followed
    if member.isreg():
        pieces: list[tuple[int, int]] = getattr(member, "sparse", None) or []
        return SPARSE if member.issparse() and [(0, member.size)] != [p for p in pieces if p[1]] else 0
    return SPECIAL if member.isdev() else UNKNOWN


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _split(name: bytes) -> tuple[bytes, bytes]:
    """The key of a sample, up to the first dot of the file's name, and the extension."""
    folder, slash, base = name.rpartition(b"/")
    key, dot, extension = base.partition(b".")
    return folder + slash + key, dot + extension
