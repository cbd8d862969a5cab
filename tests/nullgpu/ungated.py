"""Runs a program of benchmarks/ past the checks of its results, which no result of the null GPU passes.

    tests/nullgpu/run PYTHON tests/nullgpu/ungated.py kernels.py [arguments]

What it then writes went through the code that makes figures on a GPU, and means nothing.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GATES: dict[str, dict[str, Any]] = {  # by module: what stands in for each check
    "contenders": {"rms": lambda x: 1.0, "must_agree": lambda *_: None},
    "blocks": {"check": lambda *_: None, "check_products": lambda *_: None},
    "throughput": {"apart": lambda *_: 0.0},
}

if __name__ == "__main__":
    import nullgpu  # noqa: F401  fails on any other GPU
    import torch

    torch.backends.cudnn.enabled = False  # it has none, and the published code convolves
    sys.argv[:2] = [f"benchmarks/{sys.argv[1]}"]
    sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "kernels", "engine")]
    program = importlib.import_module(Path(sys.argv[0]).stem)
    for name, gates in GATES.items():
        if name in sys.modules:
            vars(sys.modules[name]).update(gates)
    sys.exit(program.main())
