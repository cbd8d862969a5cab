"""One op, one name: the op x has csrc/x.cpp, tests/kernels/test_x.py and a benchmark x. Each op says what it lacks."""

import sys
from pathlib import Path

import pytest
import torch

import jepa_kernels

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from contenders import OPS as BENCHMARKS  # noqa: E402  the benchmarks are not a package

every_op = pytest.mark.parametrize("op", jepa_kernels.OPS)


@every_op
def test_is_benchmarked_and_tested_under_the_name_of_its_source(op):
    sources = [path.stem for path in ROOT.glob("csrc/*.cpp") if f'm.impl("{op}"' in path.read_text()]
    assert len(sources) == 1, f"register the CPU kernel of {op} in one source of csrc; found in {sources}"
    (name,) = sources
    assert f"{op}_".startswith(f"{name}_"), f"{op} is registered in csrc/{name}.cpp: its name must start with {name}"
    test = ROOT / f"tests/kernels/test_{name}.py"
    assert test.is_file(), (
        f"{op} lacks a test: add {test.relative_to(ROOT)}, in which `implementations` compares its kernels"
    )
    assert name in BENCHMARKS, f"{op} lacks a benchmark: add `@benchmark def {name}` to benchmarks/contenders.py"


@every_op
def test_is_registered_for_every_device(op):
    for key, what in (
        ("CompositeExplicitAutograd", "its reference as default"),
        ("CUDA", "its Triton launcher as cuda"),
    ):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"jepa_kernels::{op}", key)
        assert registered, f'torch.library.impl("jepa_kernels::{op}", ...): register {what}'


def test_every_benchmark_is_of_an_op():
    names = {path.stem for path in ROOT.glob("csrc/*.cpp")}
    assert {name.removesuffix("_bf16") for name in BENCHMARKS} <= names
