"""Shared by several tests: a small run, and real processes that form a process group."""

import itertools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from jepa.config.file import SECTIONS, parse_config
from jepa.config.schema import Config, settings_of
from jepa.model.layout import Layout
from jepa.ranks.distributed import leave
from jepa.state.partitions import flats

MAPPING: dict[str, dict[str, Any]] = {
    "meta": {
        "model_name": "vit_tiny", "embed_dim": 24, "depth": 2, "num_heads": 2,
        "pred_depth": 2, "pred_emb_dim": 16, "pred_num_heads": 2, "use_bfloat16": False,
    },
    "data": {"root_path": "nowhere", "batch_size": 4, "crop_size": 32, "num_workers": 1},
    "mask": {"patch_size": 4, "min_keep": 4},
    "optimization": {"epochs": 2, "warmup": 0.5, "lr": 1e-3, "start_lr": 1e-4},
    "loss": {"objective": "cjepa", "projector": [12, 8]},
    "engine": {"device": "cpu"},
    "logging": {"folder": "nowhere", "log_freq": 1},
}  # fmt: skip


KEYS = [
    f"{section}.{key}"
    for section, model in {**SECTIONS, "loss": settings_of("cjepa")}.items()
    for key in model.model_fields
]  # of a C-JEPA's config


def small_config(*overrides: str) -> Config:
    """A C-JEPA: 32 px images, patch 4, encoder 24 x 2, predictor 16 x 2, fp32, with `section.key=value` overrides."""
    return parse_config(MAPPING, list(overrides))


def every_row(context: Any, target_MBK: Tensor) -> Layout:
    """The layout for target features of all patches, in order."""
    return Layout(context, target_MBK, (), target_MBK, (0, target_MBK.shape[-1]))


def run_ranks(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `work(*args)` in `world_size` processes that form a gloo group; returns what each returned.

    `work` is a module-level function; an exception in any process is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one_rank, (world_size, folder, work, args), nprocs=world_size)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _one_rank(rank: int, world_size: int, folder: str, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        torch.save(work(*args), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    leave(lambda: 0)


def whole_weights(model_engine: Any, kind: str = "weight") -> dict[str, Tensor]:
    """The fp32 weights, or a kind of optimizer state, of all parameters by name, gathered from all ranks."""
    mine = []
    for flat in flats(model_engine):
        values = flat.weight if kind == "weight" else model_engine.basic_optimizer.state[flat.weight].get(kind)
        if values is not None:
            line = values.detach().flatten()
            mine += [(p.name, p.start, line[p.offset : p.offset + p.length].clone()) for p in flat.fragments]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    sizes: dict[str, int] = {}
    for name, start, values in itertools.chain(*everything):
        sizes[name] = max(sizes.get(name, 0), start + len(values))
    whole = {name: torch.full((size,), float("nan")) for name, size in sizes.items()}
    for name, start, values in itertools.chain(*everything):
        whole[name][start : start + len(values)] = values
    return whole
