"""Builds the null GPU for the Python that runs this, and prints the folder where it lies.

One library, libcuda.so.1, stands for the driver, the runtime, cuBLAS, NCCL and NVML: preloaded, it comes before the
real ones. The headers are those that torch's packages brought. What is built is kept under NULLGPU_HOME by a checksum
of the sources and of the headers, so it is built anew when one of them changes.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / f"{name}.c" for name in ("device", "memory", "driver", "runtime", "streams", "libraries", "nvml")]
HEADERS = ("cuda.h", "cuda_runtime_api.h", "cublas_v2.h", "cublas_api.h", "cublasLt.h", "nccl.h", "crt/host_defines.h")

# Stubs of what the headers declare and no source here defines. They are weak: a written function takes the place of
# its stub. They read no arguments, so none are declared.
STUBS = """\
#include <stdio.h>
int nullgpu_gemm(void *handle);
#define NO_OP(name) __attribute__((weak)) int name(void) { return 0; }
#define GEMM(name) __attribute__((weak)) int name(void *handle) { return nullgpu_gemm(handle); }
#define UNWRITTEN(name, error) __attribute__((weak)) int name(void) { \\
    fprintf(stderr, "nullgpu: " #name " is not written: add it to tests/nullgpu\\n"); \\
    return error; \\
}
"""
CUDA_NOT_SUPPORTED, CUBLAS_NOT_SUPPORTED, NCCL_INTERNAL_ERROR = 801, 15, 3

# Tables of text that need no GPU: the real ones serve.
TEXT = re.compile(r"cudaGetError(Name|String)|cublas(Lt)?GetStatus(Name|String)")


def packages() -> Path:
    """Where this Python's packages lie, among them a CUDA build of torch. Torch itself is not imported."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit(f"nullgpu: {sys.executable} has no torch: pip install torch (a CUDA build)")
    folder = Path(torch.origin).parent
    found = dict(
        re.findall(r"^(__version__|cuda)\b.*= *'?([\w.+]+)", (folder / "version.py").read_text(), re.MULTILINE)
    )
    version = found["__version__"]
    if found["cuda"] == "None":
        sys.exit(
            f"nullgpu: torch {version} of {sys.executable} is a CPU build: "
            f"pip install torch==={version.split('+')[0]} (=== takes the CUDA build, which has no +cpu)"
        )
    return folder.parent


def find_headers(packages: Path) -> dict[str, Path]:
    """Each header's folder: CUDA 13 has one for all its libraries, CUDA 12 one for each. Triton brings what is left."""
    folders = [*sorted(packages.glob("nvidia/*/include")), packages / "triton/backends/nvidia/include"]
    found = {}
    for header in HEADERS:
        holders = [folder for folder in folders if (folder / header).exists()]
        if not holders:
            sys.exit(f"nullgpu: {header} is in none of {packages}/nvidia/*/include: reinstall torch, which brings it")
        found[header] = holders[0]
    return found


def declared(folders: dict[str, Path], header: str, prefix: str) -> list[str]:
    """The functions that a header declares, under every name that its macros give them (cuMemAlloc, cuMemAlloc_v2)."""
    code = (folders[header] / header).read_text(errors="replace")
    code = re.sub(r"/\*.*?\*/|//[^\n]*", "", code, flags=re.DOTALL)
    name = rf"({prefix}[A-Z]\w*)"
    names = set(re.findall(rf"\b{name}\s*\(", code))
    names |= set(re.findall(rf"^\s*#\s*define\s+\w+\s+{name}\s*$", code, re.MULTILINE))
    for stream, found in re.findall(rf"__CUDA_API_PT(SZ|DS)\({name}\)", code):  # of a default stream for each thread
        names |= {found, f"{found}_pt{stream.lower()}"}
    return sorted(found for found in names if not TEXT.fullmatch(found))


def stubs(folders: dict[str, Path]) -> str:
    """C of a stub for every function. Most of the driver and of cuBLAS may do nothing; the rest fails and says so."""
    lines = [f"NO_OP({name})" for name in declared(folders, "cuda.h", "cu")]
    for name in declared(folders, "cuda_runtime_api.h", "cuda"):
        lines.append(f"UNWRITTEN({name}, {CUDA_NOT_SUPPORTED})")
    for name in declared(folders, "cublas_api.h", "cublas") + declared(folders, "cublasLt.h", "cublasLt"):
        if "gemm" in name.lower():
            lines.append(f"GEMM({name})")
        elif "Get" in name or "Create" in name:  # whose caller reads what it is given
            lines.append(f"UNWRITTEN({name}, {CUBLAS_NOT_SUPPORTED})")
        else:
            lines.append(f"NO_OP({name})")
    lines += [f"UNWRITTEN({name}, {NCCL_INTERNAL_ERROR})" for name in declared(folders, "nccl.h", "nccl")]
    return STUBS + "\n".join(lines) + "\n"


def build() -> Path:
    folders = find_headers(packages())
    checksum = hashlib.sha256()
    for path in [Path(__file__), *sorted(HERE.glob("*.[ch]")), *(folders[header] / header for header in HEADERS)]:
        checksum.update(path.read_bytes())
    home = Path(os.environ.get("NULLGPU_HOME") or Path.home() / ".cache/jepa-nullgpu")
    built = home / checksum.hexdigest()[:16]
    if built.exists():
        return built
    home.mkdir(parents=True, exist_ok=True)
    # Two processes may build at once: each in a folder of its own, and the first to be done gives it the name.
    with tempfile.TemporaryDirectory(dir=home) as temporary:
        folder = Path(temporary) / "built"
        folder.mkdir()
        (folder / "stubs.c").write_text(stubs(folders))
        command = [os.environ.get("CC", "cc"), "-std=gnu11", "-O2", "-Wall", "-fPIC", "-shared", "-pthread"]
        command += [f"-isystem{path}" for path in dict.fromkeys(folders.values())]
        command += [f"-I{HERE}", *map(str, SOURCES), str(folder / "stubs.c")]
        command += ["-o", str(folder / "libcuda.so.1"), "-Wl,-soname,libcuda.so.1", "-ldl"]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit("nullgpu: the stubs do not build. The command was\n" + " ".join(command))
        (folder / "libcuda.so").symlink_to("libcuda.so.1")  # the name that compilers link with
        (folder / "libnvidia-ml.so.1").symlink_to("libcuda.so.1")
        try:
            folder.rename(built)
        except OSError:
            if not built.exists():
                raise
    return built


if __name__ == "__main__":
    print(build())
