"""Jobs for protocols, without files of weights and without a launcher."""

import argparse
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from jepa.model.vit import build_encoder
from jepa.probes import job as jobs
from jepa.probes.job import Job, Subject, digest
from jepa.ranks.distributed import Ranks
from small import small_config


def job_of(out: Path, protocol: ModuleType, *words: object) -> tuple[Job, argparse.Namespace]:
    """A job of the process group that is up, with a small random encoder, the same on all ranks, and its options.

    `words`: the data set's folder, then further options.
    """
    config, group = small_config(), dist.group.WORLD
    assert group is not None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = build_encoder(config).eval().requires_grad_(False)
    parser = argparse.ArgumentParser()
    jobs.arguments(parser)
    protocol.arguments(parser)
    args = parser.parse_args(["weights", "--data", *map(str, words), "--workers", "0"])
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.HashStore(), group)
    out.mkdir(parents=True, exist_ok=True)
    return Job("weights", [Subject("encoder", encoder, digest(encoder))], config, ranks, out), args
