"""Folders and lists of every kind: what is listed is what is there, or a line or an error says what was left out."""

import codecs
import os
import random
import shutil
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from jepa.config.schema import Data
from jepa.data.sources import ImageSource, Nowhere, open_images


def write(root: Path, *names: str) -> None:
    """Files that hold their names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def listed(source: ImageSource, root: Path) -> list[str]:
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


# --- folders


def test_folders_that_links_reach_again_are_listed_once_under_their_own_names(tmp_path):
    classes = [f"{i}" for i in range(random.randint(3, 6))]
    write(tmp_path, *(f"{c}/deep/x.jpg" for c in classes))
    for a in classes:
        for b in set(classes) - {a}:
            os.symlink(f"../{b}", tmp_path / a / f"to{b}")
            os.symlink(f"../{b}/deep", tmp_path / a / f"a-to{b}")
    os.symlink("..", tmp_path / "0" / "up")
    os.symlink(tmp_path.parent, tmp_path / "0" / "higher")
    source = open_images(tmp_path)
    assert listed(source, tmp_path) == [f"{c}/deep/x.jpg" for c in classes] and source.classes == classes
    again = 2 * len(classes) * (len(classes) - 1) + 2
    assert f"{again} folder reached again by a link, such as" in str(source.found)


def test_folders_elsewhere_are_listed_once_where_the_first_link_puts_them(tmp_path):
    """In the order of the names, as if the folder lay there."""
    write(tmp_path / "far", "cats/1.jpg", "cats/more/2.jpg")
    write(tmp_path / "here", "a/0.jpg", "z/3.jpg")
    os.symlink(tmp_path / "far", tmp_path / "here" / "b")
    os.symlink(tmp_path / "far" / "cats", tmp_path / "here" / "c")
    os.symlink(tmp_path / "far", tmp_path / "here" / "z" / "far")
    os.symlink(tmp_path / "here", tmp_path / "far" / "back")
    names = ["a/0.jpg", "b/cats/1.jpg", "b/cats/more/2.jpg", "z/3.jpg"]
    assert listed(open_images(tmp_path / "here"), tmp_path / "here") == names
    os.symlink("here", tmp_path / "link")
    assert listed(open_images(tmp_path / "link"), tmp_path / "link") == names


def test_only_files_are_images_and_the_rest_is_counted(tmp_path):
    write(
        tmp_path, "a/1.jpg", "a/2.JPEG", "b/3.png", "b/notes.md", "a/list", "b/.hidden.png", ".trash/4.jpg", "a/5.gif"
    )
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(tmp_path)  # a socket's path is short
        bound.bind("a/socket.png")
    os.symlink("gone.jpg", tmp_path / "b" / "broken.jpg")
    os.symlink("itself.jpg", tmp_path / "b" / "itself.jpg")
    os.symlink("/dev/zero", tmp_path / "b" / "device.jpg")
    os.symlink("3.png", tmp_path / "b" / "link.png")
    os.symlink("/an/unmounted/disk", tmp_path / "c")
    (tmp_path / "b" / "folder.jpg").mkdir()
    source = open_images(tmp_path)
    assert listed(source, tmp_path) == ["a/1.jpg", "a/2.JPEG", "b/3.png", "b/link.png"]
    others, *reasons = str(source.found).split("; left out: ")[1].split("; ")
    assert sorted(others.split(", ")) == ["1 .gif", "1 .md", "1 without suffix"]
    assert sorted(reasons) == [
        "1 device, such as b/device.jpg",
        "1 hidden folder, such as .trash",
        "1 hidden, such as b/.hidden.png",
        "1 named pipe, such as a/pipe.jpg",
        "1 socket, such as a/socket.png",
        "3 link that leads nowhere, such as c",
    ]
    assert str(source.found).startswith("2 .png, 1 .jpg, 1 .jpeg; left out: ")


def test_what_is_no_file_is_a_bad_image_of_a_list_and_is_not_waited_for(tmp_path):
    write(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    names = ["1.jpg", "pipe.jpg", "/dev/zero", "x" * 300, "1.jpg/2.jpg", "."]
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(tmp_path)
        bound.bind("socket.jpg")
        (tmp_path / "list.txt").write_text("\n".join([*names, "socket.jpg"]))
        source = open_images(tmp_path / "list.txt")
        assert source.read(0).tobytes() == b"1.jpg"
        for i in range(1, len(source)):
            with pytest.raises(OSError):
                source.read(i)


def test_a_file_that_no_memory_holds_is_a_bad_image(tmp_path):
    write(tmp_path, "1.jpg")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(OSError, match="4398046511104 bytes"):
        open_images(tmp_path).read(1)


def test_images_beside_shards_leave_a_word_of_the_shards(tmp_path):
    write(tmp_path, "a/1.jpg", "shards/0.tar", "shards/1.TAR")
    source = open_images(tmp_path)
    assert len(source) == 1
    assert f"2 .tar beside images (if you want their images, give {tmp_path}/shards/*.tar)" in str(source.found)


def test_suffixes_choose(tmp_path):
    write(tmp_path, "1.jpg", "1.seg.png", "2.png", "3.tiff8", "4.PNG")
    chosen = {
        (".png",): ["1.seg.png", "2.png", "4.PNG"],
        (".seg.png",): ["1.seg.png"],
        (".tiff8", ".jpg"): ["1.jpg", "3.tiff8"],
    }
    for suffixes, names in chosen.items():
        source = open_images(tmp_path, suffixes)
        assert listed(source, tmp_path) == names
        (tmp_path / "list.txt").write_text("\n".join(sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".txt")))
        from_list = open_images(tmp_path / "list.txt", suffixes)
        assert listed(from_list, tmp_path) == names and str(from_list.found) == str(source.found).replace(
            ", 1 .txt", ""
        )
    with pytest.raises(ValueError, match=r"looked for \.gif"):
        open_images(tmp_path, [".gif"])
    with pytest.raises(ValueError, match="lists no image"):
        open_images(tmp_path / "list.txt", [".gif"])


@pytest.mark.parametrize(
    ("given", "read"), [("jpg", (".jpg",)), (["PNG", ".seg.png"], (".png", ".seg.png")), (None, None)]
)
def test_suffixes_in_a_config(given, read):
    assert Data(batch_size=1, crop_size=32, suffixes=given).suffixes == read
    for wrong in ([], [""], ".", 3, [1], {"jpg": 1}):
        with pytest.raises(ValidationError):
            Data(batch_size=1, crop_size=32, suffixes=wrong)


def test_nothing_there_is_told_from_something_wrong(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("gone", "gone-*.tar"):
        with pytest.raises(Nowhere):
            open_images(tmp_path / path)
    with pytest.raises(ValueError, match="neither a file nor a folder") as caught:
        open_images(tmp_path / "pipe")
    assert caught.type is ValueError


def test_names_that_are_no_text_can_be_printed(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkfifo(name + b".jpg")
    Path(os.fsdecode(name + b".png")).write_bytes(b"x")
    found = str(open_images(tmp_path).found)
    assert found.encode() and "1 named pipe, such as " in found


# --- lists

ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lists_in_every_encoding(tmp_path, encoding, ends):
    names = ["img/1.jpg", "img/zwölf 日本.jpg", "img/a\u2028b.jpg"]
    write(tmp_path, *names)
    lines = [f"{name}\tclass {i % 2}" for i, name in enumerate(names)]
    for last in ("", ends):
        text = ENCODINGS[encoding] + (ends.join(lines) + last).encode(encoding)
        (tmp_path / "list.txt").write_bytes(text)
        source = open_images(tmp_path / "list.txt")
        assert [source.read(i).tobytes().decode() for i in range(3)] == names
        assert source.classes == ["class 0", "class 1"] and source.labels.tolist() == [0, 1, 0]


def test_lists_that_were_joined_and_names_that_are_no_utf8(tmp_path):
    latin = os.fsdecode("img/süd.jpg".encode("latin-1"))
    write(tmp_path, "img/1.jpg", "img/2.jpg")
    shutil.copy(tmp_path / "img/1.jpg", os.path.join(tmp_path, latin))
    parts = [codecs.BOM_UTF8 + b"img/2.jpg\n", codecs.BOM_UTF8 + b"img/1.jpg\n", os.fsencode(latin) + b"\n"]
    (tmp_path / "list.txt").write_bytes(b"".join(parts))
    source = open_images(tmp_path / "list.txt")
    assert [source.read(i).tobytes() for i in range(3)] == [b"img/2.jpg", b"img/1.jpg", b"img/1.jpg"]


def test_the_home_folder_in_a_list(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path, "home/1.jpg", "lists/~2.jpg")
    (tmp_path / "lists" / "list.txt").write_text("~/1.jpg\n~2.jpg\n")
    source = open_images(tmp_path / "lists" / "list.txt")
    assert [source.read(i).tobytes() for i in range(2)] == [b"home/1.jpg", b"lists/~2.jpg"]


def test_lists_that_cannot_be_meant_are_refused_by_name(tmp_path):
    write(tmp_path, "img/1.jpg", "img/2.jpg")
    text = "img/1.jpg\nimg/2.jpg\n"
    wrong = {
        text.encode("utf-16-le"): "line 1 holds a NUL",
        text.encode("utf-16-be"): "line 1 holds a NUL",
        text.encode() + b"img/\0.jpg\n": "line 3 holds a NUL",
        codecs.BOM_UTF16_LE + text.encode("utf-16-le")[:-1]: "begins like utf-16 text but is none",
        text.replace("/", "\\").encode(): r"none of the 2 paths looked for is there.*wanted / where it has \\",
        b"a/1.jpg\nb/2.jpg\n": "relative to the list's folder",
        b"img/1.jpg\tcat\n\tdog\n": "line 2 has a class, but no path",
        b"img/1.jpg\tcat\nimg/2.jpg\n": "gives some images a class, but not",
        codecs.BOM_UTF8 + b"\r\n\r\n": "lists no image",
    }
    for content, message in wrong.items():
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"list\.txt.*{message}"):
            open_images(tmp_path / "list.txt")
