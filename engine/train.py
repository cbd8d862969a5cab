"""Pretrains a vision transformer by one of the methods in jepa/methods, such as I-JEPA and C-JEPA.

    deepspeed engine/train.py --config engine/configs/in1k_vith14_ep300_cjepa.yaml data.root_path=/data/imagenet

Any config key can be overridden on the command line as section.key=value. torchrun, srun and plain python work too.
"""

import argparse
import os
import sys
from itertools import pairwise
from pathlib import Path

from jepa.config.file import load_config
from jepa.config.schema import Config
from jepa.config.words import command_line, is_override
from jepa.data.loader import Loader
from jepa.data.sources import Nowhere, open_images
from jepa.data.synthetic import SyntheticImages
from jepa.probes.online import OnlineProbe
from jepa.ranks import distributed
from jepa.ranks.distributed import Ranks
from jepa.ranks.program import Parser, program, run_program
from jepa.ranks.stop import STOPPED, StopRequest, minutes_argument
from jepa.ranks.watchdog import Watchdog
from jepa.state.checkpoint import Saver
from jepa.state.initial import start_from
from jepa.state.lock import Lock, try_folder
from jepa.state.restore import CheckpointError, on_first
from jepa.train import zero
from jepa.train.health import examine
from jepa.train.log import RunLog, require_loggers
from jepa.train.replay import replay
from jepa.train.report import report
from jepa.train.schedules import Schedules, ScheduleTable
from jepa.train.skipped import Diverged, SkippedSteps
from jepa.train.step import encoder_of, start_model, take_step


def run(config: Config, args: argparse.Namespace) -> int:
    """Trains, or replays a step, and returns the exit code (listed in jepa.ranks.stop)."""
    settings = config.engine
    ranks = distributed.start(settings.device, settings.timeout_minutes, settings.deterministic)
    with (
        Lock(config) as lock,
        StopRequest(ranks, args.max_minutes) as stop,
        Watchdog(ranks, settings.timeout_minutes, lock.release) as watchdog,
    ):
        if args.replay_step is None:
            watchdog.at(None, "looking for where to write")
            on_first(folder := Path(config.logging.folder), lambda: try_folder(folder))
            if ranks.is_first:
                require_loggers(config)
        watchdog.at(None, "opening the images")
        loader = open_loader(config, ranks)
        if args.replay_step is not None:
            replay(config, ranks, loader, args.replay_step, args.resume, args.accept_changes, watchdog.at)
            return 0
        return train(config, args, ranks, loader, stop, watchdog, lock)


def open_loader(config: Config, ranks: Ranks) -> Loader:
    """Raises ValueError on all ranks if they do not all find the same images."""
    data, (micro_batch, accumulation, _) = config.data, config.batch(ranks.world_size)
    loader = Loader(
        SyntheticImages(data.synthetic, data.crop_size, config.engine.seed)
        if data.synthetic
        else open_images(data.folder, data.suffixes),
        config.method.views(config),
        batch_size=micro_batch,
        accumulation=accumulation,
        seed=config.engine.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        decoder=config.decoder,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        max_bad_fraction=data.max_bad_fraction,
    )
    found = ", ".join(f"{key} {value}" for key, value in loader.source.fingerprint.items())
    distributed.require_alike(ranks, found, f"{loader.source.path} is not the same on all machines")
    return loader


def images_of(config: Config) -> str:
    """What --dry-run says of the images. The data need not be on the machine that asks."""
    if config.data.synthetic:
        return f"{config.data.synthetic} images of noise"
    try:
        source = open_images(config.data.folder, config.data.suffixes)
    except Nowhere as error:
        return str(error)
    return f"{len(source)} images of {source.path}: {source.found}"


def train(
    config: Config,
    args: argparse.Namespace,
    ranks: Ranks,
    loader: Loader,
    stop: StopRequest,
    watchdog: Watchdog,
    lock: Lock,
) -> int:
    global_batch = config.batch(ranks.world_size).global_batch
    schedules = Schedules(config, loader.steps_per_epoch)
    all_steps = config.optimization.epochs * loader.steps_per_epoch
    last_step = min(all_steps, config.engine.max_steps or all_steps)
    probe = OnlineProbe(config, ranks) if config.eval.every else None

    watchdog.at(None, "building the model")
    model_engine, teacher = start_model(config, ranks.device)
    watchdog.at(None, "loading the checkpoint")
    saver = Saver(config, model_engine, loader.steps_per_epoch, loader.source.fingerprint, lock)
    progress = saver.resume(args.resume, args.accept_changes) if args.resume else saver.begin()
    if config.meta.init_from and saver.newest is None:  # nothing was resumed
        start_from(config, model_engine)
    if teacher is not None and model_engine.basic_optimizer.state:
        teacher.refresh()

    log = RunLog(config, progress.step, last_step, loader.steps_per_epoch, global_batch, ranks.device)
    log.say(
        f"{config.meta.model_name} ({config.loss.objective}), {len(loader.source)} images of {loader.source.path}, "
        f"{global_batch} per step on {ranks.world_size} x {ranks.device.type}; steps {progress.step} to {last_step} "
        f"of {all_steps}; kill {os.getpid()} saves and stops"
    )
    log.say(f"images: {loader.source.found}")
    table = ScheduleTable(schedules, progress.applied, last_step - progress.step, zero.schedule_device(model_engine))
    skips, owed = SkippedSteps(progress, global_batch), False
    batches = loader.batches(progress.step, last_step)
    for step in range(progress.step, last_step):
        taken, waited_before = step + 1, loader.wait_seconds
        examining, probing = due(taken, config.logging.health_freq), due(taken, config.eval.every)
        stop.ask()
        numbers = table.next()
        zero.schedule(model_engine, numbers)
        done = take_step(config, ranks, model_engine, teacher, batches, step, whole=examining, at=watchdog.at)
        table.count(done.applied)
        log.step(step, done.losses, *done.kept, loader.wait_seconds - waited_before, done.replaced)
        skips.add(step, done.applied, done.losses, done.files)

        stopping = stop.agreed()
        ending = stopping or taken == last_step
        saving = owed = owed or ending or saver.due(taken)
        if not (saving or examining or probing or due(taken, config.logging.log_freq)):
            continue  # without synchronising, so that the device's queue never runs dry

        skipped, applied = skips.read(log.say)
        found = examine(step, done.features, teacher, log.say) if examining and applied else {}
        if probe and probing:
            watchdog.at(step, "evaluating")
            found |= (accuracy := probe(encoder_of(config, model_engine, teacher)))
            shown = f"k-NN {100 * accuracy['knn']:.1f} %, linear {100 * accuracy['linear']:.1f} %"
            log.say(f"step {step}: accuracy of the encoder: {shown}")
        lr, weight_decay, momentum = numbers.tolist()
        grad_norm = None if done.grad_norm is None else float(done.grad_norm)
        if teacher is not None:
            found["momentum"] = momentum
        log.flush(skipped, lr=lr, weight_decay=weight_decay, grad_norm=grad_norm, **found)
        skips.check(step, config.engine.max_skipped, saver.newest)
        if ending or (saving and not skips.skipped_in_a_row):  # saves wait while steps are being skipped
            watchdog.at(step, "saving")
            log.say(f"saved {saver.save(progress, rotate=not skips.skipped_in_a_row)}")
            owed = False
        if probing or saving:
            log.restart_clock()
        if stopping and taken < last_step:
            log.say(f"stopped on request after step {step}; --resume continues. Exit code {STOPPED}")
            break

    log.close()
    return 0 if progress.step >= last_step else STOPPED


def due(taken: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is due after `taken` steps."""
    return every > 0 and taken % every == 0


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, metavar="YAML", help="a file like those in engine/configs")
    parser.add_argument("--dry-run", action="store_true", help="validate, print what the run would need, and stop")
    parser.add_argument("--world-size", type=int, metavar="N", help="number of ranks to assume for --dry-run")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="resume from this checkpoint, a path or a name in logging.folder, by default the newest; auto: from the "
        "newest, or start if there is none",
    )
    parser.add_argument(
        "--accept-changes", action="store_true", help="resume even if a step would compute something different"
    )
    minutes_argument(parser)
    parser.add_argument(
        "--replay-step",
        type=int,
        metavar="N",
        help="examine step N alone, starting from the checkpoint given to --resume, by default the newest up to N",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    words = command_line(sys.argv[1:])
    for at, (word, following) in enumerate(pairwise(words)):
        if word == "--resume" and is_override(following) and not os.path.exists(following):
            words[at] = "--resume=latest"  # argparse would take the override for a checkpoint
    args = parser.parse_intermixed_args(words)
    if args.world_size is not None and args.world_size < 1:
        parser.error(f"--world-size: given {args.world_size}; wanted more than 0")
    if args.world_size and not args.dry_run:
        parser.error("--world-size is for --dry-run; the launcher says how many ranks a run has")
    if args.resume == "":
        parser.error("--resume: given no checkpoint's name, such as an unset variable; wanted one, latest or auto")
    return args


def work() -> int:
    args = arguments()
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        print(report(config, args.world_size or distributed.number(os.environ, "WORLD_SIZE", 1)))
        print(f"\n{images_of(config)}")
        return 0
    if config.meta.load_checkpoint and not args.resume and args.replay_step is None:
        args.resume = config.resumed
    elif args.resume:
        args.resume = config.checkpoint(args.resume)
    return run(config, args)


def main() -> int:
    mistakes = (CheckpointError, Diverged, distributed.NotMet, ValueError, OSError)
    return run_program(work, *mistakes, name=lambda: f"{program()}, rank {os.environ.get('RANK', '0')}")


if __name__ == "__main__":
    distributed.leave(main)
