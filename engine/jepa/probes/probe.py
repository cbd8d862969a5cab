"""Frozen features, and the accuracy of k-NN and a linear probe on them.

Legend: S samples, D feature dimensions, C classes; an encoder maps uint8 images [B, H, W, 3] to features [B, N, D].
The representation of an image is the mean over its patches of the target encoder's output, as in I-JEPA.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from jepa.config.schema import Config
from jepa.data.decode import dali
from jepa.data.loader import eval_batches
from jepa.data.sources import ImageSource, open_images

Encoder = Callable[[Tensor], Tensor]
STRENGTHS = tuple(10.0**e for e in range(0, -9, -1))  # of the linear probe's L2 penalty, strongest first


@torch.no_grad()
def extract(encoder: Encoder, batches: Iterable[tuple[Tensor, list[int]]]) -> tuple[Tensor, list[int]]:
    """Mean-pooled features, fp32 [S, D], and the indices of the S images that `eval_batches` yields.

    If no image is usable, the features are [0], which concatenates with those of other ranks.
    """
    features, numbers = [], []
    for images, indices in batches:
        features.append(encoder(images).float().mean(1))
        numbers += indices
    return torch.cat(features) if features else torch.empty(0), numbers


def knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Accuracy, 0 to 1, of a vote of the k nearest training samples by cosine, weighted by exp(cosine / temperature).

    Features [S, D], labels [S]. The protocol of Wu et al. (arXiv 1805.01978) and DINO.
    Raises ValueError as `_check` does.
    """
    _check(train_x, train_y, test_x, test_y)
    train_x, test_x = F.normalize(train_x.float(), dim=1), F.normalize(test_x.float(), dim=1)
    classes, right = int(torch.cat([train_y, test_y]).max()) + 1, 0
    for x, y in zip(test_x.split(1024), test_y.split(1024), strict=True):
        cosine, nearest = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)
        votes = x.new_zeros(len(x), classes).scatter_add_(1, train_y[nearest], (cosine / temperature).exp())
        right += int((votes.argmax(1) == y).sum())
    return right / len(test_y)


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy, 0 to 1, of multinomial logistic regression on standardised features.

    The L2 penalty is chosen on a held-out fifth of the training samples, never on the test samples. Solved by L-BFGS in
    float64, so there is no learning rate to tune. An encoder's features, above all an untrained one's, are so collinear
    that L-BFGS would stop far from the minimum: up to 4096 features are rotated to their principal axes, which does not
    move the minimum, and `_solve` scales those. (The paper's protocol trains the same classifier with LARS for 50
    epochs on augmented images.) Raises ValueError as `_check` does.
    """
    _check(train_x, train_y, test_x, test_y)
    x, t = train_x.double(), test_x.double()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, t = (x - mean) / std, (t - mean) / std
    if x.shape[1] <= 4096:  # the penalty is the same in any orthonormal basis
        axes = torch.linalg.eigh(x.T @ x).eigenvectors
        x, t = x @ axes, t @ axes
    classes = int(torch.cat([train_y, test_y]).max()) + 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    held, fitted = order[: len(x) // 5], order[len(x) // 5 :]
    weights = x.new_zeros(x.shape[1] + 1, classes)
    best = (-1.0, STRENGTHS[0], weights)
    for strength in STRENGTHS:
        weights = _solve(x[fitted], train_y[fitted], weights, strength)
        accuracy = _accuracy(weights, x[held], train_y[held])
        if accuracy > best[0]:
            best = (accuracy, strength, weights)
    return _accuracy(_solve(x, train_y, best[2], best[1]), t, test_y)


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Raises ValueError for shapes that do not match, too few samples, or features that are not finite."""
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or x.shape[1] != train_x.shape[1] or y.shape != x.shape[:1]:
            raise ValueError(
                f"{name}: features {list(x.shape)} and labels {list(y.shape)}, wanted [S, {train_x.shape[-1]}] and [S]"
            )
        if len(x) < (5 if name == "train" else 1):
            raise ValueError(f"{name}: {len(x)} samples; a probe needs at least 5 to train and 1 to test")
        if not x.isfinite().all():
            raise ValueError(f"{name}: the features contain NaN or infinity: a broken encoder cannot be probed")


def _solve(x: Tensor, y: Tensor, start: Tensor, strength: float) -> Tensor:
    """Minimizes the mean cross-entropy + strength / 2 * |weights|^2; the last row is the bias, which has no penalty.

    L-BFGS optimizes weights / scale: curvature along a feature, about its mean square + strength, is scaled to 1.
    """
    scale = torch.cat([(x.square().mean(0) + strength).rsqrt(), x.new_ones(1)])[:, None]
    scaled = (start / scale).requires_grad_()
    solver = torch.optim.LBFGS(
        [scaled], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        weights = scaled * scale
        loss = F.cross_entropy(x @ weights[:-1] + weights[-1], y) + strength / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return (scaled * scale).detach()


def _accuracy(weights: Tensor, x: Tensor, y: Tensor) -> float:
    return float(((x @ weights[:-1] + weights[-1]).argmax(1) == y).double().mean())


class OnlineProbe:
    """k-NN accuracy of the target encoder during training, on labelled folders; the images are split over the ranks.

    It draws no random numbers, so probing does not change a bit of the run. Raises ValueError if the folders have no
    labels, their classes differ, or DALI is missing.
    """

    def __init__(self, config: Config, rank: int, world_size: int, device: torch.device) -> None:
        dali()  # if it is missing, say so now, not at the first probe
        self.config, self.device = config, device
        self.sources = open_labelled(str(config.eval.train_path), str(config.eval.val_path))
        self.indices = [evenly(len(s), config.eval.max_images)[rank::world_size].tolist() for s in self.sources]

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """{"knn": accuracy in 0..1}. Every rank calls it and gets the same result."""
        parts = []
        for source, indices in zip(self.sources, self.indices, strict=True):
            batches = eval_batches(
                source,
                crop_size=self.config.data.crop_size,
                batch_size=self.config.data.batch_size,
                indices=indices,
                device=self.device,
                decoder=self.config.decoder,
                num_workers=self.config.data.num_workers,
            )
            features, indices = extract(encoder, batches)
            assert source.labels is not None  # checked by open_labelled
            parts += [features.cpu(), torch.from_numpy(source.labels[indices])]
        ranks: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, parts)
        train_x, train_y, val_x, val_y = (torch.cat(rows) for rows in zip(*ranks, strict=True))
        return {"knn": knn(train_x, train_y, val_x, val_y, k=self.config.eval.knn_k)}


def open_labelled(train: str | Path, val: str | Path) -> list[ImageSource]:
    """The two sources of a probe. Raises ValueError if one has no labels or their classes differ."""
    sources = [open_images(train), open_images(val)]
    for source in sources:
        if source.labels is None or source.classes != sources[0].classes:
            raise ValueError(
                f"{source.path} has the classes {source.classes[:5]}, {train} has {sources[0].classes[:5]}; "
                "a probe needs the same classes in both: one sub-folder per class"
            )
    return sources


def evenly(total: int, wanted: int | None) -> np.ndarray:
    """`wanted` indices spread evenly over `total`; all of them if there are fewer."""
    return (
        np.arange(total) if wanted is None or wanted >= total else np.linspace(0, total - 1, wanted).round().astype(int)
    )
