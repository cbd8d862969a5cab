"""vicreg over a process group: ranks that share the rows, against one process with all of them."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_kernels import vicreg

pytestmark = pytest.mark.ranks

# N rows per rank, M, D: cases that gather rows (Gram matrix; covariance), and that reduce the covariance.
SHAPES = [(3, 3, 11), (16, 4, 64), (5, 2, 6), (40, 3, 5)]
WEIGHTS = (25.0, 25.0, 1.0)
RANKS = 2


def step(z: Tensor, layer: nn.Linear, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """The terms, and the gradients of their weighted sum with respect to the rows and the weight of a layer."""
    z = z.clone().requires_grad_()
    terms = vicreg(layer(z), group=group)
    sum(w * t for w, t in zip(WEIGHTS, terms, strict=True)).backward()
    grad, layer.weight.grad = layer.weight.grad, None
    return torch.stack(terms).detach(), z.grad, grad


def rank_main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=2), world_size=RANKS, rank=rank)
    torch.set_num_threads(1)
    results = []
    for z, weight in torch.load(folder / "cases.pt"):
        layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=z.dtype)
        layer.load_state_dict({"weight": weight})
        mine = z.chunk(RANKS)[rank]
        terms, grad, weight_grad = step(mine, layer, dist.group.WORLD)
        dist.all_reduce(weight_grad)
        # Ranks that weight the loss differently get the gradient of the sum of their losses.
        leaf = mine.clone().requires_grad_()
        (vicreg(leaf, group=dist.group.WORLD)[2] * (rank + 0.5)).backward()
        with torch.no_grad():
            again = torch.stack(vicreg(layer(mine), group=dist.group.WORLD))
            if z.dtype == torch.float64:  # the collectives cause no graph break
                compiled = torch.compile(vicreg, backend="aot_eager", fullgraph=True)
                torch.testing.assert_close(torch.stack(compiled(layer(mine), group=dist.group.WORLD)), again)
        results.append((terms, grad / RANKS, weight_grad / RANKS, leaf.grad, again))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def cases() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(RANKS * N, M, D, dtype=dtype) * 0.8 + 3, torch.randn(D, D, dtype=dtype) / D**0.5)
        for N, M, D in SHAPES
        for dtype in (torch.float32, torch.float64)
    ]


def unequal_rank_main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=30), world_size=RANKS, rank=rank)
    for N, D in ((3, 12), (1, 7), (40, 2)):  # with one row less, rank 1 would communicate something else
        with pytest.raises(ValueError, match=rf"row count on every rank.*\[{N}, {N - 1}\]"):
            vicreg(torch.randn(N - rank, 2, D), group=dist.group.WORLD)
    compiled = torch.compile(vicreg, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="row count on every rank"):
        compiled(torch.randn(40 - rank, 2, 3), group=dist.group.WORLD)
    dist.destroy_process_group()


def test_unequal_rows_are_refused_on_every_rank(tmp_path):
    torch.multiprocessing.spawn(unequal_rank_main, (tmp_path,), nprocs=RANKS)


@pytest.fixture(scope="module")
def ranks(cases, tmp_path_factory) -> list[list[tuple[Tensor, ...]]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(cases, folder / "cases.pt")
    torch.multiprocessing.spawn(rank_main, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", range(2 * len(SHAPES)))
def test_ranks_equal_one_process_with_all_rows(cases, ranks, case):
    z, weight = cases[case]
    layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=z.dtype)
    layer.load_state_dict({"weight": weight})
    terms, grad, weight_grad = step(z, layer, None)
    close = {"rtol": 1e-5, "atol": 1e-5} if z.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    # The layer's gradient sums products that cancel: its rounding error is relative to their magnitudes.
    magnitude = grad.abs().sum((0, 1)).max().item() * z.abs().max().item()
    close_weight = close if z.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5 + 1e-6 * magnitude}
    for rank in range(RANKS):
        terms_, _, weight_grad_, _, again = ranks[rank][case]
        torch.testing.assert_close(terms_, terms, **close)
        torch.testing.assert_close(again, terms, **close)
        torch.testing.assert_close(weight_grad_, weight_grad, **close_weight)
    torch.testing.assert_close(torch.cat([ranks[r][case][1] for r in range(RANKS)]), grad, **close)
    leaf = z.clone().requires_grad_()
    (vicreg(leaf)[2] * sum(rank + 0.5 for rank in range(RANKS))).backward()
    torch.testing.assert_close(torch.cat([ranks[r][case][3] for r in range(RANKS)]), leaf.grad, **close)


@pytest.mark.parametrize("case", range(2 * len(SHAPES)))
def test_every_rank_has_the_same_numbers(ranks, case):
    assert torch.equal(ranks[0][case][0], ranks[1][case][0])
