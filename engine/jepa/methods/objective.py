"""The loss of a step: I-JEPA's prediction of hidden blocks, and the regulariser that C-JEPA adds.

I-JEPA (arXiv 2301.08243): smooth L1 between the predictor's output and the layer-normed target features.
C-JEPA (arXiv 2410.19560, Algorithm 1): the M predicted blocks of an image are its views. Their means over patches go
through a projector, and VICReg's terms are taken over all pairs of blocks, with statistics over all ranks:
    L = L_jepa + beta_vicreg * (beta_sim * sim + beta_std * std + beta_cov * cov).

Legend: B images, M target blocks, Kc/Kt kept patches of a context and of a target, N patches, D width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.config.schema import Config
from jepa.model.attention import require
from jepa.model.packed import Ragged
from jepa.model.predictor import build_predictor
from jepa.model.vit import Attention, build_encoder
from jepa_kernels import prediction_loss, vicreg


class Losses(NamedTuple):
    """fp32 scalars: the differentiable `total`, and its terms, detached and unweighted. Absent terms are zero."""

    total: Tensor
    jepa: Tensor
    sim: Tensor
    std: Tensor
    cov: Tensor


def poison(loss: Tensor) -> Tensor:
    """The unchanged loss, with a gradient that is NaN if the loss is not finite."""
    return loss * (1 + 0 * loss.detach())


class Output(NamedTuple):
    losses: Losses
    predicted_RD: Tensor
    """The predicted blocks' means over their patches, one row per block and image, detached."""
    h_BUD: Tensor
    """The target features that the loss was computed with."""


def world_group() -> dist.ProcessGroup | None:
    """The group whose ranks share one batch, or None for a single process."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduced gradient: the derivative of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        y = x.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class GlobalBatchNorm(nn.Module):
    """Synchronised batch norm of [R, D] rows: statistics over all ranks' rows, in fp32, without running averages."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
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
        return (normed * self.weight + self.bias).to(x_RD.dtype)


def projector(widths: Sequence[int], dim: int) -> nn.Sequential:
    """Linear layers of the given output widths, with batch norm and ReLU in between."""
    layers: list[nn.Module] = []
    for width in widths:
        if layers:
            layers += [GlobalBatchNorm(dim), nn.ReLU()]
        layers.append(nn.Linear(dim, width))
        dim = width
    return nn.Sequential(*layers)


def mean_pairwise_cosine(z_BMD: Tensor) -> Tensor:
    """Mean cosine similarity over ordered pairs of different blocks, fp32. With unit rows u_i,
    sum over i != j of u_i . u_j = |sum_i u_i|^2 - M."""
    M = z_BMD.shape[1]
    unit = F.normalize(z_BMD.float(), dim=-1)
    return (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))).mean() / (M * (M - 1))


class JepaModel(nn.Module):
    """What is trained: encoder, predictor and, for C-JEPA, the projector. Its forward is a micro-batch's loss."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.loss = config.loss
        self.encoder = build_encoder(config)
        self.predictor = build_predictor(config)
        self.projector: nn.Sequential | None = None
        if config.has_projector:
            self.projector = projector(config.projector_widths, config.vit.embed_dim)

        require(config.engine.attention)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = config.engine.attention
        self.encoder.checkpointing = self.predictor.checkpointing = config.engine.activation_checkpointing
        self.predictor.skip_unread = config.engine.skip_unread

    def forward(
        self,
        images: Tensor,
        contexts: Tensor | Sequence[Ragged],
        target_MBK: Tensor,
        features: Tensor | Callable[[], Tensor],
        places_MBK: Tensor | None = None,
    ) -> Output:
        """uint8 images, int64 indices of E context and M target blocks, and the target encoder's output h [B, U, D] for
        the images, or a function that returns it, called after the predictions, when h is needed.

        Contexts are [E, B, Kc], or E packed ones. `places_MBK`: the positions of the targets' rows in h, unless h has
        all N rows in order. With several context masks the loss is the mean over them.
        """
        places = target_MBK if places_MBK is None else places_MBK
        seen = [self.encoder(images, context) for context in contexts]
        predicted = [self.predictor(z, context, target_MBK) for z, context in zip(seen, contexts, strict=True)]
        h_BUD = features() if callable(features) else features
        every = zip(contexts, seen, predicted, strict=True)
        each = [self._losses(context, z, p_RKD, h_BUD, places) for context, z, p_RKD in every]
        losses = Losses(*(torch.stack(terms).mean(0) for terms in zip(*each, strict=True)))
        return Output(losses, torch.cat([p_RKD.detach().mean(1) for p_RKD in predicted]), h_BUD)

    def _losses(self, context: Tensor | Ragged, z: Tensor, p_RKD: Tensor, h_BUD: Tensor, places_MBK: Tensor) -> Losses:
        """The losses of one context mask, with encoded patches z and predictions p."""
        M, B, _ = places_MBK.shape
        jepa = prediction_loss(p_RKD, h_BUD, places_MBK)
        total, (sim, std, cov) = jepa, (jepa.new_zeros(()) for _ in range(3))
        if self.loss.objective == "cjepa":
            pooled_BMD = p_RKD.mean(1).view(M, B, -1).transpose(0, 1)
            if self.projector is None:
                sim = mean_pairwise_cosine(pooled_BMD)
                total = jepa - self.loss.beta_vicreg * sim
            else:
                if self.loss.vicreg_on == "context":
                    z_BD = context.contexts.means(z)[:B] if isinstance(context, Ragged) else z.mean(1)
                    sim, std, cov = self._vicreg_of_context(z_BD, h_BUD.mean(1))
                else:
                    sim, std, cov = self._vicreg(pooled_BMD)
                weighted = self.loss.beta_sim * sim + self.loss.beta_std * std + self.loss.beta_cov * cov
                total = jepa + self.loss.beta_vicreg * weighted
        return Losses(total, *(term.detach() for term in (jepa, sim, std, cov)))

    def _vicreg(self, views_BMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Algorithm 1: the views are the predicted blocks."""
        assert self.projector is not None
        B, M, D = views_BMD.shape
        return vicreg(self.projector(views_BMD.reshape(B * M, D)).view(B, M, -1), group=world_group())

    def _vicreg_of_context(self, z_BD: Tensor, h_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Appendix C.2: variance and covariance of the context encoder's pooled output, and its MSE to the pooled
        target features."""
        assert self.projector is not None
        context, target = self.projector(torch.cat([z_BD, h_BD])).view(2, len(z_BD), -1)
        _, std, cov = vicreg(context[:, None], group=world_group())
        return F.mse_loss(context.float(), target.float()), std, cov
