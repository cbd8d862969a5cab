"""What was found where images were looked for: what was taken, by suffix, and what was left out, and why.

`train.py` prints it, so that no image vanishes without a word.
"""

import os
from collections import Counter

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
SHOWN = 8  # suffixes are counted one by one, the most frequent first, and the others together


class Found:
    """`str` of it is one line, for example

    1281167 .jpeg; left out: 12 .txt; 3 hidden, such as n0144/._1.JPEG; 1 named pipe, such as n0144/x.jpg
    """

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()  # by suffix
        self.others: Counter[str] = Counter()  # files that are no images, by suffix
        self._left: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def leave(self, reason: str, example: str, number: int = 1) -> None:
        """Notes that `number` files or folders were left out for a reason."""
        self._left[reason] += number
        self._examples.setdefault(reason, example)

    def __str__(self) -> str:
        left = [_list(self.others)] if self.others else []
        left += [f"{number} {reason}, such as {self._examples[reason]}" for reason, number in self._left.items()]
        parts = [_list(self.taken) or "no image", *(["left out: " + "; ".join(left)] if left else [])]
        return "; ".join(parts).encode(errors="backslashreplace").decode()


def suffix_of(name: str) -> str:
    """The last suffix of a file's name, in lower case."""
    return os.path.splitext(name)[1].lower()


def _list(counts: Counter[str]) -> str:
    shown = counts.most_common(SHOWN)
    parts = [f"{number} {suffix or 'without suffix'}" for suffix, number in shown]
    if rest := counts.total() - sum(number for _, number in shown):
        parts.append(f"{rest} others")
    return ", ".join(parts)
