"""Health of features against independent computations, and the warning at a collapse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa.train.health import collapse_warning, effective_rank, feature_health
from jepa.train.log import RunLog
from small import run_ranks, small_config


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
        assert "collapsing: the features 'target'" in str(words(bad, healthy))
        assert "collapsing: the features 'pred'" in str(words(healthy, bad))


TORN = ('{"step": 1', "2,1,0.3", "\n", "[3]\n", "1", "")


def log_steps(folder: Path, first: int, last: int, torn: str) -> None:
    """Logs steps, five per epoch; then the files end like those of a run killed while writing."""
    log = RunLog(small_config(f"logging.folder={folder}"), first, 20, 5, 8, torch.device("cpu"))
    for step in range(first, last):
        log.step(step, [torch.full((5,), step + 100.0 * first)], 10, 5, 0.0)
        log.flush(lr=float("nan") if step == 3 else 0.1)
    log.close()
    for name in ("jepa.jsonl", "jepa_r0.csv"):
        with (folder / name).open("a") as file:
            file.write(torn)


def log_twice(folder: Path) -> None:
    for i, torn in enumerate(TORN):
        log_steps(folder / str(i), 0, 8, torn)
        log_steps(folder / str(i), 6, 9, "")


@pytest.mark.ranks
def test_a_log_goes_on_without_torn_or_repeated_rows(tmp_path: Path) -> None:
    run_ranks(1, log_twice, tmp_path)
    wanted = [*range(6), 606, 607, 608]
    for i in range(len(TORN)):
        text = (tmp_path / str(i) / "jepa.jsonl").read_text()
        assert "NaN" not in text  # not valid JSON
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["loss"] for row in rows] == wanted and [row["step"] for row in rows] == list(range(9))
        assert [row["lr"] for row in rows] == [None if step == 3 else 0.1 for step in range(9)]
        header, *lines = (tmp_path / str(i) / "jepa_r0.csv").read_text().splitlines()
        assert header.startswith("epoch,itr,loss") and [float(line.split(",")[2]) for line in lines] == wanted
        assert [line.split(",")[:2] for line in lines] == [[str(step // 5 + 1), str(step % 5)] for step in range(9)]
