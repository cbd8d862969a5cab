"""Pretrains a vision transformer by joint-embedding prediction (I-JEPA, C-JEPA).

    deepspeed engine/train.py --config engine/configs/in1k_vith14_ep300_cjepa.yaml data.root_path=/data/imagenet

Any key of the config can be set behind it as section.key=value. torchrun, srun and plain python start it too.
"""

import argparse
import copy
import os
import sys

import torch

from jepa import checkpoint, distributed, zero
from jepa.budget import report
from jepa.config import Config, ConfigError, load_config
from jepa.data import Loader, open_images
from jepa.masks import sample_masks
from jepa.metrics import RunLog, collapse_warning, health
from jepa.objective import JepaModel
from jepa.probe import OnlineProbe
from jepa.schedules import Schedules
from jepa.teacher import Teacher
from jepa.tokens import tokens
from jepa.vit import compile_blocks


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says what to do."""


def train(config: Config, resume: str | None) -> None:
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

    torch.manual_seed(config.engine.seed)
    model = JepaModel(config).to(ranks.device)
    target_encoder = copy.deepcopy(model.encoder)
    engine = zero.start(model, config)
    teacher = Teacher(target_encoder.to(torch.bfloat16 if config.precision == "bf16" else torch.float32), engine)
    if config.compiles(ranks.device.type):
        compile_blocks(engine.module, teacher.encoder)
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
        waited_before, losses = loader.wait_seconds, []
        lr = schedules.lr(progress.applied)
        weight_decay = schedules.weight_decay(progress.applied)
        momentum = schedules.momentum(progress.applied)
        zero.schedule(engine, lr, weight_decay, momentum)

        for _ in range(accumulation):
            _, micro, batch = next(batches)
            first = (micro * ranks.world_size + ranks.rank) * micro_batch
            masks = sample_masks(config.mask_spec, seed=config.engine.seed, step=step, first=first, batch=micro_batch)
            whole = (step + 1) % config.logging.health_freq == 0  # health asks for the features of all patches
            rows = tokens(masks, config, ranks.device, whole=whole)
            features = teacher(batch.images, rows.teacher)
            output = engine(batch.images, rows.context, rows.target_MBK, features, rows.places_MBK)
            engine.backward(output.losses.total)
            losses.append(output.losses)
            applied, grad_norm = zero.step(engine, config.optimization.clip_grad)

        progress.count(applied, global_batch)
        log.step(step, losses, rows.mean_context, rows.target_MBK.shape[-1], loader.wait_seconds - waited_before)
        if applied:
            skipped_in_a_row = 0
            teacher.refresh()
        else:
            skipped_in_a_row += 1
            log.say(f"step {step} skipped: its gradient is not finite; images {', '.join(batch.files[:3])}, ...")
            if skipped_in_a_row >= config.engine.max_skipped:
                raise TrainingError(
                    f"{skipped_in_a_row} steps in a row had a gradient that is not finite; stopped at step {step}. "
                    "The last checkpoint is whole: lower optimization.lr or set optimization.clip_grad and --resume"
                )

        found: dict[str, float] = {}
        if applied and progress.step % config.logging.health_freq == 0:
            found |= health(features, output.predicted_RD) | {"teacher_distance": teacher.distance()}
            if warning := collapse_warning(found):
                log.say(f"step {step}: {warning}")
        if probe and progress.step % config.eval.every == 0:
            found |= probe(teacher.encoder)
            log.say(f"step {step}: k-NN of the target encoder {100 * found['knn']:.1f} %")
        if found or progress.step % config.logging.log_freq == 0 or progress.step == last_step:
            log.flush(lr=lr, weight_decay=weight_decay, momentum=momentum, grad_norm=grad_norm, **found)
        if saver.due(progress.step) or progress.step == last_step:
            log.say(f"saved {saver.save(progress)}")
        if found or saver.due(progress.step):
            log.restart_clock()

    log.close()


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
