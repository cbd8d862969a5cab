"""The I-JEPA paper's linear probe (arXiv 2301.08243, appendix A): linear heads on a frozen encoder, all in one pass.

Legend: a group is the H heads of one input, the last block's features or the last four's, with or without batch norm; B
images of this rank in a step, C classes, D width of the input.
"""

import argparse
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from jepa.data.augment import View
from jepa.data.loader import Loader, eval_batches
from jepa.ranks.distributed import require_alike
from jepa.ranks.stop import STOPPED, StopRequest, minutes_argument

from .features import BROKEN
from .job import Job, Progress, Row, Subject
from .labels import Labelled

CROPS = (0.08, 1.0)  # areas of the random crops, as fractions of the image's
RATES, DECAYS = (0.01, 0.05, 0.001), (0.0005, 0.0)
MOMENTUM, TRUST = 0.9, 0.001  # of LARS (arXiv 1708.03888)
NORM_MOMENTUM, NORM_EPS = 0.1, 1e-5
DROP = 15  # epochs after which the rate falls to a tenth, again and again
INIT_STD = 0.01


def arguments(parser: argparse.ArgumentParser) -> None:
    paper = parser.add_argument_group("--form paper")
    paper.add_argument("--epochs", type=int, default=50)
    paper.add_argument(
        "--head-batch", type=int, default=16384, help="images in a step of all ranks, at most a tenth of --train"
    )
    paper.add_argument("--lr", type=float, nargs="+", default=list(RATES), help="for 256 images in a step")
    paper.add_argument("--weight-decay", type=float, nargs="+", default=list(DECAYS))
    minutes_argument(paper)


class Group:
    """H heads: weights [H, C, D] and biases [H, C], their momentum, and the running statistics of a batch norm."""

    def __init__(self, depth: int, norm: bool, width: int, classes: int, grid: list[tuple[float, float]]) -> None:
        self.depth, self.norm, self.grid = depth, norm, grid
        generator = torch.Generator().manual_seed(0)
        self.weight = INIT_STD * torch.randn(1, classes, width, generator=generator).repeat(len(grid), 1, 1)
        self.bias = torch.zeros(len(grid), classes)
        self.speed = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.mean, self.variance = torch.zeros(width), torch.ones(width)

    @property
    def names(self) -> list[str]:
        what = f"last {self.depth} blocks" if self.depth > 1 else "last block"
        return [f"{what}{', batch norm' * self.norm}, lr {lr:g}, wd {decay:g}" for lr, decay in self.grid]

    def to(self, device: torch.device) -> "Group":
        self.load({name: value.to(device) for name, value in self.state().items()})
        return self

    def state(self) -> dict[str, Tensor]:
        return {
            "weight": self.weight,
            "bias": self.bias,
            "weight_speed": self.speed[0],
            "bias_speed": self.speed[1],
            "mean": self.mean,
            "variance": self.variance,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        self.weight, self.bias, self.mean, self.variance = (state[n] for n in ("weight", "bias", "mean", "variance"))
        self.speed = state["weight_speed"], state["bias_speed"]

    def logits(self, x: Tensor) -> Tensor:
        """[B, D], normalised if need be, -> [B, H, C]."""
        return F.linear(x, self.weight.flatten(0, 1)).view(len(x), *self.bias.shape) + self.bias

    def normalised(self, x: Tensor) -> Tensor:
        """As in evaluation: by the running statistics."""
        return (x - self.mean) / (self.variance + NORM_EPS).sqrt() if self.norm else x

    def learn(self, x: Tensor, y: Tensor, factor: float) -> None:
        """One step on features [B, D] and labels [B] of this rank; every rank calls it with equally many. `factor`: of
        all learning rates."""
        total = len(x) * dist.get_world_size()
        if self.norm:  # over all ranks; the encoder is frozen, so no gradient passes
            moments = torch.stack([x.sum(0), x.square().sum(0)])
            dist.all_reduce(moments)
            mean = moments[0] / total
            variance = (moments[1] / total - mean.square()).clamp_min(0)
            self.mean.lerp_(mean, NORM_MOMENTUM)
            self.variance.lerp_(variance * total / max(1, total - 1), NORM_MOMENTUM)
            x = (x - mean) / (variance + NORM_EPS).sqrt()
        slope = self.logits(x).softmax(2)
        slope[torch.arange(len(x), device=x.device), :, y] -= 1
        slope /= total
        weight_slope, bias_slope = (slope.flatten(1).T @ x).view_as(self.weight), slope.sum(0)
        dist.all_reduce(weight_slope)
        dist.all_reduce(bias_slope)
        lars(self.weight, weight_slope, self.speed[0], factor, self.grid)
        rate = factor * torch.tensor([lr for lr, _ in self.grid], device=x.device)[:, None]
        self.speed[1].mul_(MOMENTUM).add_(bias_slope)  # biases are neither decayed nor adapted
        self.bias.sub_(rate * self.speed[1])


def lars(weight: Tensor, slope: Tensor, speed: Tensor, factor: float, grid: list[tuple[float, float]]) -> None:
    """A step of LARS for each of H matrices [H, C, D], in place, with its own learning rate (x factor) and decay."""
    rate, decay = (torch.tensor(column, device=weight.device)[:, None, None] for column in zip(*grid, strict=True))
    norms = [torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in (weight, slope)]
    trust = TRUST * norms[0] / (norms[1] + decay * norms[0])
    trust = torch.where((norms[0] > 0) & (norms[1] > 0), trust, 1.0)
    speed.mul_(MOMENTUM).add_(trust * (slope + decay * weight))
    weight.sub_(factor * rate * speed)


def train(
    job: Job,
    subject: Subject,
    sets: Labelled,
    args: argparse.Namespace,
    crops: tuple[float, float] | None = CROPS,
    stop: StopRequest | None = None,
) -> Row:
    """Trains the heads and returns the best accuracy of each label; all accuracies go to a file beside the state.

    Raises ValueError for settings that mean nothing and for features that are not finite; SystemExit(75), after saving,
    if `stop` asks for it.
    """
    if args.epochs < 1 or args.head_batch < 1 or min(args.lr) <= 0 or min(args.weight_decay) < 0:
        raise ValueError("--epochs and --head-batch: wanted at least 1; --lr more than 0; --weight-decay 0 or more")
    config, world = job.config, job.ranks.world_size
    wanted = min(args.head_batch, max(world, len(sets.train) // 10))
    micro = max(1, min(args.encoder_batch or config.data.batch_size, wanted // world))
    loader = Loader(
        sets.train,
        [View(size=config.data.crop_size, scale=crops, flip=0.5)],
        batch_size=micro,
        accumulation=max(1, wanted // (micro * world)),
        rank=job.ranks.rank,
        world_size=world,
        device=job.ranks.device,
        decoder=config.decoder,
        num_workers=config.data.num_workers,
        max_bad_fraction=config.data.max_bad_fraction,
    )
    depths = sorted({1, min(4, len(subject.encoder.blocks))})
    grid = list(itertools.product(args.lr, args.weight_decay))
    groups = {
        name: [
            Group(depth, norm, depth * subject.encoder.embed_dim, int(y.max()) + 1, grid).to(job.ranks.device)
            for depth in depths
            for norm in (False, True)
        ]
        for name, y in sets.train_y.items()
    }
    step, total = 0, args.epochs * loader.steps_per_epoch
    settings = [
        subject.key,
        config.data.crop_size,
        args.epochs,
        loader.global_batch_size,
        grid,
        crops,
        sets.train.fingerprint,
    ]
    settings += [job.of_first(lambda: sets.train.contents)]
    settings += [[name, hashlib.sha256(y.tobytes()).hexdigest()] for name, y in sorted(sets.train_y.items())]
    state = job.out / "linear" / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.pt"
    begun = state.exists()
    require_alike(job.ranks, f"{'an unfinished' if begun else 'no'} state {state.name}", "--out must be shared by all")
    if begun:
        kept = torch.load(state, map_location=job.ranks.device, weights_only=True)
        step = kept["step"]
        for group, held in zip(_all(groups), kept["groups"], strict=True):
            group.load(held)
        job.say(f"{subject.name}: going on from step {step} of {total}")
    parts: list[tuple[Tensor, Tensor]] = []
    progress = Progress(job.say, f"{subject.name}, {loader.steps_per_epoch} steps an epoch", total, "steps")
    progress.at(step)
    for at, micro_batch, batch in loader.batches(step, total):
        parts.append((_outputs(subject, batch.images, max(depths)), torch.tensor(batch.indices)))
        if micro_batch + 1 < loader.accumulation:
            continue
        if stop:
            stop.ask()
        x_BLD, indices = torch.cat([x for x, _ in parts]), torch.cat([i for _, i in parts])
        parts.clear()
        factor = loader.global_batch_size / 256 * 0.1 ** (at // loader.steps_per_epoch // DROP)
        for name, of_label in groups.items():
            y = torch.from_numpy(sets.train_y[name])[indices].to(x_BLD.device)
            for group in of_label:
                group.learn(x_BLD[:, -group.depth :].flatten(1), y, factor)
        stopped = stop is not None and stop.agreed() and at + 1 < total
        if stopped or (at + 1) % loader.steps_per_epoch == 0:
            content = {"step": at + 1, "groups": [group.state() for group in _all(groups)]}
            job.first_only(lambda content=content: _save(state, content))  # type: ignore[misc]
        progress.at(at + 1)
        if stopped:
            job.say(f"{subject.name}: stopped after step {at + 1} of {total}; the same command goes on")
            raise SystemExit(STOPPED)
    scores = _evaluate(job, subject, sets, groups, max(depths), micro)
    job.first_only(lambda: _write(state.with_suffix(".json"), scores))
    row: Row = {"features": subject.name}
    for name, by_head in scores.items():
        best = max(by_head, key=lambda head: by_head[head])
        row[name] = by_head[best]
        job.say(f"{subject.name}, {name}: best head: {best}; all of them in {state.with_suffix('.json')}")
    return row


def _evaluate(
    job: Job, subject: Subject, sets: Labelled, groups: dict[str, list[Group]], depth: int, batch: int
) -> dict[str, dict[str, float]]:
    """The accuracy of every head in percent, by label and head; the ranks share the images."""
    config = job.config
    mine = np.array_split(np.arange(len(sets.val)), job.ranks.world_size)[job.ranks.rank]
    right = {name: [torch.zeros(len(group.grid), dtype=torch.int64) for group in groups[name]] for name in groups}
    seen = 0
    for images, indices in eval_batches(
        sets.val,
        crop_size=config.data.crop_size,
        batch_size=batch,
        indices=mine.tolist(),
        device=job.ranks.device,
        decoder=config.decoder,
        num_workers=config.data.num_workers,
    ):
        x_BLD, seen = _outputs(subject, images, depth), seen + len(indices)
        for name, of_label in groups.items():
            y = torch.from_numpy(sets.val_y[name])[indices].to(x_BLD.device)
            for group, count in zip(of_label, right[name], strict=True):
                x = group.normalised(x_BLD[:, -group.depth :].flatten(1))
                count += (group.logits(x).argmax(2) == y[:, None]).sum(0).cpu()
    counts = job.gather((seen, right))
    images = sum(number for number, _ in counts)
    if images == 0:
        raise ValueError(f"--val: none of the {len(sets.val)} images of {sets.val.path} can be decoded")
    return {
        name: {
            head: 100 * sum(int(found[name][g][h]) for _, found in counts) / images
            for g, group in enumerate(of_label)
            for h, head in enumerate(group.names)
        }
        for name, of_label in groups.items()
    }


def _outputs(subject: Subject, images: Tensor, depth: int) -> Tensor:
    """The mean-pooled features of the last blocks: float32 [B, depth, D]."""
    with torch.no_grad():
        outputs = subject.encoder.features(images, range(-depth, 0))
    pooled = torch.stack([x.float().mean(1) for x in outputs], dim=1)
    if not pooled.isfinite().all():
        raise ValueError(BROKEN)
    return pooled


def _all(groups: dict[str, list[Group]]) -> Iterator[Group]:
    return itertools.chain.from_iterable(groups.values())


def _save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".partial")
    torch.save(content, part)
    os.replace(part, path)


def _write(path: Path, scores: dict[str, dict[str, float]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(scores, indent=1) + "\n")
