"""The accuracy of a linear classifier on frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import check

STRENGTHS = tuple(10.0**e for e in range(0, -9, -1))  # of the linear probe's L2 penalty, strongest first


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy, 0 to 1, of multinomial logistic regression on standardised features.

    The L2 penalty is chosen on a held-out fifth of the training samples, never on the test samples. Solved by L-BFGS in
    float64, so there is no learning rate to tune. An encoder's features, above all an untrained one's, are so collinear
    that L-BFGS would stop far from the minimum: up to 4096 features are rotated to their principal axes, which does not
    move the minimum, and `_solve` scales those. (The paper's protocol trains the same classifier with LARS for 50
    epochs on augmented images.) Raises ValueError as `check` does.
    """
    check(train_x, train_y, test_x, test_y)
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
