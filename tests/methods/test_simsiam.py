"""SimSiam against section 3 of arXiv 2011.10566, in float64; and the rate of its predictor."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jepa.state.checkpoint import Saver
from jepa.state.lock import Lock
from jepa.train import zero
from jepa.train.step import start_model
from small import run_ranks, whole_weights
from views import compare, config_of, general, mlp, normed, pooled, random_views


def distance(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z), equation 1, the mean over the batch."""
    rows = [(a / a.norm() * b / b.norm()).sum() for a, b in zip(p, z, strict=True)]
    return -torch.stack(rows).mean()


def test_the_loss_is_the_papers() -> None:
    """Equation 4: no gradient reaches what is predicted. Each view is a batch of its own."""
    config = config_of("simsiam")

    def wanted(views: list[Tensor], w: dict[str, Tensor]) -> tuple[Tensor, ...]:
        z1, z2 = (normed(mlp(pooled(images, w), w, "projector", 3)) for images in views)
        p1, p2 = (mlp(z, w, "prediction", 2) for z in (z1, z2))
        loss = distance(p1, z2.detach()) / 2 + distance(p2, z1.detach()) / 2
        return loss, -loss

    compare(general(config), random_views(config, 6), None, wanted)


def moves(model_engine: Any, config: Any, step: int) -> set[str]:
    """The submodules that a step at a learning rate of zero moves."""
    before = whole_weights(model_engine)
    torch.manual_seed(100 * step + dist.get_rank())
    zero.schedule(model_engine, torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64))
    model_engine.backward(model_engine(random_views(config, 4), None, None).loss)
    assert zero.step(model_engine).applied
    after = whole_weights(model_engine)
    return {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])}


def rates(folder: Path) -> dict[int, list[set[str]]]:
    """At each ZeRO stage: what moves before and after a resume."""
    found = {}
    for stage in range(4):
        place = (f"engine.zero_stage={stage}", f"logging.folder={folder / str(stage)}")
        config, moved = config_of("simsiam", *place), []
        for step in range(2):
            model_engine, _ = start_model(config, torch.device("cpu"))
            with Lock(config) as lock:
                saver = Saver(config, model_engine, 10, {}, lock)
                progress = saver.resume("latest") if step else saver.begin()
                moved.append(moves(model_engine, config, step))
                progress.count(True, 8)
                saver.save(progress)
            model_engine.destroy()
        found[stage] = moved
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_predictors_rate_is_not_decayed(ranks: int, tmp_path: Path) -> None:
    for found in run_ranks(ranks, rates, tmp_path):
        assert found == {stage: [{"prediction"}] * 2 for stage in range(4)}
