"""The accuracy of a linear classifier on frozen features, in two forms.

    python engine/evaluate.py linear runs/demo/jepa-latest --train data/demo/train --val data/demo/val

--form quick (default): logistic regression on stored features. The strength of its penalty is chosen on a held-out
fifth of each class's training images.
--form paper: the I-JEPA paper's. The encoder sees new crops and flips of the training images in each of 50 epochs, and
24 heads learn side by side: on the last block or the last four, with and without batch norm, by LARS at three learning
rates and two weight decays. As in the paper, the best of them on --val is reported, which flatters a little.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from jepa.ranks.stop import StopRequest

from . import heads, labels
from .features import Features, check, features, pixels, shared_arguments
from .job import Job, Progress, Result, Row, quiet
from .papers import classified

STRENGTHS = tuple(10.0**e for e in range(0, -9, -1))  # of the L2 penalty, strongest first
UNJUDGED = 1e-2  # the strength where every class has a single image, and none can be held out to judge it
EPOCHS, STEPS, BATCH = 10, 1500, 512  # at least so many epochs, steps, and samples in a step
LONG = 256  # steps of an epoch, at most, where more samples in a step make that possible
RATE, MOMENTUM = 0.5, 0.9
IN_MEMORY = 2**28  # features that are rotated once and kept; more are rotated whenever they are read
CHUNK = 8192  # samples read at once


def arguments(parser: argparse.ArgumentParser) -> None:
    labels.arguments(parser)
    parser.add_argument("--form", choices=("quick", "paper"), default="quick")
    shared_arguments(parser)
    heads.arguments(parser)


def run(job: Job, args: argparse.Namespace) -> Result:
    """Figures: accuracy by label. quick: the ranks share the strengths; paper: the images."""
    sets = labels.open_labelled(args.train, args.val, args.label, args.suffixes)
    return Result(rows_of(job, sets, args), classified(sets) if args.form == "paper" else None)


def rows_of(
    job: Job,
    sets: labels.Labelled,
    args: argparse.Namespace,
    chosen: np.ndarray | None = None,
    crops: tuple[float, float] | None = heads.CROPS,
) -> list[Row]:
    """A row for each encoder, and one for pixels in the quick form. `chosen`: the training images that may be used;
    `crops`: areas of the paper form's random crops; None: centre crops."""
    if args.form == "paper":
        if chosen is not None:
            labelled = {name: y[chosen] for name, y in sets.train_y.items()}
            sets = labels.Labelled(sets.train.take(chosen), sets.val, labelled, sets.val_y)
        with StopRequest(job.ranks, args.max_minutes) as stop:
            return [heads.train(job, subject, sets, args, crops, stop) for subject in job.subjects]
    rows: list[Row] = []
    for subject in [*job.subjects, pixels()]:
        train = features(job, subject, sets.train, args, chosen=chosen)
        val = features(job, subject, sets.val, args)
        row: Row = {"features": subject.name}
        for name, train_y in sets.train_y.items():
            known, wanted = (torch.from_numpy(y) for y in (train_y[train.numbers], sets.val_y[name][val.numbers]))
            row[name] = 100 * linear_probe(train, known, val, wanted, job)
        rows.append(row)
        job.say(f"{subject.name}: done")
    return rows


def linear_probe(
    train_x: Tensor | Features, train_y: Tensor, test_x: Tensor | Features, test_y: Tensor, job: Job | None = None
) -> float:
    """Accuracy, 0 to 1, of multinomial logistic regression on standardised features [S, D] with labels [S].

    Minimizes the mean cross-entropy + strength / 2 * |weights|^2 for all strengths at once. With a `job`, every rank
    calls it and takes a share of the strengths. Raises ValueError as `check` does.
    """
    check(train_x, train_y, test_x, test_y)
    device = job.ranks.device if job else torch.device("cpu") if isinstance(train_x, Features) else train_x.device
    rank, world, say = (job.ranks.rank, job.ranks.world_size, job.say) if job else (0, 1, quiet)
    classes = int(torch.cat([train_y, test_y]).max()) + 1
    axes, train_y, test_y = Axes(train_x, device), train_y.to(device), test_y.to(device)
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0))
    held, fitted = held_out(train_y.cpu(), order)
    x, mine = axes.rotated(train_x), STRENGTHS[rank::world]
    scores = [0.0] * len(STRENGTHS)
    if mine and len(held):
        scores[rank::world] = accuracy(fit(x, train_y, fitted, axes, mine, classes, say=say), x, train_y, held)
    if job:
        scores = np.sum(job.gather(scores), axis=0).tolist()
    best = STRENGTHS[scores.index(max(scores))] if len(held) else UNJUDGED
    solved = fit(x, train_y, order, axes, [best], classes, say=say)
    return accuracy(solved, axes.rotated(test_x), test_y, torch.arange(len(test_x)))[0]


def held_out(y: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The first fifth of each class's samples in `order`, at least one of two or more, and the rest: indices of the
    labels int64 [S]."""
    by_class = order[y[order].argsort(stable=True)]
    counts = torch.bincount(y)
    place = torch.arange(len(y)) - (counts.cumsum(0) - counts)[y[by_class]]
    held = place < torch.where(counts > 1, (counts // 5).clamp_min(1), 0)[y[by_class]]
    return by_class[held], by_class[~held]


class Axes:
    """The standardised features' principal axes, found in one pass, and the mean square of the features along each.

    An encoder's features, above all an untrained one's, are so collinear that descent along them would stop far from
    the minimum. Rotation does not move the minimum, and along the axes the curvature is known and can be scaled to 1.
    """

    def __init__(self, x: Tensor | Features, device: torch.device) -> None:
        width, self.device = x.shape[1], device
        shift = x[:CHUNK].to(device).double().mean(0)  # near the mean, so that squares do not cancel
        total, square = torch.zeros_like(shift), torch.zeros(width, width, dtype=torch.float64, device=device)
        for first in range(0, len(x), CHUNK):
            part = x[first : first + CHUNK].to(device).double() - shift
            total += part.sum(0)
            square += part.T @ part
        mean = total / len(x)
        covariance = square / len(x) - mean[:, None] * mean
        deviation = covariance.diagonal().clamp_min(0).sqrt().clamp_min(1e-6)
        self.mean, self.deviation = (shift + mean).float(), deviation.float()
        squares, axes = torch.linalg.eigh(covariance / (deviation[:, None] * deviation))
        self.squares, self.axes = squares.clamp_min(0).float(), axes.float()

    def __call__(self, x: Tensor) -> Tensor:
        return ((x.to(self.device).float() - self.mean) / self.deviation) @ self.axes

    def rotated(self, x: Tensor | Features) -> "Rotated | Tensor":
        """`x` along the axes: at once if it is small, else whenever rows are read."""
        if x.shape[0] * x.shape[1] > IN_MEMORY:
            return Rotated(x, self)
        return torch.cat([self(x[first : first + CHUNK]) for first in range(0, len(x), CHUNK)])


class Rotated:
    def __init__(self, x: Tensor | Features, axes: Axes) -> None:
        self.x, self.axes = x, axes

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.axes(self.x[rows])


def fit(
    x: Rotated | Tensor,
    y: Tensor,
    chosen: Tensor,
    axes: Axes,
    strengths: Sequence[float],
    classes: int,
    epochs: int | None = None,
    say: Callable[[str], None] = quiet,
) -> tuple[Tensor, Tensor]:
    """Weights [D, H, C] and biases [H, C] for H strengths, by Nesterov's method with a cosine schedule.

    It descends in weights / scale, where `scale` makes the curvature along every axis about 1 for every strength.
    """
    device = axes.device
    strength = torch.tensor(strengths, device=device)
    scale = (axes.squares[:, None] + strength).rsqrt()[..., None]  # [D, H, 1]
    penalty = strength[:, None] * scale.square()
    u = torch.zeros(len(scale), len(strengths), classes, device=device)
    bias = torch.zeros(len(strengths), classes, device=device)
    u_speed, bias_speed = torch.zeros_like(u), torch.zeros_like(bias)
    batch = min(max(BATCH, len(chosen) // LONG), len(chosen))
    epochs = epochs or max(EPOCHS, -(-STEPS * batch // len(chosen)))
    steps, step, generator = epochs * -(-len(chosen) // batch), 0, torch.Generator().manual_seed(0)
    progress = Progress(say, f"{len(strengths)} linear classifiers", steps, "steps")
    for _ in range(epochs):
        for rows in chosen[torch.randperm(len(chosen), generator=generator)].split(batch):
            part = x[rows]
            logits = (part @ (scale * u).flatten(1)).view(len(rows), *bias.shape) + bias
            slope = logits.softmax(2)
            slope[torch.arange(len(rows), device=device), :, y[rows.to(device)]] -= 1
            slope /= len(rows)
            u_slope = scale * (part.T @ slope.flatten(1)).view_as(u) + penalty * u
            rate = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            step += 1
            progress.at(step)
            for value, speed, towards in ((u, u_speed, u_slope), (bias, bias_speed, slope.sum(0))):
                speed.mul_(MOMENTUM).add_(towards)
                value.sub_(towards + MOMENTUM * speed, alpha=rate)
    return scale * u, bias


def accuracy(solved: tuple[Tensor, Tensor], x: Rotated | Tensor, y: Tensor, chosen: Tensor) -> list[float]:
    """The accuracy, 0 to 1, of each of the H classifiers on the samples chosen."""
    weights, bias = solved
    right = torch.zeros(len(bias), dtype=torch.int64, device=bias.device)
    for rows in chosen.split(CHUNK):
        logits = (x[rows] @ weights.flatten(1)).view(len(rows), *bias.shape) + bias
        right += (logits.argmax(2) == y[rows.to(y.device)][:, None]).sum(0)
    return [int(n) / len(chosen) for n in right]
