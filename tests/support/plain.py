"""The model and its losses, written from the papers' text in float64, sharing no code with the engine.

Weights are a state dict: `w["blocks.0.attn.qkv.weight"]`, float64.
"""

import math
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa.methods.base import Method
from jepa.model.projector import GlobalBatchNorm

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attention(x: Tensor, w: dict[str, Tensor], name: str, heads: int) -> tuple[Tensor, list[Tensor]]:
    q, k, v = linear(x, w, f"{name}.qkv").chunk(3, dim=-1)
    width = q.shape[-1] // heads
    mixed, maps = [], []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = torch.einsum("bkd,bjd->bkj", q[..., part], k[..., part]) / math.sqrt(width)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        maps.append(weights)
        mixed.append(torch.einsum("bkj,bjd->bkd", weights, v[..., part]))
    return linear(torch.cat(mixed, -1), w, f"{name}.proj"), maps


def block(x: Tensor, w: dict[str, Tensor], name: str, heads: int) -> Tensor:
    x = x + attention(norm(x, w, f"{name}.norm1"), w, f"{name}.attn", heads)[0]
    y = linear(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
    return x + linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), w, f"{name}.mlp.fc2")


def positions(dim: int, side: int) -> Tensor:
    """Element by element, from the text: the first half of the width encodes the column."""
    table = torch.empty(side * side, dim, dtype=torch.float64)
    quarter = dim // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                omega = 10000 ** -(i / quarter)
                for half, coordinate in enumerate((column, row)):
                    table[row * side + column, half * 2 * quarter + i] = math.sin(coordinate * omega)
                    table[row * side + column, half * 2 * quarter + quarter + i] = math.cos(coordinate * omega)
    return table


def embedded(images: Tensor, w: dict[str, Tensor], patch: int) -> Tensor:
    """uint8 [B, H, W, 3] -> tokens [B, N, D] through a convolution, with positions."""
    pixels = (images.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    weight, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    x = torch.nn.functional.conv2d(pixels.permute(0, 3, 1, 2), weight, bias, stride=patch).flatten(2).transpose(1, 2)
    return x + positions(x.shape[-1], images.shape[1] // patch)


def encoded(x: Tensor, w: dict[str, Tensor], depth: int, heads: int) -> Tensor:
    """Embedded tokens [B, K, D] -> the encoder's output."""
    for i in range(depth):
        x = block(x, w, f"blocks.{i}", heads)
    return norm(x, w, "norm")


def predicted(
    z: Tensor, context: Tensor, target: Tensor, w: dict[str, Tensor], side: int, depth: int, heads: int
) -> Tensor:
    """One target block of one image: context features [Kc, D], their patches [Kc], the block's [Kt] -> [Kt, D]."""
    seen = linear(z, w, "predictor_embed")
    table = positions(seen.shape[-1], side)
    x = torch.cat([seen + table[context], w["mask_token"].flatten() + table[target]])[None]
    for i in range(depth):
        x = block(x, w, f"predictor_blocks.{i}", heads)
    return linear(norm(x, w, "predictor_norm")[0, len(context) :], w, "predictor_proj")


def criterion(model: Method, z_BD: Tensor, p_MBKD: Tensor, target: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Algorithm 1 and its options, literally: every ordered pair of different blocks. `z_BD`: the pooled context."""
    loss, (M, B) = getattr(model, "loss", None), p_MBKD.shape[:2]
    total = torch.zeros((), dtype=torch.float64)
    for m in range(M):
        for b in range(B):
            rows = h[b, target[m, b]].double()
            goal = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            d = (p_MBKD[m, b] - goal).abs()
            total = total + torch.where(d < 1, d**2 / 2, d - 0.5).mean() / (M * B)
    jepa, zero = total, torch.zeros((), dtype=torch.float64)
    sim = std = cov = zero
    views = p_MBKD.mean(2)
    if loss is None:
        return total, jepa
    if loss.regularizer == "cosine":
        pairs = [F.cosine_similarity(views[i], views[j]).mean() for i, j in permutations(range(M), 2)]
        sim = torch.stack(pairs).mean()
        total = jepa - loss.beta_vicreg * sim
    else:
        if loss.vicreg_on == "context":
            both = projected(model, torch.cat([z_BD, h.double().mean(1)]))
            c, t = both[:B], both[B:]
            sim, std, cov = ((c - t) ** 2).mean(), variance_term(c), 2 * covariance_term(c)
        else:
            flat = views.transpose(0, 1).reshape(B * M, -1)
            blocks = projected(model, flat).view(B, M, -1).unbind(1)
            both_ways = [(blocks[i], blocks[j]) for i, j in permutations(range(M), 2)]
            sim = torch.stack([((a - b) ** 2).mean() for a, b in both_ways]).mean()
            std = torch.stack([(variance_term(a) + variance_term(b)) / 2 for a, b in both_ways]).mean()
            cov = torch.stack([covariance_term(a) + covariance_term(b) for a, b in both_ways]).mean()
        total = jepa + loss.beta_vicreg * (loss.beta_sim * sim + loss.beta_std * std + loss.beta_cov * cov)
    return total, jepa, sim, std, cov


def projected(model: Method, x: Tensor) -> Tensor:
    """The projector in float64, batch norm by its definition."""
    assert isinstance(model.projector, torch.nn.Sequential)
    for layer in model.projector:
        if isinstance(layer, torch.nn.Linear):
            x = x @ layer.weight.double().T + layer.bias.double()
        elif isinstance(layer, GlobalBatchNorm):
            variance = ((x - x.mean(0)) ** 2).mean(0)
            weight, bias = (p.double() for p in layer.parameters())
            x = (x - x.mean(0)) / torch.sqrt(variance + 1e-5) * weight + bias
        else:
            x = x.clamp_min(0)
    return x


def variance_term(z: Tensor) -> Tensor:
    return (1 - torch.sqrt(z.var(0) + 1e-4)).clamp_min(0).mean()


def covariance_term(z: Tensor) -> Tensor:
    C = torch.cov(z.T)
    return (C**2).sum() / len(C) - (C.diagonal() ** 2).sum() / len(C)
