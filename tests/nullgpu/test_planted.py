"""Faults planted in a step are found: a wait, a graph compiled again, a length that Inductor cannot split."""

from collections import Counter
from typing import Any

import pytest
import torch
from steps import failures, load, take
from torch import Tensor
from torch._inductor.exc import InductorError

import jepa.train.step
from jepa.model import vit
from jepa.ranks import distributed

CONFIG = ("in1k_vitb16_ep600_ijepa.yaml", "meta.depth=2", "meta.pred_depth=2", "data.batch_size=32")


def found(ranks: distributed.Ranks) -> list[str]:
    return failures(take(load(*CONFIG), ranks, range(4)), Counter())


def test_nothing_is_found_without_a_fault(ranks: distributed.Ranks) -> None:
    assert found(ranks) == []


def test_a_planted_item(ranks: distributed.Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = jepa.train.step.poison

    def reading(loss: Tensor) -> Tensor:
        loss.detach().item()
        return plain(loss)

    monkeypatch.setattr(jepa.train.step, "poison", reading)
    assert any("waits for the GPU" in line for line in found(ranks))


def test_a_planted_recompilation(ranks: distributed.Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def specialised(self: vit.Mlp, x: Tensor) -> Tensor:
        y = self.fc2(torch.nn.functional.gelu(self.fc1(x)))
        return y * 1.0 if x.shape[1] % 2 else y

    monkeypatch.setattr(vit.Mlp, "forward", specialised)
    assert any("compiled again" in line for line in found(ranks))


def test_a_planted_graph_break(ranks: distributed.Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def printing(self: vit.Mlp, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))

    monkeypatch.setattr(vit.Mlp, "forward", printing)
    assert any("graph break" in line for line in found(ranks))


def test_a_planted_cat_in_a_compiled_block(ranks: distributed.Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an earlier version's default step, whose predictor joined contexts and targets inside the graph."""
    plain = vit.Block.forward

    def joined(self: vit.Block, x: Tensor, rows: Any = None, queries: Any = None, keys: Any = None) -> Tensor:
        if rows is None or x.shape[1] == rows.shape[1]:
            return plain(self, x, rows, queries, keys)
        return plain(self, torch.cat([x, rows], 1), rows, queries, keys)

    monkeypatch.setattr(vit.Block, "forward", joined)
    with pytest.raises(InductorError):
        found(ranks)
