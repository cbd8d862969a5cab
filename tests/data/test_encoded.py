"""Images that lie, crash decoders or claim what they do not hold: the right pixels, or one more bad image."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jepa.data import apart
from jepa.data.augment import View
from jepa.data.decode import Decoder
from jepa.data.encoded import LARGEST, require_plausible
from jepa.data.loader import Loader, eval_batches
from jepa.data.sources import open_images

rng = np.random.default_rng()


@pytest.fixture(autouse=True)
def fresh_numbers(inputs_of_its_own: None) -> None:
    global rng
    rng = np.random.default_rng(random.getrandbits(64))


def whole(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.int32)
    return boxes, boxes.astype(np.float32)


def decoded(*files: bytes, side: int) -> np.ndarray:
    """uint8 [B, side, side, 3]; nothing is resampled in images of that side."""
    encoded = [np.frombuffer(bytearray(file), np.uint8) for file in files]
    return Decoder("cpu", "cpu", 2)(encoded, side, whole).numpy()


def packed(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(side: int = 40) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))


# --- formats that a decoder gets wrong


@pytest.mark.parametrize("kind", [2, 3, 5, 6])
@pytest.mark.parametrize("largest", [1, 15, 100, 254, 255, 256, 1023, 4095, 65534, 65535])
def test_a_pnm_is_as_bright_as_its_largest_value_says(kind, largest):
    side, channels = 24, 3 if kind in (3, 6) else 1
    levels = rng.integers(0, largest, (side, side, channels), endpoint=True)
    levels[0, 0], levels[0, 1] = 0, largest
    if kind < 4:
        body = "\n# a comment\n".join(" ".join(map(str, row.ravel())) for row in levels).encode()
    else:
        body = levels.astype(">u2" if largest > 255 else np.uint8).tobytes()
    gaps = [random.choice([b" ", b"\n", b"\t\r\n", b" # 12 34\n", b"#x\n#y\n "]) for _ in range(3)]
    file = b"P%d%b%d%b%d%b%d\n" % (kind, gaps[0], side, gaps[1], side, gaps[2], largest) + body
    expected = np.broadcast_to(levels * 255 / largest, (side, side, 3))
    for more in (b"", b"\nP5 a second image, or anything"):
        ours = decoded(file + (more if kind > 4 else b"\n"), side=side)[0]
        assert np.abs(ours - expected).max() < 1


@pytest.mark.parametrize("mode", ["LA", "PA"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_of_grey_and_alpha(mode, compression):
    image = noise().convert("L" if mode == "LA" else "P").convert(mode)
    image.putalpha(Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)))
    file = packed(image, "TIFF", compression=compression)
    assert np.array_equal(decoded(file, side=40)[0], np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_of_floats_is_a_bad_image_and_not_a_white_one(compression):
    with pytest.raises(OSError, match=r"floating-point numbers.*wanted 8 or 16 bits"):
        decoded(packed(noise().convert("F"), "TIFF", compression=compression), side=40)


@pytest.mark.parametrize("order", "<>")
def test_a_tiff_of_floats_in_three_channels(order):
    """Its sample formats are three numbers, which do not stand in the directory itself."""
    side, begin = 8, 200
    pixels = rng.random((side, side, 3)).astype(f"{order}f4").tobytes()
    tags = {256: side, 257: side, 258: (32, 32, 32), 259: 1, 262: 2, 273: begin, 277: 3, 278: side, 279: len(pixels)}
    tags[339] = (3, 3, 3)
    file, behind = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags)), b""
    for tag, value in tags.items():
        if isinstance(value, tuple):
            file += struct.pack(f"{order}HHII", tag, 3, 3, 150 + len(behind))
            behind += struct.pack(f"{order}3H", *value)
        else:
            file += struct.pack(f"{order}HHII", tag, 4, 1, value)
    file = (file.ljust(150, b"\0") + behind).ljust(begin, b"\0") + pixels
    with pytest.raises(OSError, match="floating-point numbers"):
        decoded(file, side=side)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_jpeg_2000_is_decoded(mode):
    if mode == "I;16":
        levels = rng.integers(0, 65536, (40, 40)).astype(np.uint16)
        image, expected = Image.fromarray(levels), np.repeat(levels[..., None] / 257, 3, 2)
    else:
        image = noise().convert(mode)
        expected = np.asarray(image.convert("RGB"), float)
    for bare in (False, True):  # within boxes, or the code stream alone
        file = packed(image, "JPEG2000", no_jp2=bare)
        jpeg = packed(noise(), "PNG")
        ours = decoded(jpeg, file, jpeg, side=40)
        assert np.abs(ours[1] - expected).max() <= 1


# --- bad images


def with_size(file: bytes, at: int, form: str, *sides: int) -> bytes:
    changed = bytearray(file)
    struct.pack_into(form, changed, at, *sides)
    return bytes(changed)


def claims(side: int) -> dict[str, bytes]:
    """Small files whose headers claim side x side pixels."""
    jpeg, png, bmp, tiff = (packed(noise(), kind) for kind in ("JPEG", "PNG", "BMP", "TIFF"))
    fields = struct.pack(">II", side, side) + png[24:29]
    png = png[:16] + fields + struct.pack(">I", zlib.crc32(b"IHDR" + fields)) + png[33:]
    directory = int.from_bytes(tiff[4:8], "little")
    for entry in range(int.from_bytes(tiff[directory : directory + 2], "little")):
        at = directory + 2 + 12 * entry
        if int.from_bytes(tiff[at : at + 2], "little") in (256, 257):  # width and height
            tiff = with_size(tiff, at + 2, "<HII", 4, 1, side)
    files = {"png": png, "bmp": with_size(bmp, 18, "<ii", side, side), "tiff": tiff}
    if side < 65536:
        files["jpeg"] = with_size(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", side, side)
    for kind, largest in ((2, 255), (3, 9), (5, 255), (5, 100), (6, 255), (6, 4095), (6, 65535)):
        files[f"pnm {kind} {largest}"] = b"P%d %d %d %d\n" % (kind, side, side, largest) + b"1 " * 1000
    return files | {
        "pnm 1": b"P1 %d %d\n" % (side, side) + b"0 1 " * 1000,
        "pnm 4": b"P4 %d %d\n" % (side, side) + bytes(1000),
    }


@pytest.mark.parametrize("side", [12000, 60000, 2_000_000_000])
def test_headers_that_claim_what_a_file_cannot_hold(side):
    """Refused before any memory is asked for, or by a decoder that notices; never the end of the process."""
    for name, file in claims(side).items():
        with pytest.raises((OSError, RuntimeError)) as caught:
            decoded(file, side=8)
        if side == 60000:
            assert "its header claims 60000 x 60000 pixels" in str(caught.value), name


def test_bombs_are_refused_and_large_images_are_not():
    blank = Image.new("1", (40000, 4000))
    assert decoded(packed(blank, "PNG"), side=8).max() == 0  # 160 million pixels in 20 kB
    with pytest.raises(OSError, match=f"hold at most {LARGEST}, of any image"):
        decoded(packed(Image.new("1", (40000, 5000)), "PNG"), side=8)
    largest = packed(Image.new("L", (4000, 4000)), "JPEG")
    require_plausible([np.frombuffer(largest, np.uint8)], np.array([[4000, 4000]]))


def test_what_is_no_image_is_named_by_its_first_bytes():
    for file in (
        b"P7\nWIDTH 2\n",
        b"GIF89a" + b"1" * 50,
        b"\0" * 100,
        b"P",
        b"<html>",
        b"P5",
        b"P6 2 2 0\n",
        b"P5 2 2 70000\n",
    ):
        with pytest.raises(OSError, match=r"known format|a PNM"):
            decoded(file, side=8)


def test_a_jpeg_2000_cut_anywhere_is_a_bad_image_and_the_next_is_good():
    decoder = Decoder("cpu", "cpu", 1)
    file = packed(noise(60), "JPEG2000")
    good = decoded(file, side=60)
    for cut in [200, len(file) - 1, *(random.randrange(13, len(file)) for _ in range(40))]:
        encoded = np.frombuffer(bytearray(file[:cut]), np.uint8)
        with pytest.raises(OSError, match="damaged; Pillow"):
            decoder([encoded], 60, whole)
    again = decoder([np.frombuffer(bytearray(file), np.uint8)], 60, whole).numpy()
    assert np.array_equal(again, good)


def test_a_process_apart_that_crashes_or_hangs_costs_one_image(monkeypatch):
    decode, file = apart.Apart(), np.frombuffer(packed(noise(), "JPEG2000"), np.uint8)
    expected = decode(file)
    decode._process.kill()
    decode._process.wait()
    assert np.array_equal(decode(file), expected)
    start = decode._start

    def crash():
        process = start()
        process.kill()
        return process

    with monkeypatch.context() as patch, pytest.raises(OSError, match="exit code -9"):
        patch.setattr(decode, "_start", crash)
        decode(file)
    monkeypatch.setattr(apart, "SECONDS", 0.0)
    with pytest.raises(OSError, match="exit code -9"):
        decode(np.frombuffer(packed(noise(2000), "JPEG2000"), np.uint8))
    monkeypatch.setattr(apart, "SECONDS", 60.0)
    assert np.array_equal(decode(file), expected)


def test_they_are_counted_and_replaced_in_a_run(tmp_path, caplog):
    for i in range(30):
        noise().save(tmp_path / f"{i:02}.png")
    lies = {
        "a.jpg": packed(noise(), "JPEG2000")[:200],
        "b.png": claims(60000)["png"],
        "c.pgm": b"P5 9 9 0\n" + bytes(81),
    }
    for name, content in lies.items():
        (tmp_path / name).write_bytes(content)
    made = Loader(open_images(tmp_path), [View(16, (0.3, 1.0))], batch_size=11, num_workers=2)
    assert sum(made.batch(step).replaced for step in range(3)) == 3
    assert {made.source.name(i).rpartition("/")[2] for i in made.bad} == lies.keys()
    assert all(caplog.text.count(f"/{name} cannot be used (") == 1 for name in lies)
    numbers = [n for _, some in eval_batches(made.source, crop_size=16, batch_size=8) for n in some]
    assert len(numbers) == 30
