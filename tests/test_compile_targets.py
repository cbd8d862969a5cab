"""Every Triton kernel compiles for sm_80 and sm_90 at ViT-H/14's sizes, with no GPU: registers, shared memory, spills.

The launchers are called on tensors without memory, under a Triton driver that knows nothing but what to compile for:
what is compiled is what would be launched, specialised as it would be. This file is also the command that writes the
table it compares with: `python tests/test_compile_targets.py > tests/compile_targets.json`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).with_suffix("").with_name("compile_targets.json")
PACKAGE = Path(__file__).parents[1] / "kernels"
B, N, Kc, Kt, M, D, Dp = 128, 256, 69, 44, 4, 1280, 384


def launches() -> dict[str, Callable[[], Any]]:
    """One call of a launcher per kernel, dtype or path that is worth a guard."""
    import torch

    from jepa_kernels.adamw_ema import adamw_ema_triton
    from jepa_kernels.ema import ema_triton
    from jepa_kernels.gather import gather_backward_triton, gather_triton
    from jepa_kernels.patchify import patchify_triton
    from jepa_kernels.prediction_loss import prediction_loss_scale_triton, prediction_loss_triton
    from jepa_kernels.predictor_tokens import predictor_tokens_backward_triton, predictor_tokens_triton
    from jepa_kernels.vicreg import vicreg_backward_triton, vicreg_moments_triton, vicreg_products_triton

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def index(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int64)

    def products(gram: bool, precision: str) -> None:
        z, mean, scale = empty(rows, M, D), empty(M, D, dtype=fp32), empty(dtype=fp32)
        _, matrix = vicreg_products_triton(z, mean, rows, gram, True, precision)
        vicreg_backward_triton(z, mean, matrix, mean, scale, scale, gram, 0, B, precision)

    fp32, bf16, uint8 = torch.float32, torch.bfloat16, torch.uint8
    rows = 16 * B  # of sixteen ranks
    weight = [empty(4 * D, D, dtype=fp32)]
    step = torch.ones(1, 6), 0.9, 0.999, 1e-8
    unit = [1.0, 1.0, 1.0]
    return {
        "gather": lambda: gather_triton(empty(B, N, D), index(B, Kc)),
        "gather backward": lambda: gather_backward_triton(empty(B, Kc, D), index(B, Kc), N),
        "patchify": lambda: patchify_triton(empty(B, 3, 224, 224, dtype=uint8), index(B, Kc), unit, unit, 14, bf16),
        "patchify all": lambda: patchify_triton(
            empty(B, 224, 224, 3, dtype=uint8).permute(0, 3, 1, 2), None, unit, unit, 14, bf16
        ),
        "predictor_tokens": lambda: predictor_tokens_triton(
            empty(B, Kc, Dp), index(B, Kc), index(M, B, Kt), empty(N, Dp, dtype=fp32), empty(Dp, dtype=fp32)
        ),
        "predictor_tokens backward": lambda: predictor_tokens_backward_triton(empty(M * B, Kc + Kt, Dp), M, B, Kc),
        "prediction_loss": lambda: prediction_loss_triton(empty(M * B, Kt, D), empty(B, N, D), index(M, B, Kt), True),
        "prediction_loss float64": lambda: prediction_loss_triton(
            empty(B, Kt, Dp, dtype=torch.float64), empty(B, N, Dp, dtype=torch.float64), index(1, B, Kt), True
        ),
        "prediction_loss scale": lambda: prediction_loss_scale_triton(empty(M * B, Kt, D), empty(M, dtype=fp32)),
        "vicreg": lambda: vicreg_moments_triton(empty(B, M, D)),
        "vicreg covariance ieee": lambda: products(False, "ieee"),
        "vicreg covariance tf32x3": lambda: products(False, "tf32x3"),
        "vicreg covariance tf32": lambda: products(False, "tf32"),
        "vicreg gram tf32": lambda: products(True, "tf32"),
        "ema": lambda: ema_triton(weight, weight, torch.tensor(0.004)),
        "adamw_ema": lambda: adamw_ema_triton(*[weight] * 5, [], [], *step),
        "adamw_ema bf16": lambda: adamw_ema_triton(
            weight, [weight[0].to(bf16)], *[weight] * 3, *[[weight[0].to(bf16)]] * 2, *step
        ),
    }


# --- in a process of its own, where Triton compiles


class Driver:
    """Of a GPU that is not there."""

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
    products = re.search(r"wgmma\.mma_async|mma\.sync", kernel.asm["ptx"])
    return {
        "registers": used["REG"],
        "shared": kernel.metadata.shared,
        "spilled": used["STACK"] + used["LOCAL"],
        "products": products[0] if products else "fma" if "tt.dot" in kernel.asm["ttir"] else None,
    }


def compile_all() -> dict[str, Any]:
    """The compiler's version, the kernels that no launch reached, and {launch, kernel, target: resources}."""
    import triton
    from triton.runtime.jit import JITFunction

    table: dict[str, Any] = {}
    reached: set[str] = set()

    def compile_instead(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            reached.add(kernel.__name__)
            compiled = kernel.warmup(*args, grid=grid, **options)
            table[f"{label}: {kernel.__name__} on sm_{target}"] = resources(compiled)

        return launch

    JITFunction.__getitem__ = compile_instead
    for target in (80, 90):
        triton.runtime.driver.set_active(Driver(target))
        for label, call in launches().items():  # noqa: B007 (`launch` above reads the label)
            call()
    modules = [module for name, module in sys.modules.items() if name.startswith("jepa_kernels.")]
    functions = {x.__name__: x.src for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    bodies = [src.split(":\n", 1)[1] for src in functions.values()]
    helpers = {name for name in functions if any(f"{name}(" in body for body in bodies)}
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
    assert compiled["kernels"].keys() == committed["kernels"].keys(), "write the table again: see the top of this file"


def test_nothing_is_spilled(compiled):
    assert not [name for name, row in compiled["kernels"].items() if row["spilled"]]


def test_registers_and_shared_memory_stay_within_the_table(compiled, committed):
    if compiled["triton"] == committed["triton"]:  # another compiler has other numbers
        grown = {
            f"{name}: {resource}": (committed["kernels"][name][resource], row[resource])
            for name, row in compiled["kernels"].items()
            for resource in ("registers", "shared")
            if row[resource] > committed["kernels"][name][resource]
        }
        assert not grown, "if these are worth it, write the table again: see the top of this file"


def test_products_run_where_they_are_meant_to(compiled, committed):
    """On matrix units, but for those of exact float32, which have none."""
    for name, row in compiled["kernels"].items():
        assert row["products"] == committed["kernels"][name]["products"], name
        assert row["products"] != "fma" or "ieee" in name, name


if __name__ == "__main__":
    sys.path.insert(0, str(PACKAGE))
    report = compile_all()
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in report.pop("kernels").items())
    print(json.dumps(report)[:-1] + ', "kernels": {\n' + rows + "\n}}")
