"""Jobs for the probes without files of weights, a small encoder that counts what it sees, and images for it."""

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from jepa.config.schema import Config
from jepa.model.vit import VisionTransformer
from jepa.probes.job import Job, Subject, digest
from jepa.ranks.distributed import Ranks
from plain import MEAN, STD, embedded, encoded
from small import small_config

SIZE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 24, 3, 2


class Stopped(Exception):
    pass


class Encoder(VisionTransformer):
    """An encoder of 32 px images with patches of 8, 24 wide and 3 deep, of random weights that all matter.

    `seen`: the sizes of the batches so far; at the batch after the first `stop_after` it raises Stopped.
    """

    def __init__(self) -> None:
        super().__init__(SIZE, PATCH, WIDTH, DEPTH, HEADS, mean=MEAN, std=STD)
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        self.eval().requires_grad_(False)
        self.seen: list[int] = []
        self.stop_after = 10**9

    def features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        if len(self.seen) >= self.stop_after:
            raise Stopped
        self.seen.append(len(images))
        return super().features(images, layers)

    def plain(self, images: np.ndarray, layer: int = -1) -> Tensor:
        """The normed output of a block by plain float64 arithmetic: uint8 [B, 32, 32, 3] -> [B, N, D]."""
        w = {name: value.double() for name, value in self.named_parameters()}
        x = embedded(torch.from_numpy(images), w, PATCH)
        return encoded(x, w, layer % DEPTH + 1, HEADS)


@contextmanager
def alone() -> Iterator[None]:
    """This process as the only rank of a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def config_of(*overrides: str) -> Config:
    size = (f"data.crop_size={SIZE}", f"mask.patch_size={PATCH}", f"meta.embed_dim={WIDTH}", f"meta.depth={DEPTH}")
    return small_config(*size, f"meta.num_heads={HEADS}", *overrides)


def ranks_up() -> Ranks:
    """Those of the process group that is up."""
    group = dist.group.WORLD
    assert group is not None
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.HashStore(), group)


def job_of(encoder: nn.Module, out: Path, config: Config | None = None) -> Job:
    """With one subject, on the ranks of the process group that is up."""
    out.mkdir(parents=True, exist_ok=True)
    judged = Subject("encoder", cast(VisionTransformer, encoder), digest(encoder))
    return Job("weights", [judged], config or config_of(), ranks_up(), out)


def options(protocol: ModuleType, *words: object) -> argparse.Namespace:
    """The options of a protocol, without those that all share."""
    parser = argparse.ArgumentParser()
    protocol.arguments(parser)
    return parser.parse_args([str(word) for word in words])


def write_shades(folder: Path, splits: dict[str, int], size: int = SIZE) -> None:
    """PNGs of one colour and a little noise in two classes, dark and light, with so many of each in a split."""
    for split, images in splits.items():
        for darkest, name in ((0, "dark"), (160, "light")):
            (folder / split / name).mkdir(parents=True)
            for i in range(images):
                colour = [random.randint(darkest, darkest + 60) for _ in range(3)]
                noise = np.random.default_rng(random.getrandbits(32)).integers(0, 30, (size, size, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(folder / split / name / f"{i}.png")


def pixels_of(paths: Sequence[Path | str]) -> np.ndarray:
    """uint8 [B, H, W, 3]."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
