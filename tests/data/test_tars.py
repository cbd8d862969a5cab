"""Tars of every kind: what is listed is what unpacking would give, or a line or an error says otherwise."""

import io
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jepa.data import tars
from jepa.data.sources import ImageSource, open_images

LINK, SYMLINK = tarfile.LNKTYPE, tarfile.SYMTYPE


def bytes_of(source: ImageSource) -> dict[str, bytes]:
    return {os.fsdecode(source.members[i]): source.read(i).tobytes() for i in range(len(source))}


def junk() -> bytes:
    return os.urandom(random.randint(1, 3000))


def write(path: Path, members: list, form: int | None = None) -> None:
    """Members are (name, content) or (name, type, target)."""
    form = random.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]) if form is None else form
    with tarfile.open(path, "w", format=form) as tar:
        for name, content, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = content, target[0]
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_are_the_files_that_they_lead_to(tmp_path, form):
    one, two, hidden = junk(), junk(), junk()
    long = "x" * 90 if form == tarfile.USTAR_FORMAT else "ü" * 200
    write(
        tmp_path / "a.tar",
        [
            ("a/one.jpg", one),
            (f"b/{long}.jpg", two),
            ("b/.kept", hidden),
            ("a/hard.jpg", LINK, "a/one.jpg"),
            ("./a/dotted.jpg", LINK, "./a/one.jpg"),
            ("a/soft.png", SYMLINK, f"../b/{long}.jpg"),
            ("a/soft of soft.png", SYMLINK, "soft.png"),
            ("early.jpg", SYMLINK, "late.jpg"),
            ("late.jpg", two),
            ("to hidden.jpg", SYMLINK, "b/.kept"),
            ("nowhere.jpg", SYMLINK, "missing.jpg"),
            ("outside.jpg", SYMLINK, "/etc/passwd"),
            ("up.jpg", SYMLINK, "../../late.jpg"),
            ("circle.jpg", SYMLINK, "elcric.jpg"),
            ("elcric.jpg", SYMLINK, "circle.jpg"),
        ],
        form,
    )
    for _ in range(2):  # the second time from the stored index
        source = open_images(tmp_path / "a.tar")
        assert bytes_of(source) == {
            "a/one.jpg": one,
            f"b/{long}.jpg": two,
            "a/hard.jpg": one,
            "a/dotted.jpg": one,
            "a/soft.png": two,
            "a/soft of soft.png": two,
            "early.jpg": two,
            "late.jpg": two,
            "to hidden.jpg": hidden,
        }
        assert str(source.found).startswith(
            "7 .jpg, 2 .png; left out: 5 link that leads to no file of the tar, such as"
        )


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "posix", "ustar"])
def test_what_the_program_tar_packs(tmp_path, form):
    """Hard links, a file named twice, one with holes, one special file."""
    folder = tmp_path / "src" / "a"
    folder.mkdir(parents=True)
    expected = {f"a/{i}.jpg": junk() for i in range(3)}
    for name, content in expected.items():
        (folder.parent / name).write_bytes(content)
    os.link(folder / "0.jpg", folder / "again.jpg")
    os.symlink("1.jpg", folder / "soft.jpg")
    os.mkfifo(folder / "pipe.jpg")
    with open(folder / "holes.jpg", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    words = ["tar", "-C", folder.parent, "--sort=name", f"--format={form}", "-cf", tmp_path / "a.tar", "a", "a/1.jpg"]
    sparse = form != "ustar"
    subprocess.run([*words, *(["-S"] if sparse else [])], check=True)
    expected |= {"a/again.jpg": expected["a/0.jpg"], "a/soft.jpg": expected["a/1.jpg"]}
    if not sparse:
        expected["a/holes.jpg"] = (folder / "holes.jpg").read_bytes()
    source = open_images(tmp_path / "a.tar")
    assert bytes_of(source) == expected
    said = str(source.found)
    assert ("1 sparse file" in said) == sparse and "1 file replaced by a later one" in said
    assert "1 named pipe or device" in said


def test_archives_one_after_the_other(tmp_path):
    """Each has samples and links of its own, though names return."""
    content, expected = b"", []
    for part in range(3):
        first, second = junk(), junk()
        members = [("x/1.jpg", first), ("x/1.cls", b"%d" % part), ("x/2.jpg", second), ("x/3.jpg", LINK, "x/1.jpg")]
        members += [("x/3.cls", b"9"), ("x/2.cls", b"9")]
        write(tmp_path / "part.tar", members)
        content += (tmp_path / "part.tar").read_bytes() + bytes(512 * random.randint(0, 5))
        expected += [(first, str(part)), (second, "9"), (first, "9")]
    (tmp_path / "part.tar").unlink()
    (tmp_path / "all.tar").write_bytes(content)
    source = open_images(tmp_path / "all.tar")
    read = [(source.read(i).tobytes(), source.classes[source.labels[i]]) for i in range(len(source))]
    assert read == expected


def test_a_tar_that_ends_early_at_any_byte_is_an_error(tmp_path):
    names = ["1.jpg", "2" * 150 + ".jpg", "3.jpg"]
    path = tmp_path / "a.tar"
    write(path, [(name, junk()[:700]) for name in names])
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    cuts = {0, 1, 511, 512, 513, end - 1, end, *(m.offset for m in members), *(m.offset_data for m in members)}
    for cut in sorted(cuts | set(random.sample(range(end), 60))):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"a\.tar is not a complete"):
            open_images(path)
    for cut in (end + 1, end + 512, end + 1000, len(content)):
        path.write_bytes(content[:cut])
        assert len(open_images(path)) == 3
    path.write_bytes(content[:end])
    with pytest.raises(ValueError, match="without an end mark"):
        open_images(path)
    path.write_bytes(content[:end] + bytes(1024))  # as the message says
    assert len(open_images(path)) == 3
    for follows in (b"signature", os.urandom(2000)):
        path.write_bytes(content + follows)
        with pytest.raises(ValueError, match="no tar header at byte"):
            open_images(path)


def test_headers_that_lie_are_an_error_that_names_the_tar(tmp_path):
    """Whatever a byte of a header becomes: the same images, an error, or a line."""
    path = tmp_path / "a.tar"
    write(path, [("1.jpg", junk()), ("a" * 120 + ".jpg", junk()), ("3.jpg", LINK, "1.jpg")])
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [m.offset for m in tar.getmembers()]
    for _ in range(150):
        damaged = bytearray(content)
        at = random.choice(headers) + random.randrange(512)
        damaged[at] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        (tmp_path / "a.tar.index.npz").unlink(missing_ok=True)
        try:
            source = open_images(path)
        except ValueError as error:
            assert "a.tar" in str(error)
        else:
            assert len(source) == 3 or "left out" in str(source.found)


def test_empty_tars_among_others_are_told(tmp_path):
    write(tmp_path / "0.tar", [])
    (tmp_path / "1.tar").write_bytes(bytes(10240))
    write(tmp_path / "2.tar", [("a.json", b"{}")])
    with pytest.raises(ValueError, match="contains no image"):
        open_images(tmp_path)
    write(tmp_path / "3.tar", [("1.jpg", b"one")])
    source = open_images(tmp_path)
    assert bytes_of(source) == {"1.jpg": b"one"} and source.read(0).tobytes() == b"one"
    assert "3 tar without images, such as " in str(source.found) and "1 .json" in str(source.found)
    (tmp_path / "4.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"4\.tar is not a complete"):
        open_images(tmp_path)


def test_of_a_sample_with_several_images_one_is_taken(tmp_path):
    members = []
    for i in range(4):
        extensions = [".seg.png", ".png", ".jpg", ".json", ".left.png"]
        random.shuffle(extensions)
        members += [(f"s/{i}{e}", f"{i}{e}".encode()) for e in extensions]
    members += [("s/4.b.png", b"4.b.png"), ("s/4.a.png", b"4.a.png")]
    write(tmp_path / "w.tar", members)
    taken = {
        None: [f"{i}.jpg" for i in range(4)] + ["4.b.png"],
        (".png",): [f"{i}.png" for i in range(4)] + ["4.b.png", "4.a.png"],
        (".seg.png",): [f"{i}.seg.png" for i in range(4)],
        (".seg.png", ".jpg", ".a.png"): [f"{i}.seg.png" for i in range(4)] + ["4.a.png"],
        (".left.png", ".seg.png"): [f"{i}.left.png" for i in range(4)],
        (".json",): [f"{i}.json" for i in range(4)],
    }
    prints = set()
    for suffixes, expected in taken.items():
        source = open_images(tmp_path / "w.tar", suffixes)
        assert [source.read(i).tobytes().decode() for i in range(len(source))] == expected
        assert all(source.name(i).endswith(f"w.tar/s/{name}") for i, name in enumerate(expected))
        prints.add(source.fingerprint["list of images"])
    assert len(prints) == len(taken), "a resumed run would not notice"
    assert "13 other images of a sample, such as " in str(open_images(tmp_path / "w.tar").found)
    with pytest.raises(ValueError, match=r"looked for \.gif; no image; left out: 14 \.png, 4 \."):
        open_images(tmp_path / "w.tar", [".gif"])


def test_dots_in_names_that_are_no_extensions(tmp_path):
    days = [f"trip/2020.01.{day:02}.jpg" for day in range(5)]
    write(tmp_path / "w.tar", [(day, day.encode()) for day in days])
    source = open_images(tmp_path / "w.tar")
    assert len(source) == 1 and "4 other images of a sample, such as " in str(source.found)
    assert list(bytes_of(open_images(tmp_path / "w.tar", [".jpg"]))) == days


def test_a_tar_is_read_once_though_links_lead_to_it(tmp_path):
    write(tmp_path / "a.tar", [("1.jpg", b"1"), ("2.jpg", b"2")])
    os.symlink("a.tar", tmp_path / "latest.tar")
    for path in (tmp_path, f"{tmp_path}/{{a,latest,a}}.tar"):
        source = open_images(path)
        assert len(source) == 2 and "tar given again, such as" in str(source.found)


def test_an_index_of_another_format_is_made_anew(tmp_path):
    path = tmp_path / "a.tar"
    write(path, [("1.jpg", b"one"), ("2.jpg", LINK, "1.jpg")])
    status = path.stat()
    old = {"members": np.array([b"1.jpg"]), "offset": np.array([512]), "size": np.array([3]), "text": np.array([b""])}
    np.savez(tmp_path / "a.tar.index.npz", key=np.array([1, status.st_size, status.st_mtime_ns]), **old)
    assert len(open_images(path)) == 2
    with np.load(tmp_path / "a.tar.index.npz") as stored:
        assert stored["key"][0] == tars.INDEX_FORMAT > 1
