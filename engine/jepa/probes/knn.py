"""The accuracy of the nearest neighbours' vote on frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import check


def knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Accuracy, 0 to 1, of a vote of the k nearest training samples by cosine, weighted by exp(cosine / temperature).

    Features [S, D], labels [S]. The protocol of Wu et al. (arXiv 1805.01978) and DINO.
    Raises ValueError as `check` does.
    """
    check(train_x, train_y, test_x, test_y)
    train_x, test_x = F.normalize(train_x.float(), dim=1), F.normalize(test_x.float(), dim=1)
    classes, right = int(torch.cat([train_y, test_y]).max()) + 1, 0
    for x, y in zip(test_x.split(1024), test_y.split(1024), strict=True):
        cosine, nearest = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)
        votes = x.new_zeros(len(x), classes).scatter_add_(1, train_y[nearest], (cosine / temperature).exp())
        right += int((votes.argmax(1) == y).sum())
    return right / len(test_y)
