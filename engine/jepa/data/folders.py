"""A folder tree of images: which files it holds, each real folder once, in the order of their names."""

import os
import stat
from collections import deque
from typing import NoReturn

from .found import Found, suffix_of

FOLDER, FILE, LOST = "folder", "file", "link that leads nowhere"
SPECIAL = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def find_files(root: str, suffixes: tuple[str, ...]) -> tuple[list[str], list[str], Found]:
    """The images, which end in one of `suffixes`, and the tars below `root`: names relative to it, and what was found.

    Folder by folder, each sorted. Links are followed after everything that is reached without them, to folders that do
    not contain the link; a folder that is reached again is left out. Raises ValueError if a folder cannot be listed.
    """
    found = Found()
    images: dict[str, list[str]] = {}  # by folder
    shards: dict[str, list[str]] = {}
    seen: set[str] = set()
    ways = [("", os.path.realpath(root))]  # to folders: their names, with links, and where they really are
    links: deque[tuple[str, str]] = deque()
    while ways or links:
        if not ways:
            ways.append(links.popleft())
        name, real = ways.pop()
        if real in seen:
            found.leave("folder reached again by a link", name)
            continue
        seen.add(real)
        images[name], shards[name], inside = [], [], []
        for entry in _entries(real):
            path, kind = os.path.join(name, entry.name), _kind(entry)
            if kind == FOLDER and entry.name[0] == ".":
                found.leave("hidden folder", path)
            elif kind == FOLDER and not entry.is_symlink():
                inside.append((path, os.path.join(real, entry.name)))
            elif kind == FOLDER:
                target = os.path.realpath(entry.path)
                if (real + os.sep).startswith(target.rstrip(os.sep) + os.sep):  # it leads up
                    found.leave("folder reached again by a link", path)
                else:
                    links.append((path, target))
            else:
                _add(path, entry.name.lower(), kind, suffixes, images[name], shards[name], found)
        ways += reversed(inside)
    order = sorted(images, key=lambda name: name.split(os.sep) if name else [])
    return (
        [path for name in order for path in images[name]],
        [path for name in order for path in shards[name]],
        found,
    )


def _add(
    path: str, lower: str, kind: str, suffixes: tuple[str, ...], images: list[str], shards: list[str], found: Found
) -> None:
    suffix = suffix_of(lower)
    wanted = lower.endswith(suffixes)
    if kind == LOST:  # it may have been a folder
        found.leave(kind, path)
    elif not (wanted or suffix == ".tar"):
        found.others[suffix] += 1
    elif lower[0] == ".":
        found.leave("hidden", path)
    elif kind != FILE:
        found.leave(kind, path)
    elif wanted:
        images.append(path)
        found.taken[suffix] += 1
    else:
        shards.append(path)


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _fail(folder, error)


def _fail(folder: str, error: OSError) -> NoReturn:
    raise ValueError(f"images: {folder} cannot be listed ({error.strerror})") from error


def _kind(entry: "os.DirEntry[str]") -> str:
    """FOLDER, FILE or what else it is, links followed. Mostly without a call to the file system."""
    try:
        if entry.is_dir():
            return FOLDER
        return FILE if entry.is_file() else SPECIAL.get(stat.S_IFMT(entry.stat().st_mode), "special file")
    except OSError:
        return LOST
