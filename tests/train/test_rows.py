"""The log's files on a disk that fills up and is emptied again."""

import errno
import os
import random
from pathlib import Path

import pytest

from jepa.train.rows import Rows


class Disk:
    """Takes `room` bytes, and parts of what is more."""

    def __init__(self, path: Path, room: int) -> None:
        self.handle, self.room = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), room

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = os.write(self.handle, data[: self.room])
        self.room -= taken
        return taken

    def fileno(self) -> int:
        return self.handle

    def close(self) -> None:
        os.close(self.handle)


@pytest.mark.parametrize("room", range(0, 60, 7))
def test_rows_wait_while_the_disk_is_full_and_none_is_torn(room: int, tmp_path: Path) -> None:
    path, said = tmp_path / "rows", list[str]()
    path.write_text("before\n")
    rows = Rows(path, said.append)
    disk = Disk(path, room)
    rows.file = disk  # type: ignore[assignment]
    given = [f"{'x' * random.randint(1, 20)}\n" for _ in range(12)]
    for row in given:
        rows.write(row)
        text = path.read_text()
        assert text.endswith("\n") and "".join(["before\n", *given]).startswith(text)
    assert len(said) == 1 and "No space left" in said[0] and "training goes on" in said[0]
    disk.room = 10**6
    rows.write("after\n")
    assert path.read_text() == "".join(["before\n", *given, "after\n"]) and said[1:] == [f"{path} is written again"]
    rows.close()
    assert len(said) == 2


def test_what_is_lost_in_the_end_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    rows = Rows(tmp_path / "rows", said.append)
    rows.file = Disk(tmp_path / "rows", 0)  # type: ignore[assignment]
    for _ in range(3):
        rows.write("row\n")
    rows.close()
    assert "its last 3 rows could not be written" in said[-1]
