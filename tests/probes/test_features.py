"""Stored features against the encoder computed directly, and when they are computed, taken and refused."""

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from jepa.data.sources import open_images
from jepa.probes import features as protocol
from jepa.probes import job as jobs
from jepa.probes.features import Features, features, pixels
from jepa.ranks.distributed import Ranks
from jepa.state.interop import Weights, save_safetensors
from probing import DEPTH, SIZE, Encoder, Stopped, alone, config_of, job_of, options, pixels_of, write_shades
from small import run_ranks

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Of 10 images, number 3 (dark/3.png) cannot be decoded."""
    write_shades(tmp_path, {"set": 5})
    (tmp_path / "set/dark/3.png").write_bytes(b"not an image")
    return tmp_path / "set"


GOOD = [0, 1, 2, 4, 5, 6, 7, 8, 9]


def stored(
    encoder: Encoder, images: Path, out: Path, *words: object, pooled: bool = True, crop: int = SIZE
) -> Features:
    """On the ranks that are up, in batches of 2."""
    job = job_of(encoder, out, config_of(f"data.crop_size={crop}"))
    args = options(protocol, "--images", images, "--encoder-batch", 2, *words)
    return features(job, job.subjects[0], open_images(images), args, pooled=pooled)


def good_pixels(images: Path) -> np.ndarray:
    files = open_images(images).files
    return pixels_of([files[i] for i in GOOD])


@pytest.mark.parametrize("layers", [1, 2, DEPTH])
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "patches"])
def test_rows_are_the_outputs_of_the_last_blocks(
    one_rank: None, images: Path, tmp_path: Path, layers: int, pooled: bool
) -> None:
    encoder = Encoder()
    found = stored(encoder, images, tmp_path / "out", "--layers", layers, pooled=pooled)
    wanted = [encoder.plain(good_pixels(images), layer) for layer in range(DEPTH - layers, DEPTH)]
    rows = torch.cat([x.mean(1) if pooled else x.flatten(1) for x in wanted], 1)
    assert found.numbers.tolist() == GOOD and found.shape == rows.shape and len(found) == len(rows)
    every = found[:]
    assert every.dtype == torch.float32
    torch.testing.assert_close(every.double(), rows, **CLOSE)
    chosen = np.random.default_rng(random.getrandbits(32)).integers(0, 9, 20)
    assert torch.equal(found[chosen], every[chosen]) and torch.equal(found[torch.from_numpy(chosen)], every[chosen])
    assert torch.equal(found[4:7], every[4:7])
    few = found.only(np.array([9, 3, 2, 4]))
    assert few.numbers.tolist() == [2, 4, 9] and torch.equal(few[:], every[[2, 3, 8]]) and few.shape[0] == 3


def test_pixels_are_averages_of_the_images(one_rank: None, images: Path, tmp_path: Path) -> None:
    job, args = job_of(Encoder(), tmp_path / "out"), options(protocol, "--images", images, "--layers", 3)
    found = features(job, pixels(), open_images(images), args)
    means = good_pixels(images).astype(float).reshape(9, 16, 2, 16, 2, 3).mean((2, 4)) / 255
    torch.testing.assert_close(found[:].double(), torch.from_numpy(means.transpose(0, 3, 1, 2)).flatten(1), **CLOSE)


def test_the_protocol_says_how_many_images_are_usable(one_rank: None, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "light", tmp_path / "light")
    words = ("--images", images, "--images", tmp_path / "light", "--patches")
    (row,) = protocol.run(job_of(Encoder(), tmp_path / "out"), options(protocol, *words)).rows
    assert row == {"features": "encoder", str(images): 90.0, str(tmp_path / "light"): 100.0}


def on_ranks(encoder: Encoder, images: Path, out: Path) -> tuple[int, torch.Tensor, list[int]]:
    """How many images this rank computes, and the rows. The last begins when the first has done its part."""
    if dist.get_rank() == dist.get_world_size() - 1:
        look, end = protocol.Store.state, time.monotonic() + 60

        def late(store: Any) -> np.ndarray:
            while (look(store) == protocol.DONE).sum() < 6 and time.monotonic() < end:
                time.sleep(0.01)
            return look(store)

        protocol.Store.state = late
    found = stored(encoder, images, out)
    return sum(encoder.seen), found[:], found.numbers.tolist()


@pytest.mark.ranks
def test_an_interrupted_pass_goes_on_also_on_other_ranks(images: Path, tmp_path: Path) -> None:
    encoder = Encoder()
    with alone():
        whole = stored(encoder, images, tmp_path / "whole")[:]
        assert sum(encoder.seen) == 9
        for out in ("one", "two"):
            encoder.seen, encoder.stop_after = [], 2
            with pytest.raises(Stopped):
                stored(encoder, images, tmp_path / out)
            assert encoder.seen == [2, 1], "two whole batches and a part of the second, without the damaged image"
        encoder.seen, encoder.stop_after = [], 10**9
        assert torch.equal(stored(encoder, images, tmp_path / "one")[:], whole) and sum(encoder.seen) == 6
        assert torch.equal(stored(encoder, images, tmp_path / "one")[:], whole) and sum(encoder.seen) == 6
    encoder.seen = []
    together = run_ranks(2, on_ranks, encoder, images, tmp_path / "two")
    assert [seen for seen, _, _ in together] == [3, 3], "of the seven left, one is damaged"
    for _, rows, numbers in together:
        torch.testing.assert_close(rows, whole, **CLOSE)
        assert numbers == GOOD


def folders(out: Path) -> int:
    return len(list((out / "features").iterdir()))


def test_what_differs_is_not_shared(one_rank: None, images: Path, tmp_path: Path) -> None:
    """Other weights, another crop, patches, and other images under the same names."""
    encoder, out = Encoder(), tmp_path / "out"
    first = stored(encoder, images, out)[:]

    def computed(expected: int, *given: Any, **more: Any) -> Features:
        encoder.seen = []
        found = stored(*given, **more)
        assert sum(encoder.seen) == expected
        return found

    assert torch.equal(computed(0, encoder, images, out)[:], first) and folders(out) == 1
    other = Encoder()
    assert not torch.allclose(stored(other, images, out)[:], first) and sum(other.seen) == 9
    computed(9, encoder, images, out, pooled=False)
    encoder.allow(48)
    assert not torch.allclose(computed(9, encoder, images, out, crop=48)[:], first)
    assert folders(out) == 4

    file = images / "dark/1.png"
    before, pixels = file.stat(), good_pixels(images)
    changed = file.read_bytes()
    shutil.copy(images / "light/1.png", file)
    with file.open("ab") as more:  # which readers of PNG ignore
        more.write(b"\0" * (1 + max(0, before.st_size - file.stat().st_size)))
    wanted = encoder.plain(good_pixels(images)).mean(1)
    assert not np.array_equal(good_pixels(images), pixels)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # only the size differs
    assert file.stat().st_size != before.st_size
    torch.testing.assert_close(computed(9, encoder, images, out)[:].double(), wanted, **CLOSE)
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # only the time differs
    torch.testing.assert_close(computed(9, encoder, images, out)[:], first, **CLOSE)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    computed(0, encoder, images, out)
    shutil.copytree(images, tmp_path / "copy")  # times of change come along
    computed(0, encoder, tmp_path / "copy", out)
    assert folders(out) == 6
    about = [json.loads(path.read_text()) for path in out.rglob("about.json")]
    assert {one["path"] for one in about} == {str(images), str(tmp_path / "copy")}


def test_weights_that_see_images_by_another_mean_do_not_share(one_rank: None, images: Path, tmp_path: Path) -> None:
    encoder = Encoder()
    tensors = dict(encoder.named_parameters())
    shapes = {"target_encoder": {name: list(value.shape) for name, value in tensors.items()}}
    ranks, rows = Ranks(0, 1, torch.device("cpu"), dist.HashStore(), dist.group.WORLD), []
    for name, mean in (("a", 0.4), ("b", 0.5), ("c", 0.4)):
        config = config_of(f"data.mean=[{mean}, 0.5, 0.6]", "data.std=[0.2, 0.3, 0.25]")
        weights = Weights(config, {"epoch": 0, "step": 0, "samples": 0}, shapes, lambda _, name: tensors[name])
        save_safetensors(weights, ["target_encoder"], torch.float32, tmp_path / f"{name}.safetensors")
        words = (tmp_path / f"{name}.safetensors", "--out", tmp_path / "out", "--only", "--images", images)
        parser = jobs.argparse.ArgumentParser()
        jobs.arguments(parser)
        protocol.arguments(parser)
        args = parser.parse_args([str(word) for word in words])
        job = jobs.open_job(args, ranks)
        rows.append(features(job, job.subjects[0], open_images(images), args)[:])
    torch.testing.assert_close(rows[0].double(), encoder.plain(good_pixels(images)).mean(1), **CLOSE)
    assert folders(tmp_path / "out") == 2 and torch.equal(rows[0], rows[2]) and not torch.allclose(rows[0], rows[1])


def test_more_blocks_join_those_that_are_stored(one_rank: None, images: Path, tmp_path: Path) -> None:
    encoder, out = Encoder(), tmp_path / "out"
    last = stored(encoder, images, out)[:]
    (folder,) = (out / "features").iterdir()
    before = (folder / f"block-{DEPTH - 1}.f32").stat()
    both = stored(encoder, images, out, "--layers", 2)[:]
    assert torch.equal(both[:, -last.shape[1] :], last) and folders(out) == 1
    assert (folder / f"block-{DEPTH - 1}.f32").stat().st_ino == before.st_ino
    assert sorted(path.name for path in folder.iterdir()) == [
        "about.json", "block-1.f32", "block-1.state", "block-2.f32", "block-2.state"
    ]  # fmt: skip
    encoder.seen = []
    assert torch.equal(stored(encoder, images, out)[:], last)
    assert torch.equal(stored(encoder, images, out, "--layers", 2)[:], both) and encoder.seen == []


@pytest.mark.parametrize("lost", ["f32", "state"])
def test_a_file_that_is_lost_is_computed_again(one_rank: None, images: Path, tmp_path: Path, lost: str) -> None:
    encoder, out = Encoder(), tmp_path / "out"
    before = stored(encoder, images, out)[:]
    (path,) = out.rglob(f"*.{lost}")
    for damage in (path.unlink, lambda: os.truncate(path, 5)):
        damage()
        encoder.seen = []
        assert torch.equal(stored(encoder, images, out)[:], before) and sum(encoder.seen) == 9


def test_features_that_are_not_finite_are_refused_and_not_taken_later(
    one_rank: None, images: Path, tmp_path: Path
) -> None:
    encoder = Encoder()
    job, args = job_of(encoder, tmp_path / "out"), options(protocol, "--images", images)
    for value in (torch.nan, torch.inf):
        encoder.norm.bias.data[3] = value  # the same key of weights
        with pytest.raises(ValueError, match="the features contain NaN or infinity"):
            features(job, job.subjects[0], open_images(images), args)
    encoder.norm.bias.data[3] = 0.5
    found = features(job, job.subjects[0], open_images(images), args)
    torch.testing.assert_close(found[:].double(), encoder.plain(good_pixels(images)).mean(1), **CLOSE)


def test_a_disk_that_fills_up_is_told_and_images_of_which_none_is_usable(
    one_rank: None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job, args = job_of(Encoder(), tmp_path / "out"), options(protocol, "--images", images)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\); choose another --store"):
            features(job, job.subjects[0], open_images(images), args)
    assert len(features(job, job.subjects[0], open_images(images), args)) == 9, "what was not written is done now"
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/1.jpg").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"none of the 1 images of .*junk can be decoded"):
        features(job, job.subjects[0], open_images(tmp_path / "junk"), args)


def test_mistakes_are_found_before_the_work(one_rank: None, images: Path, tmp_path: Path) -> None:
    encoder = Encoder()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/store/.* cannot be written \(.*\); choose another --store") as caught:
        stored(encoder, images, tmp_path / "out", "--store", tmp_path / "file/store")
    assert "\n" not in str(caught.value)
    for layers in (0, -1, DEPTH + 1):
        with pytest.raises(ValueError, match=rf"--layers {layers}: must be from 1 to the encoder's {DEPTH} blocks"):
            stored(encoder, images, tmp_path / "out", "--layers", layers)
    assert encoder.seen == []
    elsewhere = stored(encoder, images, tmp_path / "out", "--store", tmp_path / "else")
    assert len(elsewhere) == 9 and not (tmp_path / "out/features").exists() and (tmp_path / "else").is_dir()
