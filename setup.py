"""Builds `csrc/*.cpp` into `jepa_kernels/_C.abi3.so`, against libtorch's stable ABI.

No nvcc, no pybind, no Python.h: the library only registers operators, so one binary serves every Python and every
torch >= 2.10. The build does not import torch; it uses the headers and libtorch_cpu of the environment that the package
is installed into. `JEPA_KERNELS_NO_EXT=1` builds the package without the library and leaves a marker file: without
either, importing the package fails.
"""

import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

NO_EXT = os.environ.get("JEPA_KERNELS_NO_EXT") == "1"
TORCH_2_10 = "0x020a000000000000"
# Without contraction, results depend neither on the compiler nor on which of a loop's target clones the CPU runs.
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra"]


def torch_folder() -> Path:
    """The folder of the installed torch.

    pip's build isolation hides the environment's packages from `import`, not from the file system.
    """
    spec = find_spec("torch")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    roots += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for root in roots:
        if (root / "include/torch/csrc/stable/library.h").is_file():
            return root
    sys.exit(
        "jepa_kernels: no torch >= 2.10 in this environment; building the CPU kernels needs its headers.\n"
        "  Install torch first. If it is installed, add --no-build-isolation to the pip command.\n"
        "  JEPA_KERNELS_NO_EXT=1 installs without the CPU kernels (plain PyTorch is used instead)."
    )


def mark(root: str) -> None:
    """Marks the package under `root` as built without the library on request, or removes the mark."""
    marker = Path(root) / "jepa_kernels/NO_EXT"
    if NO_EXT:
        marker.write_text("Built with JEPA_KERNELS_NO_EXT=1.\n")
    else:
        marker.unlink(missing_ok=True)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        mark("kernels" if self.editable_mode else self.build_lib)


class BuildExt(build_ext):
    def run(self) -> None:
        super().run()
        if self.inplace:
            mark("kernels")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit: loaded with torch.ops.load_library


def extensions() -> list[Extension]:
    if NO_EXT:
        return []
    torch = torch_folder()
    return [
        Extension(
            "jepa_kernels._C",
            sources=sorted(str(p) for p in Path("csrc").glob("*.cpp")),
            depends=sorted(str(p) for p in Path("csrc").glob("*.h")),
            define_macros=[("TORCH_TARGET_VERSION", TORCH_2_10)],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            extra_compile_args=[f"-isystem{torch / 'include'}", *FLAGS],
            py_limited_api=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
