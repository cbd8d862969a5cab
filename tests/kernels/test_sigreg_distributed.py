"""sigreg over a process group: ranks that share the rows, equally or not, against one process with all of them."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_kernels import sigreg, sigreg_slices

pytestmark = pytest.mark.ranks

ROWS = [(3, 3), (16, 16), (5, 2), (0, 4)]  # of each rank
V, D, S = 3, 8, 70
RANKS = 2


def step(z: Tensor, layer: nn.Linear, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """The statistic, and its gradients with respect to the rows and the weight of a layer."""
    z = z.clone().requires_grad_()
    slices = sigreg_slices(D, S, seed=3, step=4)  # drawn by every rank
    found = sigreg(layer(z), slices, group=group)
    found.backward()
    grad, layer.weight.grad = layer.weight.grad, None
    return found.detach(), z.grad, grad


def rank_main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=2), world_size=RANKS, rank=rank)
    torch.set_num_threads(1)
    results = []
    for rows, z, weight in torch.load(folder / "cases.pt"):
        layer = nn.Linear(D, D, bias=False, dtype=z.dtype)
        layer.load_state_dict({"weight": weight})
        mine = z.split(rows, 1)[rank]
        found, grad, weight_grad = step(mine, layer, dist.group.WORLD)
        dist.all_reduce(weight_grad)
        # Ranks that weight the loss differently get the gradient of the sum of their losses.
        leaf, slices = mine.clone().requires_grad_(), torch.eye(D)
        (sigreg(leaf, slices, group=dist.group.WORLD) * (rank + 0.5)).backward()
        with torch.no_grad():
            again = sigreg(mine, slices, group=dist.group.WORLD)
        if z.dtype == torch.float64:  # the collectives cause no graph break
            compiled = torch.compile(sigreg, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(mine, slices, group=dist.group.WORLD), again)
        results.append((found, grad / RANKS, weight_grad / RANKS, leaf.grad, again))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def cases() -> list[tuple[tuple[int, int], Tensor, Tensor]]:
    return [
        (rows, torch.randn(V, sum(rows), D, dtype=dtype) * 0.8 + 0.3, torch.randn(D, D, dtype=dtype) / D**0.5)
        for rows in ROWS
        for dtype in (torch.float32, torch.float64)
    ]


@pytest.fixture(scope="module")
def ranks(cases, tmp_path_factory) -> list[list[tuple[Tensor, ...]]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(cases, folder / "cases.pt")
    torch.multiprocessing.spawn(rank_main, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", range(2 * len(ROWS)))
def test_ranks_equal_one_process_with_all_rows(cases, ranks, case):
    _, z, weight = cases[case]
    layer = nn.Linear(D, D, bias=False, dtype=z.dtype)
    layer.load_state_dict({"weight": weight})
    found, grad, weight_grad = step(z, layer, None)
    close = {"rtol": 1e-5, "atol": 1e-6} if z.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    for rank in range(RANKS):
        found_, _, weight_grad_, _, again = ranks[rank][case]
        torch.testing.assert_close(found_, found, **close)
        torch.testing.assert_close(again, sigreg(z, torch.eye(D)), **close)
        torch.testing.assert_close(weight_grad_, weight_grad, **close)
    torch.testing.assert_close(torch.cat([ranks[r][case][1] for r in range(RANKS)], 1), grad, **close)
    leaf = z.clone().requires_grad_()
    (sigreg(leaf, torch.eye(D)) * sum(rank + 0.5 for rank in range(RANKS))).backward()
    torch.testing.assert_close(torch.cat([ranks[r][case][3] for r in range(RANKS)], 1), leaf.grad, **close)


@pytest.mark.parametrize("case", range(2 * len(ROWS)))
def test_every_rank_has_the_same_numbers(ranks, case):
    assert torch.equal(ranks[0][case][0], ranks[1][case][0])
