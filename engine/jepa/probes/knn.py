"""The accuracy of the nearest neighbours' vote on frozen features.

    python engine/evaluate.py knn runs/demo/jepa-latest --train data/demo/train --val data/demo/val --k 20

By cosine, weighted by exp(cosine / temperature): the protocol of Wu et al. (arXiv 1805.01978) and DINO.
"""

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import labels
from .features import Features, check, features, pixels, shared_arguments
from .job import Job, Progress, Result
from .papers import classified

BLOCK, QUERIES, KEYS = 16384, 1024, 65536  # queries for which all keys are read once; samples compared at once
TEMPERATURE = 0.07


def arguments(parser: argparse.ArgumentParser) -> None:
    labels.arguments(parser)
    parser.add_argument("--k", action="append", type=int, help="neighbours that vote; may be repeated (default: 20)")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    shared_arguments(parser)


def run(job: Job, args: argparse.Namespace) -> Result:
    """Figures: accuracy by label, and by k where several are asked for. The ranks share the queries."""
    sets, ks = labels.open_labelled(args.train, args.val, args.label, args.suffixes), args.k or [20]
    if min(ks) < 1 or args.temperature <= 0:
        raise ValueError(f"--k {ks}, --temperature {args.temperature}: wanted at least 1 and more than 0")
    rows = []
    for subject in [*job.subjects, pixels()]:
        train, val = (features(job, subject, source, args) for source in (sets.train, sets.val))
        labelled = {
            name: (torch.from_numpy(y[train.numbers]), torch.from_numpy(sets.val_y[name][val.numbers]))
            for name, y in sets.train_y.items()
        }
        for known, wanted in labelled.values():
            check(train, known, val, wanted)
        mine = np.array_split(np.arange(len(val)), job.ranks.world_size)[job.ranks.rank]
        progress = Progress(job.say, f"{subject.name}, neighbours", len(mine) * len(train), "cosines")
        found = nearest(train, val, mine, max(ks), job.ranks.device, progress)
        row: dict[str, str | float] = {"features": subject.name}
        for name, (known, wanted) in labelled.items():
            right = vote(*found, known, wanted[mine], ks, args.temperature)
            for k, total in zip(ks, np.sum(job.gather(right), axis=0), strict=True):
                row[name if len(ks) == 1 else f"{name} k={k}"] = 100 * float(total) / len(val)
        rows.append(row)
        job.say(f"{subject.name}: done")
    return Result(rows, classified(sets))


def nearest(
    train: Tensor | Features,
    test: Tensor | Features,
    chosen: np.ndarray,
    k: int,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest training samples of the test samples `chosen`: cosines and indices, both [n, k] on the CPU, nearest
    first; fewer if there are fewer. Memory holds 1024 x 65536 cosines and the samples compared."""
    k = min(k, len(train))
    best, where = torch.full((len(chosen), k), -math.inf), torch.zeros(len(chosen), k, dtype=torch.int64)
    for block in np.array_split(np.arange(len(chosen)), -(-len(chosen) // BLOCK)) if len(chosen) else ():
        x = F.normalize(test[chosen[block]].float().to(device), dim=1)
        for first in range(0, len(train), KEYS):
            keys = F.normalize(train[first : first + KEYS].float().to(device), dim=1)
            for rows, part in zip(torch.from_numpy(block).split(QUERIES), x.split(QUERIES), strict=True):
                cosine, index = (found.cpu() for found in (part @ keys.T).topk(min(k, len(keys)), dim=1))
                both = torch.cat([best[rows], cosine], 1)
                best[rows], order = both.topk(k, dim=1)
                where[rows] = torch.cat([where[rows], index + first], 1).gather(1, order)
            if progress:
                progress.at(int(block[0]) * len(train) + len(block) * (first + len(keys)))
    return best, where


def vote(
    cosine: Tensor, index: Tensor, train_y: Tensor, test_y: Tensor, ks: Sequence[int], temperature: float
) -> list[int]:
    """How many of the n test samples the vote of their k nearest gets right, for each k."""
    classes = int(torch.cat([train_y, test_y]).max()) + 1
    weight = ((cosine - cosine[:, :1]) / temperature).exp()  # by the nearest's, which cannot overflow
    right = [0] * len(ks)
    for rows in torch.arange(len(cosine)).split(QUERIES):
        for i, k in enumerate(ks):
            votes = torch.zeros(len(rows), classes)
            votes.scatter_add_(1, train_y[index[rows, :k]], weight[rows, :k])
            right[i] += int((votes.argmax(1) == test_y[rows]).sum())
    return right


def knn(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 20,
    temperature: float = TEMPERATURE,
) -> float:
    """Accuracy, 0 to 1, of features [S, D] with labels [S], all in memory. Raises ValueError as `check` does."""
    check(train_x, train_y, test_x, test_y)
    found = nearest(train_x, test_x, np.arange(len(test_x)), k, train_x.device)
    return vote(*found, train_y.cpu(), test_y.cpu(), [k], temperature)[0] / len(test_y)
