"""Health of features against independent computations, and the plain words at a collapse."""

import numpy as np
import pytest
import torch

from jepa.metrics import collapse_warning, effective_rank, feature_health


def test_effective_rank_counts_equal_directions() -> None:
    """Rows spread evenly along k orthogonal axes have effective rank k, whatever their mean."""
    for k in (1, 3, 8):
        axes = torch.linalg.qr(torch.randn(20, 20)).Q[:k]
        rows = torch.cat([axes, -axes]) * 3 + torch.randn(20)
        assert effective_rank(rows) == pytest.approx(k, rel=1e-4)


def test_feature_health_is_as_defined() -> None:
    x = torch.randn(40, 7) @ torch.randn(7, 7) + torch.randn(7)
    found, a = feature_health(x), x.double().numpy()
    singular = np.linalg.svd(a - a.mean(0), compute_uv=False)
    share = singular / singular.sum()
    correlation = np.corrcoef(a.T)
    off = correlation[~np.eye(7, dtype=bool)]
    assert found["rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    assert found["std"] == pytest.approx(a.std(0, ddof=1).mean() / np.sqrt((a**2).mean()), rel=1e-9)
    assert found["cov"] == pytest.approx(np.sqrt((off**2).mean()), rel=1e-9)


def words(target: torch.Tensor, predicted: torch.Tensor) -> str | None:
    found = {f"target_{k}": v for k, v in feature_health(target).items()}
    return collapse_warning(found | {f"pred_{k}": v for k, v in feature_health(predicted).items()})


def test_collapse_is_said_and_health_is_not() -> None:
    healthy = torch.randn(64, 16) + 2
    same = torch.randn(16) + 1e-5 * torch.randn(64, 16)
    line = torch.randn(64, 1) * torch.randn(16) + 2
    assert words(healthy, healthy) is None
    for bad in (same, line, torch.ones(64, 16)):
        assert "collapsing: the target encoder" in str(words(bad, healthy))
        assert "collapsing: the predictor" in str(words(healthy, bad))
