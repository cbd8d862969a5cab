"""patchify against `unfold` of float64 images, and against the convolution whose input it computes."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import conv2d, unfold

from jepa_kernels import patchify
from jepa_kernels.patchify import patchify_ref, patchify_triton
from numerics import DEVICES, implementations, needs_gpu, needs_interpreter

OP = torch.ops.jepa_kernels.patchify
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, BIAS = [1 / (255 * s) for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)]
SHAPES = [  # B, H, W, P, K; None: all patches
    (0, 8, 8, 4, 2),
    (2, 8, 8, 4, 0),
    (1, 1, 1, 1, 1),
    (2, 15, 10, 5, None),
    (3, 21, 35, 7, 11),
    (2, 33, 22, 11, 5),
    (2, 51, 34, 17, 3),
    (2, 74, 37, 37, 3),  # a patch takes two programs
    (2, 32, 32, 4, 20),
    (3, 40, 24, 8, None),
    (1, 224, 224, 14, 69),
    (1, 224, 224, 16, None),
]
ops = pytest.mark.parametrize(("op", "device"), implementations(OP, patchify_ref, patchify_triton))


def random_images(B: int, H: int, W: int) -> Tensor:
    return torch.randint(256, (B, 3, H, W), dtype=torch.uint8)


def random_index(B: int, N: int, K: int | None) -> Tensor | None:
    return None if K is None else torch.randint(N, (B, K))


def oracle(images: Tensor, index: Tensor | None, P: int) -> tuple[Tensor, Tensor]:
    """The patches in float64, and |x/std| + |mean/std|, the magnitude of their terms."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    pixels = images.double() / 255
    results = []
    for image in ((pixels - mean) / std, (pixels + mean) / std):
        if image.shape[0] == 0:
            patches = image.new_empty(0, image.shape[2] // P * (image.shape[3] // P), 3 * P * P)
        else:
            patches = unfold(image, kernel_size=P, stride=P).mT
        if index is not None:
            patches = torch.stack([p[i] for p, i in zip(patches, index, strict=True)]) if len(index) else patches[:, :0]
        results.append(patches)
    return results[0], results[1]


@ops
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(op, device, dtype, channels_last, shape):
    B, H, W, P, K = shape
    images, index = random_images(B, H, W), random_index(B, (H // P) * (W // P), K)
    expected, size = oracle(images, index, P)
    if channels_last:
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    y = op(images.to(device), None if index is None else index.to(device), SCALE, BIAS, P, dtype).cpu()
    assert y.dtype == dtype and y.is_contiguous()
    if index is not None and not index.numel():
        assert y.shape == (B, K, 3 * P * P)
        return
    error = y.double() - expected
    assert y.shape == expected.shape
    if dtype == torch.float32:  # scale, bias, product and sum each round by up to half of the last bit
        assert (error.abs() <= 4 * 2**-24 * size).all()
    else:
        rounding = expected.to(dtype).double() - expected
        truncates = op is patchify_triton and device == "cpu" and dtype == torch.bfloat16  # in the interpreter
        if error.numel() < 64:  # too few for an RMS: each within its own last bit, or half of it
            bit = torch.finfo(dtype).eps * expected.abs() * (1 if truncates else 0.5)
            assert (error.abs() <= bit + 4 * 2**-24 * size).all()
        else:
            assert error.norm() <= (2.5 if truncates else 1.25) * rounding.norm()


@ops
def test_any_strides(op, device):
    images, index = random_images(3, 28, 42), random_index(6, 6, 5).T[:, ::2].T.contiguous().T.T
    expected, size = oracle(images, index, 14)
    wide = torch.zeros(3, 6, 56, 126, dtype=torch.uint8)
    wide[:, 1::2, ::2, ::3] = images
    for view in (
        wide[:, 1::2, ::2, ::3],
        images.mT.contiguous().mT,
        images.transpose(0, 2).contiguous().transpose(0, 2),
    ):
        y = op(view.to(device), index.to(device), SCALE, BIAS, 14, torch.float32).cpu()
        assert ((y.double() - expected).abs() <= 4 * 2**-24 * size).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_feeds_the_patch_embedding(channels_last):
    """The rows have the order of a convolution's weight."""
    images, weight = random_images(2, 28, 42), torch.randn(11, 3, 7, 7, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = conv2d((images.double() / 255 - mean) / std, weight, stride=7).flatten(2).mT
    given = images.permute(0, 2, 3, 1).contiguous() if channels_last else images
    y = patchify(given, mean=MEAN, std=STD, patch_size=7).double() @ weight.flatten(1).T
    assert (y - expected).norm() <= 1e-6 * expected.norm()
    index = torch.randint(24, (2, 9))
    kept = patchify(given, index, mean=MEAN, std=STD, patch_size=7).double() @ weight.flatten(1).T
    assert (kept - expected.take_along_dim(index[:, :, None], 1)).norm() <= 1e-6 * kept.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    images, index = random_images(2, 8, 12).to(device), random_index(2, 6, 4).to(device)
    last = images.to(memory_format=torch.channels_last)
    opcheck(OP, (images, index, SCALE, BIAS, 4, torch.bfloat16))
    opcheck(OP, (images, None, SCALE, BIAS, 4, torch.float32))
    opcheck(OP, (last, index.T.contiguous().T, SCALE, BIAS, 4, torch.float16))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device, dynamic):
    def embed(images: Tensor, index: Tensor | None) -> Tensor:
        return 2 * patchify(images, index, mean=MEAN, std=STD, patch_size=4)

    torch.compiler.reset()
    for kind in ("channels first", "channels last", "all patches"):
        compiled = torch.compile(embed, fullgraph=True, dynamic=dynamic)
        for B, H, W, K in ((2, 8, 12, 4), (3, 16, 20, 7)):
            images = random_images(B, H, W).to(device)
            index = random_index(B, H // 4 * (W // 4), K).to(device)
            if kind == "channels last":
                images = images.permute(0, 2, 3, 1).contiguous()
            if kind == "all patches":
                index = None
            assert torch.equal(compiled(images, index), embed(images, index))


@pytest.mark.parametrize("wrong", [-1, 6])
def test_an_index_out_of_range_is_refused(wrong):
    images, index = random_images(2, 8, 12), random_index(2, 6, 4)
    index[1, 2] = wrong
    with pytest.raises(ValueError, match=f"index.* {wrong};"):
        patchify(images, index, mean=MEAN, std=STD, patch_size=4)
    with pytest.raises((RuntimeError, IndexError)):  # nothing is read out of bounds
        OP(images, index, SCALE, BIAS, 4, torch.float32)


@needs_interpreter
def test_the_kernel_asserts_its_index(monkeypatch):
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    images, index = random_images(2, 8, 12), random_index(2, 6, 4)
    patchify_triton(images, index, SCALE, BIAS, 4, torch.float32)
    index[1, 2] = 6
    with pytest.raises(interpreter.InterpreterError, match="patchify"):
        patchify_triton(images, index, SCALE, BIAS, 4, torch.float32)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"images": torch.ones(2, 3, 8, 8)}, "images"),
        ({"images": torch.ones(2, 4, 8, 8, dtype=torch.uint8)}, "images"),
        ({"images": torch.ones(3, 8, 8, dtype=torch.uint8)}, "images"),
        ({"images": [[0]]}, "images"),
        ({"patch_size": 3}, "patch_size"),
        ({"patch_size": 4.0}, "patch_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"std": (0.5, 0.5, float("nan"))}, "std"),
        ({"mean": (float("inf"), 0.5, 0.5)}, "mean"),
        ({"dtype": torch.float64}, "dtype"),
        ({"index": torch.zeros(2, 4, dtype=torch.int32)}, "index"),
        ({"index": torch.zeros(3, 4, dtype=torch.int64)}, "index"),
        ({"index": torch.zeros(2, 4, dtype=torch.int64, device="meta")}, "index"),
    ],
)
def test_bad_arguments_are_named(changed, name):
    good = {"images": torch.ones(2, 3, 8, 8, dtype=torch.uint8), "mean": MEAN, "std": STD, "patch_size": 4}
    with pytest.raises(ValueError, match=f"{name} .*must"):
        patchify(**(good | changed))


def test_addresses_beyond_32_bits(tmp_path):
    """A pixel whose offset does not fit in 32 bits, in a sparse file of which only its patch is read."""
    H, W = 2**15, 2**15 + 2**14
    images = torch.from_file(str(tmp_path / "x"), shared=True, size=3 * H * W, dtype=torch.uint8).view(1, 3, H, W)
    images[0, 2, -16:, -16:] = torch.arange(256).view(16, 16)
    y = OP(images, torch.tensor([[(H // 16) * (W // 16) - 1]]), [1.0] * 3, [0.0] * 3, 16, torch.float32)
    assert torch.equal(y[0, 0, -256:], torch.arange(256.0)) and not y[0, 0, :-256].any()


@needs_gpu
def test_addresses_beyond_32_bits_on_a_gpu():
    """Needs 5 GB."""
    H, W = 2**15, 2**15 + 2**14
    images = torch.zeros(1, 3, H, W, dtype=torch.uint8, device="cuda")
    images[0, 2, -16:, -16:] = torch.arange(256).view(16, 16)
    index = torch.tensor([[(H // 16) * (W // 16) - 1]], device="cuda")
    y = patchify_triton(images, index, [1.0] * 3, [0.0] * 3, 16, torch.float32).cpu()
    assert torch.equal(y[0, 0, -256:], torch.arange(256.0)) and not y[0, 0, :-256].any()
