"""What several tests need: a run small enough for them, and real processes that form a group."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jepa.config import Config, parse_config

MAPPING = {
    "meta": {
        "model_name": "vit_tiny", "embed_dim": 24, "depth": 2, "num_heads": 2,
        "pred_depth": 2, "pred_emb_dim": 16, "pred_num_heads": 2, "use_bfloat16": False,
    },
    "data": {"root_path": "nowhere", "batch_size": 4, "crop_size": 32, "num_workers": 1},
    "mask": {"patch_size": 4, "min_keep": 4},
    "optimization": {"epochs": 2, "warmup": 0.5, "lr": 1e-3, "start_lr": 1e-4},
    "loss": {"objective": "cjepa", "projector": [12, 8]},
    "logging": {"folder": "nowhere", "log_freq": 1},
}  # fmt: skip


def small_config(*overrides: str) -> Config:
    """A C-JEPA of 32 px images, patch 4, encoder 24 x 2 and predictor 16 x 2, in fp32; `section.key=value` changes it."""
    return parse_config(MAPPING, list(overrides))


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
