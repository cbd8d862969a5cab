"""The input pipeline: sources, order, crops against torchvision's algorithm, pixels against Pillow, bad files."""

import errno
import io
import logging
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jepa.data import sources, tars
from jepa.data.augment import CROP_WORDS, View, random_boxes, random_colour, recolour
from jepa.data.decode import Decoder
from jepa.data.loader import COLOUR, CROP, ORDER, Batch, Loader, _random_words, eval_batches
from jepa.data.sources import open_images

VIEW = View(16, (0.3, 1.0))
FLIPPED = replace(VIEW, flip=0.5)

rng = np.random.default_rng()


@pytest.fixture(autouse=True)
def fresh_numbers(inputs_of_its_own: None) -> None:
    global rng
    rng = np.random.default_rng(random.getrandbits(64))


def picture(height: int, width: int) -> Image.Image:
    """Noisy blobs of colour: smooth and sharp parts, like a photograph."""
    blobs = Image.fromarray(rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), np.uint8))
    smooth = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8).copy()


def fill(folder: Path, number: int, size: tuple[int, int] = (40, 48), start: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04}.jpg" for i in range(start, start + number)]
    for path in paths:
        picture(*size).save(path)
    return paths


def loader(path: Path, **options: object) -> Loader:
    return Loader(open_images(path), **{"views": [VIEW], "batch_size": 4, "num_workers": 2} | options)  # type: ignore[arg-type]


# --- crops


def torchvision_box(draw, height, width, scale):
    """torchvision's RandomResizedCrop.get_params for one image; `draw` returns random numbers in [0, 1)."""
    areas, ratios = [draw() for _ in range(10)], [draw() for _ in range(10)]
    down, right = draw(), draw()
    for a, r in zip(areas, ratios, strict=True):
        target = height * width * (scale[0] + a * (scale[1] - scale[0]))
        ratio = math.exp(math.log(3 / 4) + r * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


def test_boxes_are_torchvisions():
    sizes = rng.integers(1, 700, (4000, 2))
    sizes[:500, 0] = rng.integers(1, 12, 500)  # so wide that often no box fits
    uniform = rng.random((4000, 24))
    scale = (0.3, 1.0)
    boxes = random_boxes(sizes, uniform, scale)
    for (height, width), words, box in zip(sizes.tolist(), uniform.tolist(), boxes.tolist(), strict=True):
        assert tuple(box) == torchvision_box(iter(words).__next__, height, width, scale), (
            height,
            width,
            words,
        )


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (100, 900), (3, 3)])
def test_distribution_of_the_keyed_crops(size):
    """The loader's random numbers give the same distribution of crops as independent ones."""
    n, scale, seed = 6000, (0.3, 1.0), random.getrandbits(64)
    words = _random_words(seed, CROP, random.getrandbits(40), 240 * CROP_WORDS, n * CROP_WORDS)
    ours = random_boxes(np.tile(size, (n, 1)), (words >> 11).reshape(n, -1) * 2.0**-53, scale)
    theirs = np.array([torchvision_box(random.random, *size, scale) for _ in range(n)])
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        grid = np.union1d(a, b)
        gap = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / n
        assert gap < 3 * math.sqrt(2 / n), (column, seed)  # Kolmogorov-Smirnov, p < 1e-7


def test_neighbours_share_no_random_number():
    seed = random.getrandbits(64)
    streams = [(stream, index, view) for stream in (CROP, COLOUR, ORDER) for index in (5, 6) for view in (0, 1)]
    words = [_random_words(seed, stream, index, 0, 4096, view) for stream, index, view in streams]
    assert len(np.unique(np.concatenate(words))) == 12 * 4096
    part = _random_words(seed, CROP, 5, 10 * CROP_WORDS, 2 * CROP_WORDS)
    assert np.array_equal(part, words[0][10 * CROP_WORDS : 12 * CROP_WORDS])


# --- pixels

FORMATS = {
    "jpeg": lambda im: encoded(im, "JPEG", quality=92),
    "progressive": lambda im: encoded(im, "JPEG", progressive=True),
    "4:4:4": lambda im: encoded(im, "JPEG", subsampling=0),
    "greyscale": lambda im: encoded(im.convert("L"), "JPEG"),
    "cmyk": lambda im: encoded(im.convert("CMYK"), "JPEG"),
    "rotated by exif": lambda im: encoded(im, "JPEG", exif=orientation(6)),
    "png": lambda im: encoded(im, "PNG"),
    "alpha": lambda im: encoded(with_alpha(im), "PNG"),
    "grey and alpha": lambda im: encoded(im.convert("LA"), "PNG"),
    "palette": lambda im: encoded(im.quantize(32), "PNG"),
    "black and white": lambda im: encoded(im.convert("1"), "PNG"),
    "webp": lambda im: encoded(im, "WEBP"),
    "bmp": lambda im: encoded(im, "BMP"),
    "tiff": lambda im: encoded(im, "TIFF", compression="tiff_lzw"),
    "ppm": lambda im: encoded(im, "PPM"),
}


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.fromarray(rng.integers(0, 256, image.size[::-1], np.uint8)))
    return image


def part(box):
    """A `frame` that decodes the same box of every image and shows all of it."""

    def frame(sizes):
        boxes = np.tile(np.array(box, np.int32), (len(sizes), 1))
        return boxes, (boxes * [0, 0, 1, 1]).astype(np.float32)

    return frame


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_the_rgb_that_pillow_sees(name):
    """Without scaling nothing is resampled: bitwise equal, for any part of the image."""
    height, width, side = 97, 83, 41
    file = FORMATS[name](picture(height, width))
    top, left = random.randint(0, height - side), random.randint(0, width - side)
    image = Decoder("cpu", "cpu", 2)([file], side, part((top, left, side, side)))
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))[top : top + side, left : left + side]
    assert np.array_equal(image[0].numpy(), expected), (top, left)


def test_sixteen_bits_keep_their_upper_eight():
    grey = rng.integers(0, 65536, (50, 50)).astype(np.uint16)
    image = Decoder("cpu", "cpu", 1)([encoded(Image.fromarray(grey), "PNG")], 50, part((0, 0, 50, 50)))
    expected = np.repeat(grey[:, :, None] / 257, 3, axis=2)  # 65535 -> 255
    assert np.abs(image[0].numpy() - expected).max() <= 1


def assert_like_pillow(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Decoding is bitwise equal (above), and both resize with the same triangle filter; only rounding differs.

    Pillow rounds to 8 bits between its two passes, DALI does not. That error is at most half a level, so pixels
    differ by at most one level, and by 0.1 to 0.27 on average (measured). Only the outermost pixels of a
    downscaled crop differ more: there the filter extends beyond the crop's edge, where Pillow ignores the
    missing pixels and DALI repeats the last one.
    """
    gap = np.abs(ours.astype(int) - theirs.astype(int))
    inner = gap[1:-1, 1:-1]
    assert inner.max() <= 1
    assert inner.mean() < 0.35
    assert gap.mean() < 1.0


@pytest.mark.parametrize("side", [32, 64, 224])
def test_crop_and_resize_are_pillows(side):
    for size in [(120, 160), (333, 250), (480, 640)]:
        height, width = rng.integers(np.array(size) // 4, size)
        top, left = random.randint(0, size[0] - height), random.randint(0, size[1] - width)
        for file in (encoded(picture(*size), "JPEG", quality=90), encoded(picture(*size), "PNG")):
            ours = Decoder("cpu", "cpu", 2)([file], side, part((top, left, height, width)))[0].numpy()
            image = Image.open(io.BytesIO(file)).crop((left, top, left + width, top + height))
            assert_like_pillow(ours, np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize(("crop", "resize"), [(32, 32), (32, 40), (64, None), (112, None)])
def test_evaluation_resizes_the_shorter_side_and_takes_the_centre(tmp_path, crop, resize):
    for i, size in enumerate([(130, 190), (301, 222), (32, 32), (64, 100)]):
        picture(*size).save(tmp_path / f"{i}.png")
    batches = list(eval_batches(open_images(tmp_path), crop_size=crop, batch_size=3, resize=resize))
    assert [len(images) for images, _ in batches] == [3, 1] and [numbers for _, numbers in batches] == [[0, 1, 2], [3]]
    shorter = resize or (crop if crop < 96 else round(crop * 256 / 224))
    for i, ours in enumerate(torch.cat([images for images, _ in batches]).numpy()):
        image = Image.open(tmp_path / f"{i}.png")
        width, height = (int(shorter * side / min(image.size)) for side in image.size)
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        assert_like_pillow(ours, np.asarray(resized.crop((left, top, left + crop, top + crop))))


@pytest.mark.parametrize("crop", [32, 112])
def test_a_view_without_a_random_crop_shows_what_evaluation_sees(tmp_path, crop):
    """Also of images whose shape no random crop has, such as CLEVR's 480 x 320."""
    for i, size in enumerate([(320, 480), (130, 190), (500, 120), (64, 64)]):
        picture(*size).save(tmp_path / f"{i}.png")
    seen = {n: x for some, numbers in eval_batches(open_images(tmp_path), crop_size=crop, batch_size=4)
            for x, n in zip(some, numbers, strict=True)}  # fmt: skip
    for flip in (0.0, 1.0):
        made = loader(tmp_path, views=[View(crop, None, flip=flip)], seed=random.getrandbits(60))
        (_, _, batch) = next(made.batches(0, 1))
        for i, image in zip(batch.indices, batch.views[0], strict=True):
            assert torch.equal(image, seen[i].flip(1) if flip else seen[i])


def test_evaluation_keeps_the_order_asked_for_and_leaves_out_bad_files(tmp_path, caplog):
    for name in ("cat", "dog", "emu"):
        fill(tmp_path / name, 3)
    (tmp_path / "dog" / "0001.jpg").write_bytes(b"not an image")
    source = open_images(tmp_path)
    indices = rng.permutation(9)
    numbers = [n for _, some in eval_batches(source, crop_size=16, batch_size=4, indices=indices) for n in some]
    assert numbers == [i for i in indices if i != 4]
    assert source.labels[numbers].tolist() == [i // 3 for i in numbers]
    assert caplog.text.count("dog/0001.jpg") == 1


# --- order


def test_an_epoch_shows_each_image_once_and_epochs_differ(tmp_path):
    fill(tmp_path, 23)
    made = loader(tmp_path, batch_size=5, seed=random.getrandbits(63))
    assert made.steps_per_epoch == 4
    epochs = [[f for s in range(4 * e, 4 * e + 4) for f in made.batch(s).files] for e in range(3)]
    assert all(len(set(files)) == 20 for files in epochs)
    assert len({tuple(files) for files in epochs}) == 3
    assert len({frozenset(files) for files in epochs}) > 1, "the same three images are left out every time"


def test_a_step_can_be_made_again_and_does_not_depend_on_ranks_or_accumulation(tmp_path):
    fill(tmp_path, 20)
    seed, step = random.getrandbits(63), random.randrange(100)
    one = loader(tmp_path, batch_size=8, seed=seed, views=[FLIPPED])
    whole = one.batch(step)
    assert torch.equal(one.batch(step + 1).images, one.batch(step + 1).images)
    assert torch.equal(one.batch(step).images, whole.images)
    ranks = [loader(tmp_path, seed=seed, views=[FLIPPED], world_size=2, rank=r).batch(step) for r in (0, 1)]
    assert torch.equal(torch.cat([r.images for r in ranks]), whole.images)
    parts = loader(tmp_path, seed=seed, views=[FLIPPED], accumulation=2, num_workers=1)
    assert torch.equal(torch.cat([parts.batch(step, m).images for m in (0, 1)]), whole.images)
    assert [f for m in (0, 1) for f in parts.batch(step, m).files] == whole.files
    assert not torch.equal(loader(tmp_path, batch_size=8, seed=seed + 1).batch(step).images, whole.images)


def test_half_of_the_images_are_mirrored_and_otherwise_equal(tmp_path):
    fill(tmp_path, 64, size=(20, 20))
    plain, flipped = (loader(tmp_path, batch_size=64, views=[view]).batch(3).images for view in (VIEW, FLIPPED))
    same = (plain == flipped).flatten(1).all(1)
    mirrored = (plain.flip(2) == flipped).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 8 < mirrored.sum() < 56


# --- views

COLOURFUL = View(24, (0.3, 1.0), 0.5, jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarize=0.2)
LOCAL = replace(COLOURFUL, size=12, scale=(0.05, 0.3))
MANY = [COLOURFUL, LOCAL, COLOURFUL, VIEW, LOCAL, LOCAL]


def views_of(files: list[str], views: list[View], seed: int, step: int, first: int) -> list[np.ndarray]:
    """The definition: each view of each image decoded, cropped and coloured alone, from the words at its place."""

    def uniform(stream: int, number: int, view: int) -> np.ndarray:
        generator = np.random.Philox(key=[seed, step], counter=[0, 0, view, stream])
        words = generator.random_raw((first + len(files)) * number)
        return (words.reshape(-1, number)[first:] >> 11) / 2**53

    made = []
    for v, view in enumerate(views):
        crops, colours = uniform(CROP, 24, v), uniform(COLOUR, 12, v)
        images = []
        for file, numbers, others in zip(files, crops, colours, strict=True):
            content = np.fromfile(file, np.uint8)
            width, height = Image.open(file).size
            box = torchvision_box(iter(numbers.tolist()).__next__, height, width, view.scale)
            image = Decoder("cpu", "cpu", 1)([content], view.size, part(box))
            if numbers[22] < view.flip:
                image = image.flip(2)
            recolour(image, random_colour(view, others[None]))
            images.append(image[0].numpy())
        made.append(np.stack(images))
    return made


@pytest.mark.parametrize("views", [[VIEW], [COLOURFUL], [COLOURFUL, COLOURFUL], MANY], ids=len)
def test_views_are_those_of_the_numbers_at_the_images_place(tmp_path, views):
    """Bit for bit, though an image is decoded once for all of them, and equal views are made in one call."""
    for i in range(3):
        fill(tmp_path, 6, size=(random.randint(30, 90), random.randint(30, 90)), start=6 * i)
    seed, step = random.getrandbits(63), random.randrange(100)
    made = loader(tmp_path, views=views, seed=seed, world_size=2, rank=1).batch(step)
    expected = views_of(made.files, views, seed, step, first=4)
    assert len(made.views) == len(views) and made.images is made.views[0]
    for ours, theirs, view in zip(made.views, expected, views, strict=True):
        assert ours.shape == (4, view.size, view.size, 3) and ours.dtype == torch.uint8
        assert np.array_equal(ours.numpy(), theirs)
    assert len({image.tobytes() for images in made.views for image in images.numpy()}) == 4 * len(views)


def test_views_do_not_depend_on_ranks_accumulation_or_other_views(tmp_path):
    fill(tmp_path, 20)
    seed, step = random.getrandbits(63), random.randrange(100)
    whole = loader(tmp_path, views=MANY, batch_size=8, seed=seed).batch(step).views
    ranks = [loader(tmp_path, views=MANY, seed=seed, world_size=2, rank=r).batch(step).views for r in (0, 1)]
    parts = loader(tmp_path, views=MANY, seed=seed, accumulation=2)
    (_, _, one), (_, _, two) = parts.batches(step, step + 1)
    first = loader(tmp_path, views=MANY[:1], batch_size=8, seed=seed).batch(step).views
    for v, images in enumerate(whole):
        assert torch.equal(torch.cat([views[v] for views in ranks]), images)
        assert torch.equal(torch.cat([one.views[v], two.views[v]]), images)
    assert len(first) == 1 and torch.equal(first[0], whole[0])
    other = loader(tmp_path, views=MANY, batch_size=8, seed=seed).batch(step + 1).views
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_a_bad_file_is_replaced_in_all_views_at_once(tmp_path):
    """Also one of which some views could be decoded: a truncated file."""
    for i, path in enumerate(fill(tmp_path, 24, size=(120, 120))):
        if i % 3 == 0:
            content = path.read_bytes()
            path.write_bytes(content[: int(len(content) * 0.6)])
    seed = random.getrandbits(63)
    made = loader(tmp_path, views=MANY, seed=seed, max_bad_fraction=1.0)
    batches = [made.batch(step) for step in range(6)]
    assert sum(batch.replaced for batch in batches) > 0
    for step, batch in enumerate(batches):
        expected = views_of(batch.files, MANY, seed, step, first=0)
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(batch.views, expected, strict=True))


def test_no_views_are_refused(tmp_path):
    fill(tmp_path, 8)
    with pytest.raises(ValueError, match="views: given none; wanted"):
        loader(tmp_path, views=[])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
def test_views_made_on_a_gpu_are_a_cpus(tmp_path, decoder):
    """DALI resizes on a GPU with other roundings, and its JPEG decoder differs by some levels: compare averages."""
    fill(tmp_path, 16, size=(90, 120))
    made = loader(tmp_path, views=MANY, device="cuda", decoder=decoder).batch(3)
    plain = loader(tmp_path, views=MANY).batch(3)
    assert made.files == plain.files
    for ours, theirs in zip(made.views, plain.views, strict=True):
        gap = (ours.cpu().int() - theirs.int()).abs().float().mean((1, 2, 3))
        assert ours.is_cuda and gap.median() < 3, gap  # solarisation enlarges a difference of one level


# --- bad files

JUNK = [
    lambda file: b"",
    lambda file: b"there is no image here\n" * 40,
    lambda file: file[:60],
    lambda file: file[: len(file) // 10],
]


def test_bad_files_are_named_once_counted_and_replaced(tmp_path, caplog):
    paths = fill(tmp_path, 40)
    for i, path in enumerate(paths[::5]):
        path.write_bytes(JUNK[i % len(JUNK)](path.read_bytes()))
    source = open_images(tmp_path)
    paths[1].unlink()  # vanished after indexing
    bad = {str(path) for path in [*paths[::5], paths[1]]}
    made = Loader(source, [VIEW], batch_size=8, num_workers=2, seed=random.getrandbits(63))
    for step in range(15):
        batch, wanted = made.batch(step), made._order(step // 5)[8 * (step % 5) :][:8]
        assert not bad & set(batch.files)
        assert batch.replaced == sum(source.name(i) in bad for i in wanted)
    assert {source.name(i) for i in made.bad} == bad
    assert all(caplog.text.count(name) == 1 for name in bad)


class Failing:
    """An `open` whose first calls fail."""

    def __init__(self, number: int, code: int) -> None:
        self.left, self.code = number, code

    def __call__(self, path: object, *options: object, **more: object) -> object:
        self.left -= 1
        if self.left >= 0:
            raise OSError(self.code, os.strerror(self.code))
        return open(path, *options, **more)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_failing_disk_is_asked_again_and_then_stops_the_run_but_replaces_no_image(code, tmp_path, monkeypatch):
    fill(tmp_path, 8)
    good = loader(tmp_path, seed=3, batch_size=8).batch(0)
    monkeypatch.setattr(sources, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(sources, "open", Failing(2, code), raising=False)
    again = loader(tmp_path, seed=3, batch_size=8).batch(0)
    assert again.files == good.files and torch.equal(again.images, good.images) and again.replaced == 0
    monkeypatch.setattr(sources, "open", Failing(10**9, code), raising=False)
    broken = loader(tmp_path, seed=3, batch_size=8)
    with pytest.raises(ValueError, match=r"jpg cannot be read: .*, 3 times in"):
        broken.batch(0)
    assert not broken.bad


def test_the_fingerprint_of_a_source_is_its_names_in_order_wherever_it_lies(tmp_path):
    paths = fill(tmp_path / "a", 6)
    found = open_images(tmp_path / "a").fingerprint
    assert found["images"] == 6
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    assert open_images(tmp_path / "elsewhere" / "b").fingerprint == found
    (tmp_path / "list.txt").write_text("".join(f"a/{path.name}\n" for path in reversed(paths)))
    assert open_images(tmp_path / "list.txt").fingerprint["list of images"] != found["list of images"]
    for name in ("x", "y"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for path in paths if name == "x" else [*paths[:3], paths[4], paths[3], paths[5]]:
                tar.add(path, path.name)
    one, other = (open_images(tmp_path / f"{name}.tar").fingerprint for name in ("x", "y"))
    (tmp_path / "x.tar").rename(tmp_path / "elsewhere" / "x.tar")
    assert open_images(tmp_path / "elsewhere" / "x.tar").fingerprint == one
    (tmp_path / "y.tar").rename(tmp_path / "x.tar")
    assert open_images(tmp_path / "x.tar").fingerprint not in (one, other) and one["images"] == 6
    paths[2].rename(paths[2].with_name("0002b.jpg"))
    changed = open_images(tmp_path / "a").fingerprint
    assert changed["images"] == 6 and changed != found


def test_a_part_of_a_source_reads_its_images_and_has_a_fingerprint_of_its_own(tmp_path):
    paths = fill(tmp_path / "a", 8)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in paths:
            tar.add(path, f"{path.stem[-1]}/{path.name}")
    for source in (open_images(tmp_path / "a"), open_images(tmp_path / "x.tar")):
        chosen = np.array(random.sample(range(8), 4))
        part, found = source.take(chosen), {str(source.fingerprint)}
        assert len(part) == 4 and part.classes == source.classes
        for i, index in enumerate(chosen):
            assert part.name(i) == source.name(index) and part.read(i).tobytes() == paths[index].read_bytes()
            assert source.labels is None or part.labels[i] == source.labels[index]
        parts = [chosen, chosen[[1, 0, 2, 3]], np.setdiff1d(range(8), chosen), chosen[:3], np.arange(8)[::-1]]
        found |= {str(source.take(some).fingerprint) for some in parts}
        assert len(found) == 6 and source.take(np.arange(8)).fingerprint == source.fingerprint
        assert source.take(chosen).fingerprint == part.fingerprint


def test_files_that_are_bad_for_some_crops_only_do_not_let_history_into_a_batch(tmp_path):
    """The upper part of a truncated file decodes. A batch is the same whichever batches were made before it."""
    for path in fill(tmp_path, 24, size=(160, 160))[::2]:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * 0.6)])

    def made(steps: list[int]) -> dict[int, Batch]:
        some = loader(tmp_path, views=[View(16, (0.02, 0.1))], max_bad_fraction=1.0, seed=seed)
        batches = {step: some.batch(step) for step in steps}
        assert {some.source.name(i) for i in some.bad} & {f for b in batches.values() for f in b.files}
        return batches

    seed, steps = random.getrandbits(63), list(range(24))
    forwards, backwards = made(steps), made(steps[::-1])
    for step, batch in forwards.items():
        assert batch.files == backwards[step].files
        assert torch.equal(batch.images, backwards[step].images)


def test_a_replacement_is_the_next_good_image_of_the_epoch(tmp_path):
    paths = fill(tmp_path, 30)
    names = loader(tmp_path, batch_size=10, seed=5).batch(1).files
    after = loader(tmp_path, batch_size=10, seed=5).batch(2).files
    for name in (names[4], names[8], names[9], after[0]):
        Path(name).write_bytes(b"")
    assert len(paths) == 30
    assert loader(tmp_path, batch_size=10, seed=5).batch(1).files == [
        *names[:4],
        names[5],
        *names[5:8],
        *[after[1]] * 2,
    ]


def test_too_many_bad_files_stop_the_run_with_their_names(tmp_path):
    paths = fill(tmp_path, 60)
    for path in paths[::2]:
        path.write_bytes(b"junk")
    patient = loader(tmp_path, max_bad_fraction=0.9)
    for step in range(15):
        patient.batch(step)
    assert len(patient.bad) == 30
    with pytest.raises(ValueError, match=r"max_bad_fraction(.|\n)*\.jpg"):
        for _ in loader(tmp_path, max_bad_fraction=0.3).batches(0, 15):
            pass


def test_a_few_bad_files_of_few_do_not_stop_the_run_but_nothing_good_does(tmp_path):
    paths = fill(tmp_path, 8)
    for path in paths[:3]:
        path.write_bytes(b"junk")
    made = loader(tmp_path)
    assert [len(made.batch(step).files) for step in range(6)] == [4] * 6
    for path in paths:
        path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="none of the 8"):
        loader(tmp_path).batch(0)


# --- prefetching


def test_batches_made_ahead_are_the_batches_made_alone(tmp_path):
    fill(tmp_path, 20)
    for prefetch in (0, 1, 3):
        ahead = loader(tmp_path, accumulation=2, prefetch=prefetch)
        places = []
        for step, micro, batch in ahead.batches(3, 7):
            places.append((step, micro))
            alone = loader(tmp_path, accumulation=2).batch(step, micro)
            assert torch.equal(batch.images, alone.images) and batch.files == alone.files
        assert places == [(step, micro) for step in range(3, 7) for micro in (0, 1)]
        assert ahead.wait_seconds > 0


def test_stopping_early_ends_the_threads(tmp_path):
    fill(tmp_path, 20)
    made = loader(tmp_path)
    for _ in made.batches():
        break
    iterator = made.batches(5)
    next(iterator)
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("jepa-data")]


def test_the_interpreter_exits_with_batches_under_way(tmp_path):
    fill(tmp_path, 20)
    script = (
        "from jepa.data.augment import View\nfrom jepa.data.loader import Loader\n"
        "from jepa.data.sources import open_images\n"
        f"made = Loader(open_images({str(tmp_path)!r}), [View(16, (0.3, 1.0))], batch_size=4, num_workers=2)\n"
        "iterator = made.batches()\n"
        "next(iterator)\n"
    )
    begin = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(Path(sources.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)
    assert time.monotonic() - begin < 50


# --- sources


def test_a_folder_tree(tmp_path):
    fill(tmp_path / "b" / "deep", 2)
    fill(tmp_path / "a", 3)
    fill(tmp_path / ".trash", 1)
    (tmp_path / "a" / "._0001.jpg").write_bytes(b"resource fork")
    (tmp_path / "a" / "notes.md").write_text("no image")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    os.rename(tmp_path / "a" / "0002.jpg", tmp_path / "a" / "0002.JPEG")
    source = open_images(tmp_path)
    assert [os.path.relpath(source.name(i), tmp_path) for i in range(len(source))] == [
        "a/0000.jpg",
        "a/0001.jpg",
        "a/0002.JPEG",
        "b/deep/0000.jpg",
        "b/deep/0001.jpg",
    ]
    assert source.classes == ["a", "b"] and source.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.read(4).tobytes() == (tmp_path / "b/deep/0001.jpg").read_bytes()
    fill(tmp_path, 1)
    assert open_images(tmp_path).labels is None, "one image is in no sub-folder"


def test_a_file_list(tmp_path):
    paths = fill(tmp_path / "images", 4)
    listing = tmp_path / "train.txt"
    listing.write_text(f"images/0002.jpg\t10\n{paths[0]}\t9\n\nimages/0001.jpg\t10\n")
    source = open_images(listing)
    assert [Path(source.name(i)).name for i in range(3)] == ["0002.jpg", "0000.jpg", "0001.jpg"]
    assert source.classes == ["9", "10"] and source.labels.tolist() == [1, 0, 1]
    assert source.read(1).tobytes() == paths[0].read_bytes()
    listing.write_text("images/0002.jpg\t10\nimages/0001.jpg\n")
    with pytest.raises(ValueError, match=r"0001\.jpg"):
        open_images(listing)


def pack(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=random.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_tars_give_the_bytes_and_classes_that_went_in(tmp_path):
    shards, expected = [], []
    for s in range(3):
        members = {}
        for i in range(random.randint(2, 5)):
            name = f"{'long' * 40}/{s}.{i}" if i == 1 else f"n{s}/{i}"
            members[f"{name}.jpg"] = os.urandom(random.randint(1, 2000))
            members[f"{name.replace('.', '_')}.json"] = b"{}"
            label = random.choice([3, 7, 20])
            if i != 1:
                members[f"{name}.cls"] = str(label).encode()
            else:
                members[f"{'long' * 40}/{s}.cls"] = f"{label}\n".encode()
            expected.append((members[f"{name}.jpg"], str(label)))
        shards.append(tmp_path / f"train-{s:03}.tar")
        pack(shards[-1], members)
    for path in (tmp_path, f"{tmp_path}/train-{{000..002}}.tar", f"{tmp_path}/train-*.tar"):
        source = open_images(path)
        read = [(source.read(i).tobytes(), source.classes[source.labels[i]]) for i in range(len(source))]
        assert read == expected
    assert source.name(1).startswith(f"{shards[0]}/longlong")


def test_the_index_of_a_tar_is_kept_and_made_again_when_the_tar_changes(tmp_path, monkeypatch):
    shard = tmp_path / "a.tar"
    scans = []
    scan = tars.scan
    monkeypatch.setattr(tars, "scan", lambda path: scans.append(path) or scan(path))
    pack(shard, {"x/1.jpg": b"one", "y/2.png": b"second"})
    for _ in range(2):
        source = open_images(shard)
        assert [source.read(i).tobytes() for i in range(2)] == [b"one", b"second"]
        assert source.classes == ["x", "y"] and source.labels.tolist() == [0, 1]
    assert len(scans) == 1
    pack(shard, {"x/1.jpg": b"1", "y/2.png": b"2", "y/3.png": b"3"})
    os.utime(shard, ns=(0, time.time_ns() + 10**9))
    assert len(open_images(shard)) == 3 and len(scans) == 2
    (tmp_path / "a.tar.index.npz").write_bytes(b"PK not an index")
    assert len(open_images(shard)) == 3 and len(scans) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.index.npz"]


def test_an_index_that_cannot_be_written_is_kept_in_memory(tmp_path, caplog):
    for name in ("a", "b"):
        pack(tmp_path / f"{name}.tar", {"1.jpg": name.encode()})
        (tmp_path / f"{name}.tar.index.npz").mkdir()  # no file can take its place
    source = open_images(tmp_path)
    assert [source.read(i).tobytes() for i in range(2)] == [b"a", b"b"]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    assert len(list(tmp_path.iterdir())) == 4, "nothing half-written is left"


def test_training_from_tars_is_training_from_files(tmp_path):
    paths = fill(tmp_path / "files", 12)
    pack(tmp_path / "tars" / "a.tar", {p.name: p.read_bytes() for p in paths[:5]})
    pack(tmp_path / "tars" / "b.tar", {p.name: p.read_bytes() for p in paths[5:]})
    for step in range(4):
        files, tars = (loader(tmp_path / kind).batch(step) for kind in ("files", "tars"))
        assert torch.equal(files.images, tars.images)


@pytest.mark.parametrize("cut", ["end", "middle", "header"])
def test_a_damaged_tar_is_an_error_not_a_smaller_data_set(tmp_path, cut):
    shard = tmp_path / "a.tar"
    pack(shard, {f"{i}.jpg": os.urandom(3000) for i in range(4)})
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[2]
    if cut == "end":
        content = content[: third.offset_data + 1000]
    elif cut == "middle":
        content = content[: third.offset] + os.urandom(512) + content[third.offset + 512 :]
    else:
        content = b"\x1f\x8b" + os.urandom(5000)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar"):
        open_images(shard)


def test_what_is_not_there_is_said_before_anything_is_built(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "movie.gif").write_bytes(b"GIF89a")
    (tmp_path / "list.txt").write_text("\n")
    pack(tmp_path / "words.tar", {"a.md": b"text"})
    fill(tmp_path / "few", 7)
    for name in ("nothing", "empty", "list.txt", "words.tar", "few/0000.jpg", "w-{0..3}.tar", "none*.tar"):
        with pytest.raises(ValueError, match=name.partition("{")[0].replace("*", r"\*")):
            open_images(tmp_path / name)
    with pytest.raises(ValueError, match=r"7 images(.|\n)*8"):
        loader(tmp_path / "few", accumulation=2)
    with pytest.raises(ValueError, match=r"data\.decoder"):
        loader(tmp_path / "few", decoder="gpu")
    with pytest.raises(ValueError, match="resize"):
        next(eval_batches(open_images(tmp_path / "few"), crop_size=32, batch_size=2, resize=16))
