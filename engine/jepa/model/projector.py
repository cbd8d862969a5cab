"""The MLPs that a loss puts behind an encoder, and the batch norm in them, which spans all ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa.ranks.distributed import world_group


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduced gradient: the derivative of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        y = x.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class GlobalBatchNorm(nn.Module):
    """Synchronised batch norm of [R, D] rows: statistics over all ranks' rows, in fp32, without running averages.

    `affine`: whether it has a trained scale and shift.
    """

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None
        self.eps = eps

    def forward(self, x_RD: Tensor) -> Tensor:
        group = world_group()
        x = x_RD if x_RD.dtype == torch.float64 else x_RD.float()
        rows = x.shape[0] * (dist.get_world_size(group) if group else 1)

        def mean(values: Tensor) -> Tensor:
            total = values.sum(0)
            return (_SumOverRanks.apply(total, group) if group else total) / rows

        centred = x - mean(x)
        normed = centred * torch.rsqrt(mean(centred.square()) + self.eps)
        if self.weight is not None and self.bias is not None:
            normed = normed * self.weight + self.bias
        return normed.to(x_RD.dtype)


def projector(widths: Sequence[int], dim: int) -> nn.Sequential:
    """Linear layers of the given output widths, with batch norm and ReLU in between."""
    layers: list[nn.Module] = []
    for width in widths:
        if layers:
            layers += [GlobalBatchNorm(dim), nn.ReLU()]
        layers.append(nn.Linear(dim, width))
        dim = width
    return nn.Sequential(*layers)
