"""Compiles every Triton kernel for sm_80 and sm_90 at ViT-H/14's sizes, with no GPU: registers, shared memory, spills.

sm_90 also gets other dtypes, unaligned addresses and sizes of 1, for which Triton compiles separate kernels. The
launchers run on tensors without memory, under a Triton driver that knows only the target, so that exactly what would be
launched is compiled, with the same specialisation. This file is also the command that writes the table it compares
with: `python tests/kernels/test_compile_targets.py > tests/kernels/compile_targets.json`.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.slow

TABLE = Path(__file__).with_suffix("").with_name("compile_targets.json")
PACKAGE = Path(__file__).parents[2] / "kernels"


class Sizes(NamedTuple):
    """Named as in README and sources; P: patch size, R: rows of vicreg, W: elements of a weight."""

    B: int
    N: int
    Kc: int
    Kt: int
    M: int
    D: int
    Dp: int
    P: int
    R: int
    W: int


H14 = Sizes(B=128, N=256, Kc=69, Kt=44, M=4, D=1280, Dp=384, P=14, R=16 * 128, W=4 * 1280 * 1280)  # R: of sixteen ranks


def launches() -> dict[str, dict[str, Callable[[], Any]]]:
    """Launcher calls to compile, by targets: one per kernel, dtype or path worth guarding."""
    import torch

    ones, odd = Sizes(*[1] * 10), Sizes(3, 257, 67, 45, 3, 1279, 381, 7, 67, 3001)
    variants = {
        **every_op(" float16 of size 1", ones, torch.float16),
        **every_op(" float32 at odd addresses", odd, torch.float32, 1),
        **every_op(" float64", H14, torch.float64),
    }
    return {"80 90": {**every_op("", H14, torch.bfloat16), **paths()}, "90": variants}


def empty(*shape: int, dtype: Any, offset: int = 0) -> Any:
    """A tensor without memory, `offset` elements after a 16-byte aligned address."""
    import torch

    return torch.empty(math.prod(shape) + offset, dtype=dtype, device="meta")[offset:].view(shape)


def every_op(label: str, sizes: Sizes, dtype: Any, offset: int = 0) -> dict[str, Callable[[], Any]]:
    import torch

    from jepa_kernels.adamw_ema import adamw_ema_coefficients_triton, adamw_ema_triton
    from jepa_kernels.covariance import vicreg_moments_triton
    from jepa_kernels.ema import _CODES, ema_triton
    from jepa_kernels.gather import gather_backward_triton, gather_triton
    from jepa_kernels.patchify import patchify_triton
    from jepa_kernels.prediction_loss import prediction_loss_scale_triton, prediction_loss_triton
    from jepa_kernels.predictor_tokens import predictor_tokens_backward_triton, predictor_tokens_triton

    def x(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return empty(*shape, dtype=dtype, offset=offset)

    def index(*shape: int) -> torch.Tensor:
        return x(*shape, dtype=torch.int64)

    B, N, Kc, Kt, M, D, Dp, P, R, W = sizes
    wide = torch.promote_types(dtype, torch.float32)
    precision = "ieee" if dtype == torch.float64 else "tf32"
    side = P * max(1, math.isqrt(N))
    images, last = x(B, 3, side, side, dtype=torch.uint8), x(B, side, side, 3, dtype=torch.uint8)
    unit = [1.0, 1.0, 1.0]
    weight, half = [x(W, dtype=torch.float32)], [x(W, dtype=dtype)]
    step = torch.ones(1, 6), 0.9, 0.999, 1e-8
    calls = {
        "gather": lambda: gather_triton(x(B, N, D), index(B, Kc)),
        "gather backward": lambda: gather_backward_triton(x(B, Kc, D), index(B, Kc), N),
        "patchify": lambda: patchify_triton(images, index(B, Kc), unit, unit, P, dtype),
        "patchify all": lambda: patchify_triton(last.permute(0, 3, 1, 2), None, unit, unit, P, dtype),
        "predictor_tokens": lambda: predictor_tokens_triton(
            x(B, Kc, Dp), index(B, Kc), index(M, B, Kt), x(N, Dp, dtype=wide), x(Dp, dtype=wide)
        ),
        "predictor_tokens backward": lambda: predictor_tokens_backward_triton(x(M * B, Kc + Kt, Dp), M, B, Kc),
        "prediction_loss": lambda: prediction_loss_triton(x(M * B, Kt, D), x(B, N, D), index(M, B, Kt), True),
        "prediction_loss scale": lambda: prediction_loss_scale_triton(
            x(M * B, Kt, D), torch.empty(M, dtype=wide, device="meta")
        ),
        "sigreg": lambda: projections(x(M, R, D, dtype=wide)),
        "vicreg": lambda: vicreg_moments_triton(x(R, M, D)),
        "vicreg covariance": lambda: products(x(R, M, D), False, precision),
        "vicreg gram": lambda: products(x(R, M, D), True, precision),
        "vicreg in parts": lambda: products(x(R, M, min(D, 128)), False, precision),
    }
    if dtype in _CODES:
        calls |= {
            "ema": lambda: ema_triton(weight, half, torch.tensor(0.004)),
            "adamw_ema": lambda: adamw_ema_triton(weight, half, *[weight] * 3, half, half, *step),
            "adamw_ema coefficients": lambda: adamw_ema_coefficients_triton(
                [x(dtype=torch.float32)] * D, [x(dtype=torch.float64)] * 3 + [x(dtype=wide)] * 2, 0.9, 0.999
            ),
        }
    return {f"{name}{label}": call for name, call in calls.items()}


def products(z: Any, gram: bool, precision: str) -> None:
    import torch

    from jepa_kernels.covariance import vicreg_backward_triton, vicreg_products_triton

    wide = torch.promote_types(z.dtype, torch.float32)
    mean, scale = empty(*z.shape[1:], dtype=wide), empty(1, dtype=wide)
    _, matrix = vicreg_products_triton(z, mean, len(z), gram, True, precision)
    vicreg_backward_triton(z, mean, matrix, mean, scale, scale, gram, 0, -(-len(z) // 16), precision)


def projections(x: Any, knots: int = 17) -> None:
    import torch

    from jepa_kernels.sigreg import _quadrature, sigreg_backward_triton, sigreg_normals_triton, sigreg_table_triton

    step, phi, weight = _quadrature(knots, 3.0)
    table = empty(len(phi), 2, x.shape[0], x.shape[2], dtype=x.dtype)
    sigreg_table_triton(x, step, phi, weight)
    sigreg_backward_triton(x, table, empty(1, dtype=x.dtype), step, weight)
    sigreg_normals_triton(empty(*x.shape[1:], dtype=torch.float32), 1, 2)


def paths() -> dict[str, Callable[[], Any]]:
    """Calls that take less common paths."""
    import torch

    from jepa_kernels.adamw_ema import adamw_ema_triton
    from jepa_kernels.ema import ema_triton

    z = empty(H14.R, H14.M, H14.D, dtype=torch.bfloat16)
    weight = [empty(H14.W, dtype=torch.float32)]
    step = torch.ones(1, 6), 0.9, 0.999, 1e-8
    return {
        "vicreg covariance ieee": lambda: products(z, False, "ieee"),
        "vicreg covariance tf32x3": lambda: products(z, False, "tf32x3"),
        "sigreg at many knots": lambda: projections(empty(H14.M, H14.R, H14.D, dtype=torch.float32), 33),
        "ema float32, momentum on the device": lambda: ema_triton(weight, weight, empty(1, dtype=torch.float32)),
        "adamw_ema float32, no copies": lambda: adamw_ema_triton(*[weight] * 5, [], [], *step),
    }


# --- in a separate process, where Triton compiles


class Driver:
    """A Triton driver for a GPU that is not present."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.capability, self.target = capability, GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(kernel: Any) -> dict[str, Any]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    accesses = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    products = re.search(r"wgmma\.mma_async|mma\.sync", kernel.asm["ptx"])
    return {
        "registers": used["REG"],
        "shared": kernel.metadata.shared,
        "spilled": used["STACK"] + used["LOCAL"],
        "asserts": "__assertfail" in kernel.asm["ptx"],
        "widest": max(int(n or 1) * int(bits) // 8 for n, bits in accesses),
        "products": products[0] if products else "fma" if "tt.dot" in kernel.asm["ttir"] else None,
    }


def compile_all() -> dict[str, Any]:
    """Triton's version, the kernels that no launch reached, and {"launch: kernel on target": resources}."""
    import triton
    from triton.runtime.jit import JITFunction

    def named(kernel: JITFunction) -> str:
        return f"{kernel.__module__}.{kernel.__name__}"

    table: dict[str, Any] = {}
    reached: set[str] = set()

    def compile_instead(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            reached.add(named(kernel))
            compiled = kernel.warmup(*args, grid=grid, **options)
            table[f"{label}: {kernel.__name__} on sm_{target}"] = resources(compiled)

        return launch

    JITFunction.__getitem__ = compile_instead
    for targets, calls in launches().items():
        for target in map(int, targets.split()):
            triton.runtime.driver.set_active(Driver(target))
            for label, call in calls.items():  # noqa: B007 (`launch` above reads the label)
                call()
    modules = [module for name, module in sys.modules.items() if name.startswith("jepa_kernels.")]
    functions = {named(x): x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    bodies = [x.src.split(":\n", 1)[1] for x in functions.values()]
    helpers = {name for name, x in functions.items() if any(f"{x.__name__}(" in body for body in bodies)}
    return {"triton": triton.__version__, "missed": sorted(functions.keys() - helpers - reached), "kernels": table}


# --- in pytest


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def test_every_kernel_is_compiled(compiled, committed):
    assert not compiled["missed"], "add a launch of each to `launches` above"
    assert compiled["kernels"].keys() == committed["kernels"].keys(), "regenerate the table: see the top of this file"


def test_nothing_is_spilled(compiled, committed):
    if compiled["triton"] != committed["triton"]:
        pytest.skip(
            f"triton {compiled['triton']} allocates registers differently from the table's {committed['triton']}"
        )
    assert not [name for name, row in compiled["kernels"].items() if row["spilled"]]


def test_wide_accesses_and_assertions_stay(compiled, committed):
    """Triton silently drops both: 16-byte accesses if it cannot prove alignment, and all assertions in a launch
    without debug=True."""
    for name, row in compiled["kernels"].items():
        assert row["asserts"] == committed["kernels"][name]["asserts"], name
        assert row["widest"] >= committed["kernels"][name]["widest"], name
    asserting = {name.split(": ")[1].split(" ")[0] for name, row in compiled["kernels"].items() if row["asserts"]}
    functions = [part for path in PACKAGE.glob("**/*.py") for part in path.read_text().split("\ndef ")]
    assert asserting == {part.split("(")[0] for part in functions if "tl.device_assert(" in part}


def test_registers_and_shared_memory_stay_within_the_table(compiled, committed):
    if compiled["triton"] != committed["triton"]:
        pytest.skip(f"triton {compiled['triton']} has other numbers than {committed['triton']}, which wrote the table")
    grown = {
        f"{name}: {resource}": (committed["kernels"][name][resource], row[resource])
        for name, row in compiled["kernels"].items()
        for resource in ("registers", "shared")
        if row[resource] > committed["kernels"][name][resource]
    }
    assert not grown, "if these are worth it, regenerate the table: see the top of this file"


def test_products_run_where_they_are_meant_to(compiled, committed):
    """On tensor cores, except for exact float32, which has none."""
    for name, row in compiled["kernels"].items():
        assert row["products"] == committed["kernels"][name]["products"], name
        assert row["products"] != "fma" or "ieee" in name, name


if __name__ == "__main__":
    sys.path.insert(0, str(PACKAGE))
    report = compile_all()
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in report.pop("kernels").items())
    print(json.dumps(report)[:-1] + ', "kernels": {\n' + rows + "\n}}")
