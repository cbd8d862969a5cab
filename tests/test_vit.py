"""The encoder and the predictor against a re-derivation in float64 that shares no code with them."""

import math

import pytest
import torch
from torch import Tensor

from jepa.vit import Predictor, VisionTransformer

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def random_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Fills a module with general weights (no zero biases, no unit norms); returns its state in float64."""
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return {name: value.double() for name, value in module.state_dict().items()}


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    """Within what a few fp32 layers may differ from float64."""
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < 2e-6, f"relative error {error:.1e}"


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


@pytest.fixture
def encoder() -> VisionTransformer:
    return VisionTransformer(24, 4, embed_dim=16, depth=3, num_heads=2, mlp_ratio=3.0, mean=MEAN, std=STD)


def test_encoder_is_the_paper_s(encoder: VisionTransformer) -> None:
    w = random_weights(encoder)
    images = torch.randint(0, 256, (5, 24, 24, 3), dtype=torch.uint8)
    x = embedded(images, w, 4)
    outputs = []
    for i in range(3):
        last_input, x = x, block(x, w, f"blocks.{i}", 2)
        outputs.append(norm(x, w, "norm"))
    assert_equal(encoder(images), outputs[-1])
    assert_equal(encoder(images.permute(0, 3, 1, 2)), outputs[-1])
    for got, wanted in zip(encoder.features(images, [-1, 0]), [outputs[-1], outputs[0]], strict=True):
        assert_equal(got, wanted)
    maps = attention(norm(last_input, w, "blocks.2.norm1"), w, "blocks.2.attn", 2)[1]
    assert_equal(encoder.attention(images), torch.stack(maps, 1))


def test_encoder_sees_only_the_patches_of_the_index(encoder: VisionTransformer) -> None:
    w = random_weights(encoder)
    images = torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8)
    index = torch.stack([torch.randperm(36)[:7].sort().values for _ in range(3)])
    x = torch.stack([tokens[rows] for tokens, rows in zip(embedded(images, w, 4), index, strict=True)])
    for i in range(3):
        x = block(x, w, f"blocks.{i}", 2)
    assert_equal(encoder(images, index), norm(x, w, "norm"))


def test_predictor_is_the_paper_s() -> None:
    B, M, Kc, Kt, D, width = 3, 4, 9, 5, 16, 12
    predictor = Predictor(6, D, width, depth=2, num_heads=3)
    w = random_weights(predictor)
    context = torch.randn(B, Kc, D)
    context_index = torch.stack([torch.randperm(36)[:Kc] for _ in range(B)])
    target_index = torch.stack([torch.stack([torch.randperm(36)[:Kt] for _ in range(B)]) for _ in range(M)])
    table, mask_token = positions(width, 6), w["mask_token"].flatten()
    wanted = torch.empty(M * B, Kt, D, dtype=torch.float64)
    for m in range(M):
        for b in range(B):
            seen = linear(context[b].double(), w, "predictor_embed") + table[context_index[b]]
            x = torch.cat([seen, mask_token + table[target_index[m, b]]])[None]
            for i in range(2):
                x = block(x, w, f"predictor_blocks.{i}", 3)
            wanted[m * B + b] = linear(norm(x, w, "predictor_norm")[0, Kc:], w, "predictor_proj")
    assert_equal(predictor(context, context_index, target_index), wanted)


def test_images_of_another_size_are_refused(encoder: VisionTransformer) -> None:
    with pytest.raises(ValueError, match=r"images: given \[2, 32, 32, 3\]"):
        encoder(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8))
