"""Pictures that are damaged in any way are one error that names them."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jepa.probes.picture_files import open_picture


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_cut_or_changed_anywhere_is_whole_or_named(suffix: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(random.getrandbits(32)), tmp_path / f"picture.{suffix}"
    pixels = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    if suffix == "png":
        assert np.array_equal(np.asarray(open_picture(path)), pixels)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole[: rng.integers(0, len(whole))] if rng.random() < 0.5 else whole)
        for place in rng.integers(0, len(damaged), rng.integers(1, 9)) if damaged else ():
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            assert open_picture(path).size
        except ValueError as error:
            assert str(error).startswith(f"{path} cannot be read (") and "\n" not in str(error)
            refused += 1
    assert refused > 10
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot be read \(No such file"):
        open_picture(path)
