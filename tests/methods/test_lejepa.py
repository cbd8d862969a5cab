"""LeJEPA against the formulas of arXiv 2511.08544, in float64."""

import math

import torch
from torch import Tensor

from jepa.methods import find
from jepa.model.layout import Place
from plain import embedded, encoded, positions
from views import compare, config_of, general, mlp, random_views

CPU = torch.device("cpu")
SIDE, LOCAL, PATCH, WIDTH = 8, 4, 4, 24  # patches a side, of global and of local views


def places_of_a_part() -> Tensor:
    """The positions of a local view's patches: the centres of LOCAL x LOCAL cells on the grid of a whole image."""
    table = torch.empty(LOCAL * LOCAL, WIDTH, dtype=torch.float64)
    quarter = WIDTH // 4
    for row in range(LOCAL):
        for column in range(LOCAL):
            for half, cell in enumerate((column, row)):
                at = (cell + 0.5) * SIDE / LOCAL - 0.5
                for i in range(quarter):
                    omega = 10000 ** -(i / quarter)
                    table[row * LOCAL + column, half * 2 * quarter + i] = math.sin(at * omega)
                    table[row * LOCAL + column, half * 2 * quarter + quarter + i] = math.cos(at * omega)
    return table


def embedding(images: Tensor, w: dict[str, Tensor]) -> Tensor:
    """z [B, D] before the batch norms, which are over all views: the mean feature."""
    encoder = {name.removeprefix("encoder."): value for name, value in w.items() if name.startswith("encoder.")}
    tokens = embedded(images, encoder, PATCH)
    if images.shape[1] == LOCAL * PATCH:
        tokens = tokens - positions(WIDTH, LOCAL) + places_of_a_part()
    return encoded(tokens, encoder, 2, 2).mean(1)


def statistic(x: Tensor) -> Tensor:
    """Epps and Pulley's of N numbers: N times the integral over t in [-3, 3] of |mean exp(i t x) - phi(t)|^2 phi(t),
    phi(t) = exp(-t^2 / 2), by the trapezoid rule with 17 knots on each side."""
    step, total = 3 / 16, torch.zeros((), dtype=torch.float64)
    for j in range(-16, 17):
        t = j * step
        phi = math.exp(-(t**2) / 2)
        apart = (torch.cos(t * x).mean() - phi) ** 2 + torch.sin(t * x).mean() ** 2
        total = total + (step / 2 if abs(j) == 16 else step) * phi * apart
    return len(x) * total


def test_the_loss_is_the_papers() -> None:
    config = config_of("lejepa", "loss.weight=0.3")
    views, slices = random_views(config, 6), find("lejepa").layout(config, Place(2, 0, 0, 1), CPU)
    assert [images.shape[1] for images in views] == [32, 32, 16, 16]

    def wanted(views: list[Tensor], w: dict[str, Tensor]) -> tuple[Tensor, ...]:
        z = mlp(torch.cat([embedding(images, w) for images in views]), w, "projector", 3).chunk(len(views))
        goal = (z[0] + z[1]) / 2
        prediction = torch.stack([((one - goal) ** 2).mean() for one in z]).mean()
        directions = slices.double().unbind(1)
        gaussian = torch.stack([statistic(one @ a) for one in z for a in directions]).mean()
        return 0.7 * prediction + 0.3 * gaussian, prediction, gaussian

    compare(general(config), views, slices, wanted)


def test_directions_are_new_in_each_micro_batch_and_the_same_on_all_ranks() -> None:
    config = config_of("lejepa", "engine.gradient_accumulation_steps=2")
    places = [Place(step, micro, rank, 2) for step in (0, 1) for micro in (0, 1) for rank in (0, 1)]
    drawn = [find("lejepa").layout(config, place, CPU) for place in places]
    for slices in drawn:
        assert slices.shape == (8, 32)
        torch.testing.assert_close(slices.norm(dim=0), torch.ones(32))
    for one, other in zip(drawn[::2], drawn[1::2], strict=True):
        assert torch.equal(one, other)
    for i, one in enumerate(drawn[::2]):
        assert not any(torch.equal(one, other) for other in drawn[2 * i + 2 :: 2])
