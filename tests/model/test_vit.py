"""The encoder and the predictor against an independent float64 implementation (tests/support/plain.py)."""

import math
import re

import pytest
import torch
from torch import Tensor

from jepa.model.predictor import Predictor
from jepa.model.vit import VisionTransformer
from plain import MEAN, STD, attention, block, embedded, encoded, norm, predicted


def random_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Randomises all weights (no zero biases, no unit norm scales); returns the state dict in float64."""
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return {name: value.double() for name, value in module.state_dict().items()}


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    """Up to the rounding error of a few fp32 layers."""
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < 2e-6, f"relative error {error:.1e}"


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
    assert_equal(encoder(images, index), encoded(x, w, 3, 2))


def test_encoder_makes_the_rows_that_are_asked_for(encoder: VisionTransformer) -> None:
    w = random_weights(encoder)
    images = torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8)
    groups = [torch.stack([torch.randperm(36)[:n] for _ in range(3)]) for n in (11, 4)]
    wanted, index = encoded(embedded(images, w, 4), w, 3, 2), torch.cat(groups, 1)
    assert_equal(encoder(images, rows=groups), wanted[torch.arange(3)[:, None], index])


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("skip", [False, True])
def test_predictor_is_the_paper_s(depth: int, skip: bool) -> None:
    B, M, Kc, Kt, D, width = 3, 4, 9, 5, 16, 12
    predictor = Predictor(6, D, width, depth=depth, num_heads=3)
    predictor.skip_unread = skip
    w = random_weights(predictor)
    context = torch.randn(B, Kc, D)
    context_index = torch.stack([torch.randperm(36)[:Kc] for _ in range(B)])
    target_index = torch.stack([torch.stack([torch.randperm(36)[:Kt] for _ in range(B)]) for _ in range(M)])
    wanted = [
        predicted(context[b].double(), context_index[b], target_index[m, b], w, 6, depth, 3)
        for m in range(M)
        for b in range(B)
    ]
    assert_equal(predictor(context, context_index, target_index), torch.stack(wanted))


@pytest.mark.parametrize(
    "shape", [(32, 32, 3), (32, 24, 3), (24, 32, 3), (3, 32, 24), (3, 24, 32), (24, 24, 4), (24, 24)]
)
def test_images_of_another_shape_are_refused(encoder: VisionTransformer, shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    for index in (None, torch.zeros(2, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match=re.escape(f"images: given {[2, *shape]}")):
            encoder(images, index)


@pytest.mark.parametrize("size", [(48, 16), (16, 64), (32, 32)])
def test_images_of_an_allowed_size_show_the_area_of_the_crop(encoder: VisionTransformer, size: tuple[int, int]) -> None:
    """A patch's position is where its centre lies on the grid of the crop that the whole image is taken for."""
    square = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    before, (H, W) = encoder(square), size
    images = torch.randint(0, 256, (2, H, W, 3), dtype=torch.uint8)
    with pytest.raises(ValueError, match="wanted"):
        encoder(images)
    encoder.allow(size)
    encoder.allow(24)
    found = (encoder.embed(images) - encoder.patch_embed(images, None))[0].unflatten(0, (H // 4, W // 4))
    quarter = encoder.embed_dim // 4
    for row in range(H // 4):
        for column in range(W // 4):
            y, x = ((2 * i + 1) / (2 * n) * 6 - 0.5 for i, n in ((row, H // 4), (column, W // 4)))
            angles = [at * 10000 ** (-i / quarter) for at in (x, y) for i in range(quarter)]
            halves = angles[:quarter], angles[quarter:]
            wanted = [wave(angle) for half in halves for wave in (math.sin, math.cos) for angle in half]
            torch.testing.assert_close(found[row, column], torch.tensor(wanted), atol=1e-5, rtol=0)
    assert torch.equal(encoder(square), before) and encoder(images).shape == (2, H * W // 16, 16)
