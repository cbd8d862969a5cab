"""Fine-tuning of all weights, end to end, for top-1 accuracy.

The model is timm's vision transformer with our weights: mean-pooled, with a new linear classifier and with its position
embeddings trained. Layer decay, mixup and cutmix, RandAugment, random erasing, losses and the schedule are timm's, the
optimizer is torch's AdamW, and DeepSpeed runs them, in --precision. As in timm and MAE, the figure is the last epoch's,
not the best one's.

    OUT/finetune/KEY/LABEL/state.json       how far it is; it names one of DeepSpeed's checkpoints, which lies beside it
    OUT/finetune/KEY/LABEL/metrics.jsonl    one line an epoch

The same command goes on from there, exactly as if it had not been interrupted, on as many ranks as before.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from jepa.config.schema import Config
from jepa.data.sources import ImageSource
from jepa.model.vit import LAYER_NORM_EPS
from jepa.model.vit import VisionTransformer as Encoder
from jepa.ranks.device import to_device
from jepa.ranks.distributed import require_alike
from jepa.ranks.stop import STOPPED, StopRequest, minutes_argument
from jepa.train.zero import BUCKET, wrap

from . import labels
from .finetune_images import (
    BATCH,
    UNKNOWN,
    Order,
    Split,
    TrainImages,
    ValImages,
    seeded,
    train_loader,
    transforms,
    val_loader,
)
from .finetune_settings import Settings, settings_arguments, settings_of
from .fingerprint import fingerprint
from .job import Job, Result, Row, Subject
from .labels import Labelled, open_labelled
from .papers import classified
from .results import write

SAY = 30.0  # seconds between two lines of progress within an epoch
NAMED = 10  # broken images to name at once; more are counted


def arguments(parser: argparse.ArgumentParser) -> None:
    labels.arguments(parser)
    settings_arguments(parser)
    minutes_argument(parser)


def run(job: Job, args: argparse.Namespace) -> Result:
    settings = settings_of(args, job.config)
    labelled = open_labelled(args.train, args.val, args.label, args.suffixes)
    rows = []
    with StopRequest(job.ranks, args.max_minutes) as stop:
        for subject in job.subjects:
            row: Row = {"features": subject.name}
            for name in labelled.train_y:
                row[name] = fine_tune(job, subject, labelled, name, None, settings, stop)
            rows.append(row)
    return Result(rows, classified(labelled))


def fine_tune(
    job: Job,
    subject: Subject,
    labelled: Labelled,
    name: str,
    train_indices: np.ndarray | None,
    settings: Settings,
    stop: StopRequest | None = None,
) -> float:
    """Trains a copy of the subject's encoder on the label `name` of some training images (None: all).

    Returns the last epoch's top-1 accuracy on all validation images, in percent, on every rank. Goes on where an
    earlier call with the same arguments ended. Raises ValueError if that one had other settings, for fewer images than
    a step takes, for too many broken images and if the loss is not finite; SystemExit(75), after saving, if `stop`
    asks for it.
    """
    train_y, val_y = labelled.train_y[name], labelled.val_y[name]
    indices = np.arange(len(train_y)) if train_indices is None else np.asarray(train_indices)
    split = Split.of(settings.batch, job.ranks.world_size, settings.micro_batch, settings.mixes)
    if len(indices) < settings.batch:
        raise ValueError(f"--batch {settings.batch}: there are only {len(indices)} training images; give a smaller one")
    augment, crop = transforms(job.config, settings)
    train = TrainImages(labelled.train, train_y, indices, augment, settings.seed)
    val = ValImages(labelled.val, val_y, crop, job.config.data.crop_size)
    some = "" if train_indices is None else f"-{_digest(indices)}"
    folder = job.out / "finetune" / subject.key / (re.sub(r"\W+", "_", name) + some)
    state = State.read(folder, _conditions(job, train, val, settings))
    require_alike(job.ranks, f"{state.step} steps in {folder}", "--out must be a folder that all machines share")
    if len(state.epochs) < settings.epochs:
        seeded(settings.seed)
        model = build(subject.encoder, job.config, 1 + int(max(train_y.max(), val_y.max())), settings.drop_path)
        Tuning(job, model, train, val, settings, split, folder, state).train(f"{subject.name}, {name}", stop)
    return state.epochs[-1]["accuracy"]


def build(encoder: Encoder, config: Config, classes: int, drop_path: float = 0.0) -> VisionTransformer:
    """timm's model of the encoder, in fp32 on the CPU, with a new classifier: images fp32 [B, 3, S, S], normalised by
    the config's mean and deviation, to logits [B, classes]."""
    size = config.vit
    model = VisionTransformer(
        img_size=config.data.crop_size,
        patch_size=config.mask.patch_size,
        num_classes=classes,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=size.mlp_ratio,
        class_token=False,
        global_pool="avg",
        fc_norm=False,  # norm, then pool: the features that the other probes see
        norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
        drop_path_rate=drop_path,
    )
    missing, unknown = model.load_state_dict(encoder.state_dict(), strict=False)
    assert set(missing) == {"head.weight", "head.bias"} and not unknown, (missing, unknown)
    return model


def layers(model: VisionTransformer, settings: Settings) -> list[dict[str, Any]]:
    """The optimizer's groups. The learning rate of layer l (0: patches and positions; 1 .. depth: blocks, the last with
    the final norm; depth + 1: classifier) is scaled by layer_decay ** (depth + 1 - l), the group's `lr_scale`."""
    return param_groups_layer_decay(
        model, settings.weight_decay, model.no_weight_decay(), layer_decay=settings.layer_decay
    )


def deepspeed_config(settings: Settings, split: Split, elements: int) -> dict[str, Any]:
    """DeepSpeed's config for a model of so many elements."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage:
        zero |= {"reduce_bucket_size": min(BUCKET, elements), "allgather_bucket_size": BUCKET}
    return {
        "train_micro_batch_size_per_gpu": split.micro,
        "gradient_accumulation_steps": split.accumulation,
        "train_batch_size": split.batch,
        "zero_optimization": zero,
        "bf16": {"enabled": settings.precision == "bf16"},
        "communication_data_type": settings.precision,
        "gradient_clipping": settings.clip,
        "timers": {"throughput": {"enabled": False}},
    }


@dataclass
class State:
    """How far a fine-tuning is. `loss`: the sum over the steps of the unfinished epoch; `broken`: training images that
    cannot be decoded; `epochs`: the metrics of finished ones."""

    conditions: dict[str, Any]
    step: int
    loss: float
    broken: list[int]
    epochs: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, conditions: dict[str, Any]) -> "State":
        """What the folder holds, or a beginning. Raises ValueError if it began under other conditions."""
        path = folder / "state.json"
        if not path.is_file():
            return cls(conditions, 0, 0.0, [], [])
        state = cls(**json.loads(path.read_text()))
        if differ := [key for key in conditions if state.conditions.get(key) != conditions[key]]:
            changes = ", ".join(f"{key} {state.conditions.get(key)}, now {conditions[key]}" for key in differ)
            raise ValueError(f"{folder} began with {changes}; give the same, another --out, or delete that folder")
        return state

    @property
    def tag(self) -> str:
        """The name of its checkpoint."""
        return f"step{self.step:08d}"


class Tuning:
    """A model in training. Order, augmentation and all else that is random are functions of seed and step."""

    def __init__(
        self,
        job: Job,
        model: VisionTransformer,
        train: TrainImages,
        val: ValImages,
        settings: Settings,
        split: Split,
        folder: Path,
        state: State,
    ) -> None:
        """From the weights of `model` or, if the state is a later one, of its checkpoint in the folder."""
        self.job, self.train_images, self.val_images = job, train, val
        self.settings, self.split, self.folder, self.state = settings, split, folder, state
        self.device, self.dtype = job.ranks.device, torch.bfloat16 if settings.precision == "bf16" else torch.float32
        order = Order(len(train.indices), settings.epochs, split, job.ranks.rank, settings.seed, state.step)
        self.epoch_steps, self.total = order.steps, settings.epochs * order.steps
        pin = self.device.type == "cuda"
        self.batches = train_loader(train, order, settings.workers, pin)
        self.judged = val_loader(val, settings.micro_batch, job.ranks.rank, job.ranks.world_size, settings.workers, pin)
        self.mixup, self.loss = None, LabelSmoothingCrossEntropy(settings.smoothing)
        if settings.mixes:
            smoothing, classes = settings.smoothing, model.num_classes
            self.mixup = Mixup(settings.mixup, settings.cutmix, label_smoothing=smoothing, num_classes=classes)
            self.loss = SoftTargetCrossEntropy()

        model.set_grad_checkpointing(settings.checkpointing)
        optimizer = torch.optim.AdamW(layers(model, settings), lr=0.0)
        elements = sum(parameter.numel() for parameter in model.parameters())
        self.engine = wrap(model.to(self.device), optimizer, deepspeed_config(settings, split, elements))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr
        warmup = settings.warmup * order.steps
        self.schedule = CosineLRScheduler(
            optimizer, self.total - warmup, settings.min_lr, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
        )
        if state.step and self.engine.load_checkpoint(str(folder), state.tag)[0] is None:
            raise ValueError(f"{folder} has no checkpoint {state.tag}, which its state.json names; delete that folder")

    def train(self, title: str, stop: StopRequest | None) -> None:
        """From the state's step to the last one."""
        state, first, began = self.state, self.state.step, time.monotonic()
        said = began
        if first:
            self.job.say(f"{title}: going on after step {first} of {self.total}")
        batches, broken = iter(self.batches), set(state.broken)
        loss = torch.tensor(state.loss, dtype=torch.float64, device=self.device)
        self.engine.train()
        while state.step < self.total:
            if stop:
                stop.ask()
            self.schedule.step_update(state.step + 1)
            for number in range(self.split.accumulation):
                images, y, bad = next(batches)
                loss += self.micro_step(images, y, number) / self.split.accumulation
                broken |= set(bad)
            state.step += 1
            now = time.monotonic()
            speed = (state.step - first) / (now - began)
            place = f"{title}: epoch {1 + (state.step - 1) // self.epoch_steps} of {self.settings.epochs}"
            left = f"{(self.total - state.step) / speed / 60:.0f} min left"
            if state.step % self.epoch_steps == 0:
                row = self.end_epoch(loss, broken)
                loss.zero_()
                self.job.say(f"{place}: loss {row['loss']:.3f}, top-1 {row['accuracy']:.1f} %, {left}")
            elif now - said > SAY:
                said = now
                self.job.say(f"{place}: {speed * self.split.batch:.0f} images/s, {left}")
            if stop and stop.agreed() and state.step < self.total:
                if state.step % self.epoch_steps:
                    self.save(loss, broken)
                self.job.say(f"{title}: stopped after step {state.step} of {self.total}; the same command goes on")
                raise SystemExit(STOPPED)
        self.engine.destroy()

    def micro_step(self, images: Tensor, y: Tensor, number: int) -> Tensor:
        """Adds a micro-batch's gradient, and with a step's last one updates the weights. Returns its mean loss."""
        seeded(self.settings.seed, BATCH, self.state.step, self.split.piece(number, self.job.ranks.rank))
        images, y = to_device(images, self.device), to_device(y, self.device)
        if self.mixup:
            images, y = self.mixup(images, y)
        loss = self.loss(self.engine(images.to(self.dtype)).float(), y)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def end_epoch(self, loss: Tensor, broken: set[int]) -> dict[str, Any]:
        """Evaluates and saves. Returns the epoch's metrics."""
        mean = self.mean(loss) / self.epoch_steps
        if not math.isfinite(mean):
            raise ValueError(f"{self.folder}: the loss is {mean} before step {self.state.step}; give a smaller --lr")
        accuracy, counted = self.evaluate(named=not self.state.epochs)
        row = {"epoch": 1 + len(self.state.epochs), "step": self.state.step, "loss": mean}
        row |= {"accuracy": accuracy, "counted": counted}
        self.state.epochs.append(row)
        self.save(torch.zeros_like(loss), broken)
        return row

    @torch.no_grad()
    def evaluate(self, named: bool = True) -> tuple[float, int]:
        """Top-1 accuracy in percent, and how many validation images were counted: all but broken ones."""
        self.engine.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        counted, broken = 0, []
        for images, y, bad in self.judged:
            found = self.engine(to_device(images, self.device).to(self.dtype)).argmax(1)
            right += (found == to_device(y, self.device)).sum()  # no class is UNKNOWN
            counted += int((y != UNKNOWN).sum())
            broken += bad
        self.engine.train()
        rights, counts, brokens = zip(*self.job.gather((int(right), counted, broken)), strict=True)
        if named:
            self.name(self.val_images.source, {i for found in brokens for i in found}, "it is not counted")
        if sum(counts) == 0:
            raise ValueError(f"{self.val_images.source.path}: none of the images can be decoded")
        return 100 * sum(rights) / sum(counts), sum(counts)

    def save(self, loss: Tensor, broken: set[int]) -> None:
        """Writes a checkpoint and then, once it is whole, the state that names it."""
        state, source = self.state, self.train_images.source
        everywhere = {i for found in self.job.gather(broken) for i in found}
        self.name(source, everywhere - set(state.broken), "the next one is taken in its place")
        most = self.job.config.data.max_bad_fraction
        if len(everywhere) >= NAMED and len(everywhere) > most * len(self.train_images.indices):
            raise ValueError(
                f"{source.path}: {len(everywhere)} training images cannot be decoded; at most {most:.0%} may"
            )
        state.broken, state.loss = sorted(everywhere), self.mean(loss)
        self.engine.save_checkpoint(str(self.folder), tag=state.tag, save_latest=False)

        def finish() -> None:
            write(self.folder / "state.json", asdict(state))
            (self.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in state.epochs))
            for old in self.folder.glob("step*"):
                if old.name != state.tag:
                    shutil.rmtree(old)

        self.job.first_only(finish)

    def mean(self, value: Tensor) -> float:
        """Over the ranks."""
        total = value.clone()
        dist.all_reduce(total)
        return float(total) / self.split.ranks

    def name(self, source: ImageSource, broken: set[int], consequence: str) -> None:
        for i in sorted(broken)[:NAMED]:
            self.job.say(f"{source.name(i)} cannot be decoded: {consequence}")
        if len(broken) > NAMED:
            self.job.say(f"{source.path}: {len(broken) - NAMED} more images cannot be decoded: {consequence}")


def _conditions(job: Job, train: TrainImages, val: ValImages, settings: Settings) -> dict[str, Any]:
    """What must not change when a fine-tuning goes on."""
    given = {key: value for key, value in asdict(settings).items() if key != "workers"}
    for name, images, chosen in (("training", train, train.indices), ("validation", val, slice(None))):
        source = images.source
        given[f"{name} images"] = f"{len(source)} {source.fingerprint['list of images']} {_digest(images.labels)}"
        given[f"{name} files"] = fingerprint(job, [source.files[i] for i in np.unique(source.file[chosen])])
    return given | {"ranks": job.ranks.world_size}


def _digest(numbers: np.ndarray) -> str:
    return hashlib.sha256(numbers.astype(np.int64).tobytes()).hexdigest()[:8]
