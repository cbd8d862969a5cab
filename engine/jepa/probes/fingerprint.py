"""Which files a training read, so that it is not taken for one of others under the same names."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from .job import Job


def fingerprint(job: Job, files: Iterable[str | Path]) -> str:
    """16 hexadecimal digits of the files' names, sizes and times of change; of the first rank's copies, on all ranks.

    Names are relative to their common folder: a set may move. A missing file is a file, too.
    """
    return job.gather(_digest(sorted(map(os.path.abspath, files))) if job.ranks.is_first else "")[0]


def _digest(files: list[str]) -> str:
    total, shared = hashlib.sha256(), os.path.commonpath([os.path.dirname(file) for file in files])
    for file in files:
        try:
            status = os.stat(file)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
        total.update(os.fsencode(f"{os.path.relpath(file, shared)}\0{state}\n"))
    return total.hexdigest()[:16]
