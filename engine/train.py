"""Pretrains a vision transformer by joint-embedding prediction (I-JEPA, C-JEPA).

    deepspeed engine/train.py --config engine/configs/in1k_vith14_cjepa.yaml data.root_path=/data/imagenet

Any key of the config can be set behind it as section.key=value. torchrun, srun and plain python start it too.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from jepa import checkpoint, distributed, zero
from jepa.budget import report
from jepa.config import Config, ConfigError, load_config
from jepa.data import DataError, Loader, open_images
from jepa.masks import MaskSpec, sample_masks
from jepa.metrics import RunLog, collapse_warning, health
from jepa.objective import JepaModel
from jepa.schedules import Schedules
from jepa.teacher import Teacher
from jepa.vit import build_encoder


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="YAML", help="a file such as those in engine/configs")
    parser.add_argument("--dry-run", action="store_true", help="validate, print what the run would be, touch nothing")
    parser.add_argument("--world-size", type=int, metavar="N", help="number of ranks that --dry-run reckons with")
    parser.add_argument("--resume", nargs="?", const="latest", metavar="CHECKPOINT", help="go on from the latest, or from a path")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def train(config: Config, resume: str | None) -> None:
    ranks = distributed.start(config.engine.device)
    source = open_images(config.data.folder)
    loader = Loader(source, config, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)
    micro_batch, accumulation, global_batch = config.batch(ranks.world_size)
    schedules = Schedules(config, loader.steps_per_epoch)
    folder, tag = Path(config.logging.folder), config.logging.write_tag

    torch.manual_seed(config.engine.seed)
    model = JepaModel(config).to(ranks.device)
    target_encoder = copy.deepcopy(model.encoder)
    engine = zero.start(model, config)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    teacher = Teacher(target_encoder.to(dtype), engine)

    progress = checkpoint.Progress()
    if resume:
        progress = checkpoint.resume(resume, engine, config)
        teacher.refresh()
    elif checkpoint.candidates(folder, tag):
        raise checkpoint.CheckpointError(
            f"{folder} already holds checkpoints of {tag!r}: add --resume to go on from the newest, "
            "or choose another logging.folder or logging.write_tag"
        )
    evaluation = OnlineEvaluation(config, ranks, teacher.encoder) if config.eval.every else None
    last_step = min(schedules.total_steps, config.engine.max_steps or schedules.total_steps)
    log = RunLog(config, progress.step, last_step)
    log.say(f"{config.meta.model_name} on {ranks.world_size} x {ranks.device.type}: {len(source.files)} images, "
            f"{loader.steps_per_epoch} steps of {global_batch} images an epoch, {last_step} steps")  # fmt: skip

    skipped_in_a_row, unlogged, clock = 0, [], time.perf_counter()
    batches = loader.iterate(progress.step)
    while progress.step < last_step:
        step = progress.step
        lr, weight_decay, momentum = (
            schedules.lr(progress.applied),
            schedules.weight_decay(progress.applied),
            schedules.momentum(progress.applied),
        )
        zero.schedule(engine, lr, weight_decay, momentum)
        for micro in range(accumulation):
            batch = next(batches)
            first = (micro * ranks.world_size + ranks.rank) * micro_batch
            masks = sample_masks(
                config.mask_spec, seed=config.engine.seed, step=step, first=first, batch=micro_batch
            )
            context, targets = (index.to(ranks.device, non_blocking=True) for index in (masks.context, masks.target))
            features = teacher(batch.images)
            output = engine(batch.images, context, targets, features)
            engine.backward(output.losses.total)
            applied, grad_norm = zero.step(engine)
