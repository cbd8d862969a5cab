"""A .txt list of images: one path per line, optionally a tab and a class."""

import codecs
import os
from collections.abc import Iterator

from .found import Found, suffix_of

MARKS = {  # byte-order marks; UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
TRIED = 16  # paths of a list that are looked for before anything is built


def read_list(path: str, suffixes: tuple[str, ...] | None) -> tuple[list[str], list[str | None], Found]:
    """The paths, absolute or relative to the list's folder, their classes (None: not given), and what was found.

    UTF-8, or what a byte-order mark says; `~` is the home folder. `suffixes`: those to take; None: all lines.
    Raises ValueError, which names the list, if it cannot be read, only some images have a class, or none is there.
    """
    files, classes, found = [], [], Found()
    folder = os.path.dirname(os.path.abspath(path))
    for number, line in enumerate(_lines(path), 1):
        name, _, label = line.partition("\t")
        if not line.strip():
            continue
        if not name:
            raise ValueError(f"images: {path}, line {number} has a class, but no path before the tab")
        if "\0" in name:
            raise ValueError(
                f"images: {path}, line {number} holds a NUL: no file has that name. If the list is UTF-16 without a "
                "byte-order mark, convert it: iconv -f utf-16le -t utf-8"
            )
        if suffixes and not name.lower().endswith(suffixes):
            found.others[suffix_of(name)] += 1
            continue
        files.append(os.path.join(folder, os.path.expanduser(name) if name[0] == "~" else name))
        classes.append(label.strip() or None)
        found.taken[suffix_of(name)] += 1
    if any(classes) and None in classes:
        name = files[classes.index(None)]
        raise ValueError(f"images: {path} gives some images a class, but not {name!r}; wanted all or none")
    _require_some(path, files)
    return files, classes, found


def encoding_of(path: str | os.PathLike[str]) -> str:
    """Of a text file: what its byte-order mark says, or UTF-8."""
    with open(path, "rb") as file:
        start = file.read(4)
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8-sig")


def _lines(path: str) -> Iterator[str]:
    encoding = encoding_of(path)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"  # a file's name may be no UTF-8
    try:
        with open(path, encoding=encoding, errors=errors) as lines:
            for line in lines:
                yield line.rstrip("\n").removeprefix("\ufeff")  # also inside, where lists were joined
    except UnicodeError as error:
        raise ValueError(f"images: {path} begins like {encoding} text but is none ({error}); wanted UTF-8") from error


def _require_some(path: str, files: list[str]) -> None:
    tried = files[:: max(1, len(files) // TRIED)]
    if tried and not any(os.path.lexists(file) for file in tried):
        hint = "; wanted / where it has \\" if "\\" in tried[0] else ""
        raise ValueError(
            f"images: {path}: none of the {len(tried)} paths looked for is there, for example {tried[0]!r}; paths are "
            f"absolute or relative to the list's folder{hint}"
        )
