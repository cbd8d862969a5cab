"""Which images are labelled when few are, and that no others are used."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa.data.sources import open_images
from jepa.probes import linear, lowshot
from jepa.probes.features import features
from jepa.probes.linear import linear_probe
from jepa.probes.lowshot import drawn, listed
from probing import Encoder, job_of, options, pixels_of, write_shades


def test_a_list_of_a_share_that_papers_report_is_named_after_it() -> None:
    """SimCLR's list has 12,811 of ImageNet's 1,281,167 images."""
    assert lowshot.share_of(12_811, 1_281_167) == "1%" and lowshot.share_of(128_116, 1_281_167) == "10%"
    assert lowshot.share_of(random.randint(2, 8) * 1000, 100_000) is None


@pytest.mark.parametrize("wanted", ["1%", "10%", "2.5%", "100%", "1", "7"])
def test_each_class_gets_its_share(wanted: str) -> None:
    sizes, seed = [7, 100, 49, 250], random.getrandbits(31)
    y = np.random.default_rng(seed).permutation(np.repeat([0, 3, 4, 9], sizes))
    chosen = drawn(y, wanted, seed)
    assert (np.diff(chosen) > 0).all()
    for label, size in zip((0, 3, 4, 9), sizes, strict=True):
        found = (y[chosen] == label).sum()
        if wanted.endswith("%"):
            exact = size * float(wanted[:-1]) / 100
            assert abs(found - exact) <= 0.5 if exact >= 1 else found == 1
        else:
            assert found == int(wanted)
    assert drawn(y, wanted, seed).tolist() == chosen.tolist()
    if wanted != "100%":
        assert drawn(y, wanted, seed + 1).tolist() != chosen.tolist()


@pytest.mark.parametrize("wanted", ["0", "0%", "101%", "-1", "ten", "1 %", "1.5", ""])
def test_what_is_no_share_is_refused(wanted: str) -> None:
    with pytest.raises(ValueError, match="wanted a share such as 1% or 10%, or a number of images per class"):
        drawn(np.array([0, 1, 1]), wanted, 0)


def test_more_images_than_a_class_has_are_refused() -> None:
    with pytest.raises(ValueError, match="--labels 2: a class has only 1 images"):
        drawn(np.array([0, 1, 1]), "2", 0)


def test_a_list_names_images_by_path_or_by_file(tmp_path: Path) -> None:
    write_shades(tmp_path, {"train": 3})
    source, path = open_images(tmp_path / "train"), tmp_path / "few.txt"
    for i, folder in enumerate(("dark", "light")):  # file names of their own, beside those in both classes
        (tmp_path / "train" / folder / "2.png").rename(tmp_path / "train" / folder / f"own{i}.png")
    source = open_images(tmp_path / "train")
    names = [source.name(i).removeprefix(f"{tmp_path}/train/") for i in range(len(source))]

    def of(*lines: str) -> list[int]:
        path.write_text("\ufeff" + "\r\n".join(lines) + "\n\n")
        return listed(source, path).tolist()

    chosen = sorted([names.index("light/1.png"), names.index("dark/own0.png"), names.index("dark/1.png")])
    assert of("light/1.png", "own0.png", str(tmp_path / "train/dark/1.png")) == chosen
    for lines, pattern in (
        (("light/9.png",), "'light/9.png' names 0 images of"),
        (("own0.png", "1.png"), "'1.png' names 2 images of .*; wanted one"),
        (("own0.png", "light/1.png", "dark/own0.png"), "1 lines name an image again"),
        ((), "is empty; wanted the labelled images, one a line"),
    ):
        with pytest.raises(ValueError, match=pattern) as caught:
            of(*lines)
        assert "\n" not in str(caught.value) and "few.txt" in str(caught.value)


def test_only_the_labelled_images_are_fitted(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same probe on the same features, whose rows are checked against features computed directly."""
    monkeypatch.setattr(linear, "STEPS", 40)
    write_shades(tmp_path, {"train": 9, "val": 6})
    for split in ("train", "val"):  # some are in the wrong class, so that the accuracy depends on which are taken
        for i in (0, 1):
            dark, light, other = (tmp_path / split / name for name in (f"dark/{i}.png", f"light/{i}.png", "other.png"))
            dark.rename(other)
            light.rename(dark)
            other.rename(light)
    encoder, sets = Encoder(), [open_images(tmp_path / split) for split in ("train", "val")]
    job, folders = job_of(encoder, tmp_path / "out"), ("--train", tmp_path / "train", "--val", tmp_path / "val")
    args = options(lowshot, *folders, "--labels", "4")
    x, val_x = (features(job, job.subjects[0], source, args)[:] for source in sets)
    for found, source in zip((x, val_x), sets, strict=True):
        torch.testing.assert_close(found, encoder.plain(pixels_of(source.files)).mean(1).float())
    y, val_y = sets[0].labels, sets[1].labels
    for words, chosen in (
        (("--labels", "4", "--seed", "5"), drawn(y, "4", 5)),
        (("--list", tmp_path / "few.txt"), np.array([0, 3, 4, 8, 10, 11, 15])),
    ):
        (tmp_path / "few.txt").write_text("\n".join(sets[0].files[i] for i in chosen))
        (row, *_) = lowshot.run(job, options(lowshot, *folders, *words)).rows
        name = "4" if "--labels" in words else "few.txt"
        wanted = linear_probe(x[chosen], torch.from_numpy(y[chosen]), val_x, torch.from_numpy(val_y))
        assert row == {"features": "encoder", name: 100 * wanted}
