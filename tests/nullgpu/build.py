"""Builds the null GPU for the interpreter that runs this, and prints the folder where it lies.

The headers are those of the CUDA packages that torch brought. One library, libcuda.so.1, stands for the driver, the
runtime, cuBLAS and NCCL: preloaded, it comes before the real ones. It is kept under NULLGPU_HOME by a checksum of the
sources and of the headers' versions, and built anew when either changes.
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
SOURCES = ("device.c", "memory.c", "driver.c", "runtime.c", "libraries.c", "nvml.c")

# Functions that the headers declare and no source here defines. All are weak: one that is written replaces its own.
# Arguments are not read, so none are declared.
GENERATED = """\
#include <stdio.h>
int nullgpu_gemm(void *handle);
#define NO_OP(name) __attribute__((weak)) int name(void) { return 0; }
#define GEMM(name) __attribute__((weak)) int name(void *handle) { return nullgpu_gemm(handle); }
#define UNWRITTEN(name, error) __attribute__((weak)) int name(void) { \\
    fprintf(stderr, "nullgpu: " #name " is not written: add it to tests/nullgpu\\n"); \\
    return error; \\
}
"""
NOT_SUPPORTED = {"cuda": 801, "cublas": 15, "nccl": 3}  # cudaErrorNotSupported, CUBLAS_STATUS_..., ncclInternalError
TABLES_OF_TEXT = re.compile(r"cudaGetError(Name|String)|cublas(Lt)?GetStatus(Name|String)")  # the real ones serve


def cuda_folder() -> Path:
    """The packages of the interpreter, in which a CUDA build of torch lies."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit(f"nullgpu: {sys.executable} has no torch: pip install torch (a CUDA build)")
    folder = Path(torch.origin).parent
    version = re.findall(r"^(?:__version__|cuda)\b.*?= *'?([^'\n]+)", (folder / "version.py").read_text(), re.MULTILINE)
    if version[1] == "None":
        sys.exit(
            f"nullgpu: torch {version[0]} of {sys.executable} is a CPU build, and the null GPU needs a CUDA build: "
            f"pip install torch==={version[0].split('+')[0]} from PyPI"
        )
    return folder.parent


def include_folders(packages: Path) -> list[Path]:
    """Where the headers lie: of CUDA 13 in one folder, of CUDA 12 in one for each library."""
    wanted = ("cuda.h", "cuda_runtime_api.h", "cublas_v2.h", "nccl.h", "crt/host_defines.h")
    parents = [*sorted(packages.glob("nvidia/*/include")), packages / "triton/backends/nvidia/include"]
    found = []
    for header in wanted:
        folder = next((folder for folder in parents if (folder / header).exists()), None)
        if folder is None:
            sys.exit(f"nullgpu: {header} is in none of {packages}/nvidia/*/include: pip install torch brings it")
        if folder not in found:
            found.append(folder)
    return found


def declared(folders: list[Path], header: str, pattern: str) -> list[str]:
    """The functions of a header. The prefix decides, so older versions that a macro hides are found too."""
    path = next(folder / header for folder in folders if (folder / header).exists())
    code = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(errors="replace"), flags=re.DOTALL)
    names = set(re.findall(rf"\b({pattern}[A-Z]\w*)\s*\(", code))
    names |= set(re.findall(rf"#\s*define\s+{pattern}\w+\s+({pattern}[A-Z]\w*)\s*$", code, re.MULTILINE))
    for suffix in ("PTSZ", "PTDS"):
        names |= {f"{name}_{suffix.lower()}" for name in re.findall(rf"__CUDA_API_{suffix}\(({pattern}\w+)\)", code)}
        names |= set(re.findall(rf"__CUDA_API_{suffix}\(({pattern}\w+)\)", code))
    return sorted(name for name in names if not TABLES_OF_TEXT.fullmatch(name))


def generated(folders: list[Path]) -> str:
    """A stub for every function of the headers: most of the driver and of cuBLAS does nothing, the rest says so."""
    lines = [GENERATED]
    lines += [f"NO_OP({name})" for name in declared(folders, "cuda.h", "cu")]
    lines += [
        f"UNWRITTEN({name}, {NOT_SUPPORTED['cuda']})" for name in declared(folders, "cuda_runtime_api.h", "cuda")
    ]
    for name in sorted({*declared(folders, "cublas_api.h", "cublas"), *declared(folders, "cublasLt.h", "cublas")}):
        if "gemm" in name.lower():
            lines.append(f"GEMM({name})")
        elif "Get" in name or "Create" in name:  # whoever calls these reads what they give
            lines.append(f"UNWRITTEN({name}, {NOT_SUPPORTED['cublas']})")
        else:
            lines.append(f"NO_OP({name})")
    lines += [f"UNWRITTEN({name}, {NOT_SUPPORTED['nccl']})" for name in declared(folders, "nccl.h", "nccl")]
    return "\n".join(lines) + "\n"


def build() -> Path:
    folders = include_folders(cuda_folder())
    sum_of = hashlib.sha256("\n".join(map(str, folders)).encode())
    for name in (*SOURCES, "nullgpu.h", "build.py"):
        sum_of.update((HERE / name).read_bytes())
    home = Path(os.environ.get("NULLGPU_HOME") or Path.home() / ".cache/jepa-nullgpu")
    built = home / sum_of.hexdigest()[:16]
    if built.exists():
        return built
    home.mkdir(parents=True, exist_ok=True)
    # Two processes may build at once: each in a folder of its own, and the first to finish gives it the name.
    with tempfile.TemporaryDirectory(dir=home) as name:
        folder = Path(name) / "built"
        folder.mkdir()
        (folder / "generated.c").write_text(generated(folders))
        flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-Wall", "-Wl,-soname,libcuda.so.1", "-pthread"]
        sources = [str(HERE / name) for name in SOURCES] + [str(folder / "generated.c")]
        includes = [f"-isystem{path}" for path in folders] + [f"-I{HERE}"]
        command = [os.environ.get("CC", "cc"), *flags, *includes, *sources, "-o", str(folder / "libcuda.so.1"), "-ldl"]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit("nullgpu: the stubs do not build; the command was\n" + " ".join(command))
        (folder / "libcuda.so").symlink_to("libcuda.so.1")  # the name by which compilers link
        (folder / "libnvidia-ml.so.1").symlink_to("libcuda.so.1")
        try:
            folder.rename(built)
        except OSError:
            if not built.exists():
                raise
    return built


if __name__ == "__main__":
    print(build())
