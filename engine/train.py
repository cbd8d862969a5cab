"""Pretrains a vision transformer by joint-embedding prediction (I-JEPA, C-JEPA).

    deepspeed engine/train.py --config engine/configs/in1k_vith14_ep300_cjepa.yaml data.root_path=/data/imagenet

Any key of the config can be set behind it as section.key=value. torchrun, srun and plain python start it too.
"""

import argparse
import copy
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jepa import checkpoint, distributed, zero
from jepa.budget import report
from jepa.config import Config, ConfigError, load_config
from jepa.data import Batch, Loader, open_images
from jepa.masks import sample_masks
from jepa.metrics import RunLog, collapse_warning, health
from jepa.objective import JepaModel, Losses
from jepa.probe import OnlineProbe
from jepa.schedules import Schedules
from jepa.teacher import Teacher


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says what to do."""


def train(config: Config, resume: str | None) -> None:
    if config.mask.mode == "packed":
        raise ConfigError(["mask.mode = 'packed': the sampler draws it, the encoder cannot run it yet; give unbiased"])
    ranks = distributed.start(config.engine.device)
    micro_batch, accumulation, global_batch = config.batch(ranks.world_size)
    data = config.data
    loader = Loader(
        open_images(data.folder),
        crop_size=data.crop_size,
        crop_scale=data.crop_scale,
        horizontal_flip=data.use_horizontal_flip,
        batch_size=micro_batch,
        accumulation=accumulation,
        seed=config.engine.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        decoder=data.decoder,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        max_bad_fraction=data.max_bad_fraction,
    )
    schedules = Schedules(config, loader.steps_per_epoch)
    all_steps = config.optimization.epochs * loader.steps_per_epoch
    last_step = min(all_steps, config.engine.max_steps or all_steps)
    probe = OnlineProbe(config, ranks.rank, ranks.world_size, ranks.device) if config.eval.every else None

    engine, teacher = start_model(config, ranks.device)
    saver = checkpoint.Saver(config, engine, loader.steps_per_epoch)
    progress = saver.resume(resume) if resume else saver.begin()
    if progress.applied:
        teacher.refresh()

    log = RunLog(config, progress.step, last_step, loader.steps_per_epoch, global_batch)
    log.say(
        f"{config.meta.model_name} ({config.loss.objective}), {len(loader.source)} images, {global_batch} a step on "
        f"{ranks.world_size} x {ranks.device.type}; steps {progress.step} to {last_step} of {all_steps}"
    )
    skipped_in_a_row = 0
    batches = loader.batches(progress.step, last_step)
    for step in range(progress.step, last_step):
        waited_before = loader.wait_seconds
        lr = schedules.lr(progress.applied)
        weight_decay = schedules.weight_decay(progress.applied)
        momentum = schedules.momentum(progress.applied)
        zero.schedule(engine, lr, weight_decay, momentum)

        done = take_step(config, ranks, engine, teacher, batches, step)
        progress.count(done.applied, global_batch)
        log.step(step, done.losses, *done.tokens, loader.wait_seconds - waited_before)
        if done.applied:
            skipped_in_a_row = 0
        else:
            skipped_in_a_row += 1
            log.say(f"step {step} skipped: its gradient is not finite; images {', '.join(done.files[:3])}, ...")
            if skipped_in_a_row >= config.engine.max_skipped:
                raise TrainingError(
                    f"{skipped_in_a_row} steps in a row had a gradient that is not finite; stopped at step {step}. "
                    "The last checkpoint is whole: lower optimization.lr or set optimization.clip_grad and --resume"
                )

        found: dict[str, float] = {}
        if done.applied and progress.step % config.logging.health_freq == 0:
            found |= health(done.target_BND, done.predicted_RD) | {"teacher_distance": teacher.distance()}
            if warning := collapse_warning(found):
                log.say(f"step {step}: {warning}")
        if probe and progress.step % config.eval.every == 0:
            found |= probe(teacher.encoder)
            log.say(f"step {step}: k-NN of the target encoder {100 * found['knn']:.1f} %")
        if found or progress.step % config.logging.log_freq == 0 or progress.step == last_step:
            log.flush(lr=lr, weight_decay=weight_decay, momentum=momentum, grad_norm=done.grad_norm, **found)
        if saver.due(progress.step) or progress.step == last_step:
            log.say(f"saved {saver.save(progress)}")
        if found or saver.due(progress.step):
            log.restart_clock()

    log.close()


def start_model(config: Config, device: torch.device) -> tuple[Any, Teacher]:
    """The model, freshly initialised, under DeepSpeed, and its teacher."""
    torch.manual_seed(config.engine.seed)
    model = JepaModel(config).to(device)
    target_encoder = copy.deepcopy(model.encoder)
    engine = zero.start(model, config)
    return engine, Teacher(target_encoder.to(torch.bfloat16 if config.precision == "bf16" else torch.float32), engine)


class Step(NamedTuple):
    """What became of a step; of the images, features and masks only the last micro-batch's."""

    applied: bool
    grad_norm: float | None
    losses: list[Losses]  # one a micro-batch
    tokens: tuple[int, int]  # kept in a context, in a target
    target_BND: Tensor
    predicted_RD: Tensor
    files: list[str]


def take_step(
    config: Config,
    ranks: distributed.Ranks,
    engine: Any,
    teacher: Teacher,
    batches: Iterator[tuple[int, int, Batch]],
    step: int,
) -> Step:
    """Step `step`, all its micro-batches, under the numbers last given to `zero.schedule`; then the teacher follows."""
    micro_batch, accumulation, _ = config.batch(ranks.world_size)
    losses = []
    for _ in range(accumulation):
        _, micro, batch = next(batches)
        first = (micro * ranks.world_size + ranks.rank) * micro_batch
        masks = sample_masks(config.mask_spec, seed=config.engine.seed, step=step, first=first, batch=micro_batch)
        context, target = (index.to(ranks.device, non_blocking=True) for index in (masks.context, masks.target))
        features = teacher(batch.images)
        output = engine(batch.images, context, target, features)
        engine.backward(output.losses.total)
        losses.append(output.losses)
        applied, grad_norm = zero.step(engine, config.optimization.clip_grad)
    if applied:
        teacher.follow()
    tokens = (context.shape[-1], target.shape[-1])
    return Step(applied, grad_norm, losses, tokens, features, output.predicted_RD, batch.files)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML", help="a file such as those in engine/configs")
    parser.add_argument("--dry-run", action="store_true", help="validate, print what the run would be, and stop")
    parser.add_argument("--world-size", type=int, metavar="N", help="the ranks that --dry-run reckons with")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="go on from the newest, or from this one",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.resume and "=" in args.resume and not os.path.exists(args.resume):  # --resume section.key=value
        args.overrides.append(args.resume)
        args.resume = "latest"
    return args


def main() -> int:
    args = arguments()
    try:
        config = load_config(args.config, args.overrides)
        if args.dry_run:
            print(report(config, args.world_size or int(os.environ.get("WORLD_SIZE", "1"))))
            return 0
        meta = config.meta
        train(config, args.resume or (meta.read_checkpoint or "latest" if meta.load_checkpoint else None))
    except (ConfigError, checkpoint.CheckpointError, TrainingError, ValueError) as error:
        rank = os.environ.get("RANK", "0")
        print(f"engine/train.py, rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
