"""VICReg against equations 1 to 6 of arXiv 2105.04906, in float64."""

import torch
from torch import Tensor

from views import compare, config_of, general, mlp, pooled, random_views


def variance(z: Tensor) -> Tensor:
    """v(Z): the hinge at 1 of each dimension's standard deviation, eps 1e-4 (equations 1 and 2)."""
    n = len(z)
    std = torch.sqrt(((z - z.mean(0)) ** 2).sum(0) / (n - 1) + 1e-4)
    return torch.clamp(1 - std, min=0).mean()


def covariance(z: Tensor) -> Tensor:
    """c(Z): the squares of the covariance matrix's off-diagonal entries over d (equations 3 and 4)."""
    n, d = z.shape
    C = sum(torch.outer(row, row) for row in z - z.mean(0)) / (n - 1)
    return sum(C[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d


def test_the_loss_is_the_papers() -> None:
    """Equation 6 with mean squared differences, and half of the variances' sum, as its authors' code has it. Each view
    is a batch of its own."""
    weights = ("loss.beta_sim=3.0", "loss.beta_std=5.0", "loss.beta_cov=0.7")
    config = config_of("vicreg", *weights)

    def wanted(views: list[Tensor], w: dict[str, Tensor]) -> tuple[Tensor, ...]:
        a, b = (mlp(pooled(images, w), w, "expander", 3) for images in views)
        sim = ((a - b) ** 2).sum(1).mean() / a.shape[1]
        std, cov = (variance(a) + variance(b)) / 2, covariance(a) + covariance(b)
        return 3 * sim + 5 * std + 0.7 * cov, sim, std, cov

    compare(general(config), random_views(config, 6), None, wanted)
