"""The package as users get it: built from the sdist, installed into an empty folder, imported in isolation."""

import ast
import email
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

# Runs every op once, forward and backward, with inputs from one seed, and saves the results.
USE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import jepa_kernels as jk
from torch.utils._python_dispatch import TorchDispatchMode

class Calls(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        called.add(op.name())
        return op(*args, **(kwargs or {}))

called = set()
Calls().__enter__()
torch.manual_seed(int(sys.argv[3]))
B, N, M, D, P = 3, 16, 4, 24, 8
context, target = torch.rand(B, N).argsort(1)[:, :7], torch.rand(M, B, N).argsort(2)[:, :, :5]
rows = jk.patchify(torch.randint(256, (B, 3, 32, 32), dtype=torch.uint8), context,
                   mean=(.4, .5, .6), std=(.2, .3, .4), patch_size=P)
embed = torch.nn.Linear(3 * P * P, D)
teacher = torch.nn.Linear(3 * P * P, D)
mask_token = torch.randn(D, requires_grad=True)
optimizer = jk.AdamWEMA([*embed.parameters(), mask_token])
x = jk.gather_tokens(embed(rows), torch.randint(7, (B, 7)))
tokens = jk.predictor_tokens(x, context, target, torch.randn(N, D), mask_token)
of_context = torch.rand(M, B, N).argsort(2)[:, :, :7]  # the first rows come from the images, the rest do not
loss = jk.prediction_loss(tokens, torch.randn(B, N, D), torch.cat([of_context, target], 2))
terms = jk.vicreg(tokens.mean(1).view(M, B, D).transpose(0, 1))
statistic = jk.sigreg(tokens.view(M, -1, D), jk.sigreg_slices(D, 70, seed=1, step=2))
(loss + sum(terms) + statistic).backward()
gradients = [p.grad.clone() for p in (*embed.parameters(), mask_token)]
assert all(gradient.abs().min() > 0 for gradient in gradients)
for p in (*embed.parameters(), mask_token):  # AdamW's first step is the sign, which is arbitrary for a rounding error
    p.grad = p.grad.where(p.grad.abs() > 1e-3 * p.grad.square().mean().sqrt(), 0)
optimizer.step()
jk.ema_(teacher.parameters(), embed.parameters(), .9)
averages = [state["ema"] for state in optimizer.state.values()]
weights = teacher.state_dict().values()
torch.save([rows, tokens.detach(), loss.detach(), *terms, statistic.detach(), *gradients, *averages, *weights],
           sys.argv[2])
missed = [op for op in jk.OPS if f"jepa_kernels::{op}" not in called]
assert not missed, f"USE in tests/kernels/test_package.py must call {missed} too"
"""

# What an import adds to a process that has torch and triton; the package's ops; and which ops of the command line then
# have CPU kernels.
LOOK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, triton.language
before = {name.partition(".")[0] for name in sys.modules}
import jepa_kernels
assert jepa_kernels.__file__.startswith(sys.argv[1]), jepa_kernels.__file__
print(*{name.partition(".")[0] for name in sys.modules} - before - sys.stdlib_module_names)
print(*jepa_kernels.OPS)
print(*[op for op in sys.argv[2:] if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")])
"""


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def pip(*words: object, **variables: str) -> None:
    variables |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
    run(sys.executable, "-m", "pip", *words, env=os.environ | variables)


def alone(code: str, *words: object) -> str:
    """Runs code that sees the installed torch, but neither the checkout nor PYTHONPATH."""
    return run(sys.executable, "-I", "-c", code, *words).stdout


def registered_in_csrc() -> set[str]:
    """`namespace::op` of every CPU kernel that csrc registers."""
    ops = set()
    for source in ROOT.glob("csrc/*.cpp"):
        for namespace, body in re.findall(r"LIBRARY_IMPL\((\w+), CPU, m\) {(.*?)^}", source.read_text(), re.M | re.S):
            ops |= {f"{namespace}::{op}" for op in re.findall(r'm\.impl\("(\w+)"', body)}
    return ops


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built in a copy without git-ignored files: leftovers of other builds would hide what is missing."""
    folder = tmp_path_factory.mktemp("sdist")
    lines = (ROOT / ".gitignore").read_text().split()
    at_root = [line.strip("/") for line in lines if line.startswith("/")]
    anywhere = shutil.ignore_patterns(".git", "shared", *(line.rstrip("/") for line in lines if line[0] != "/"))

    def ignored(where, names):
        return anywhere(where, names) | (set(at_root) & set(names) if Path(where) == ROOT else set())

    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def pure_wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pure")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist, JEPA_KERNELS_NO_EXT="1")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


@pytest.fixture(scope="module")
def pure_installed(pure_wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pure-installed")
    pip("install", "--no-deps", "--target", folder, pure_wheel)
    return folder


def test_sdist_holds_the_repository(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["LICENSE", "README.md", "kernels/README.md", "Makefile", "constraints.txt", "pyproject.toml", "setup.py"]
    for pattern in ("csrc/*", "kernels/**/*.py", "engine/**/*.py", "engine/configs/*", "tests/*.*", "benchmarks/*.py"):
        wanted += [str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)]
    assert set(wanted) <= held
    assert not fnmatch.filter(held, "*.so") and not fnmatch.filter(held, "*.pyc")


def test_wheel_serves_every_python_and_holds_only_the_package(wheel):
    assert re.fullmatch(r"jepa_kernels-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = fnmatch.filter(archive.namelist(), "*.dist-info/METADATA")
        fields = email.message_from_bytes(archive.read(metadata))
        assert fnmatch.filter(archive.namelist(), "*.dist-info/licenses/LICENSE")
    sources = {f"jepa_kernels/{path.name}" for path in ROOT.glob("kernels/jepa_kernels/*.py")}
    assert held == sources | {"jepa_kernels/py.typed", "jepa_kernels/_C.abi3.so"}
    needed = {re.match(r"[\w-]+", line)[0] for line in fields.get_all("Requires-Dist") if "extra" not in line}
    assert needed == {"torch", "triton"}
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields.get_payload().strip() == (ROOT / "kernels/README.md").read_text().strip()


def test_the_packages_readme_example_runs(installed):
    text = (ROOT / "kernels/README.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    alone(f"import sys; sys.path.insert(0, sys.argv[1])\n{example}", installed)
    package = ast.parse((ROOT / "kernels/jepa_kernels/__init__.py").read_text())
    (public,) = [ast.literal_eval(n.value) for n in package.body if ast.unparse(n).startswith("__all__")]
    assert set(re.findall(r"^\| `(\w+)`", text, re.M)) == set(public)


def test_import_brings_the_cpu_kernels_and_no_other_package(installed):
    ops = registered_in_csrc()
    brought, defined, registered = alone(LOOK, installed, *ops).splitlines()
    assert brought.split() == ["jepa_kernels"]
    assert set(registered.split()) == ops
    assert {f"jepa_kernels::{op}" for op in defined.split()} == {op for op in ops if op.startswith("jepa_kernels::")}


def test_without_the_extension_the_references_compute_the_same(installed, pure_wheel, pure_installed, tmp_path):
    import torch

    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [*pure_installed.rglob("*.so")] and [*pure_installed.rglob("NO_EXT")]
    seed = torch.randint(2**31, ()).item()
    for name, folder in (("kernels", installed), ("references", pure_installed)):
        alone(USE, folder, tmp_path / name, seed)
    kernels, references = (torch.load(tmp_path / name) for name in ("kernels", "references"))
    for kernel, reference in zip(kernels, references, strict=True):
        torch.testing.assert_close(kernel, reference, msg=lambda text: f"seed {seed}: {text}")


@pytest.mark.parametrize("damage", ["text", "another machine"])
def test_a_broken_extension_is_not_taken_for_a_missing_one(installed, tmp_path, damage):
    shutil.copytree(installed, tmp_path, dirs_exist_ok=True)
    library = tmp_path / "jepa_kernels/_C.abi3.so"
    whole = library.read_bytes()
    sparc = whole[:18] + b"\2\0" + whole[20:]  # e_machine in the ELF header
    library.write_bytes({"text": b"not a library", "another machine": sparc}[damage])
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import jepa_kernels"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and str(library) in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("damage", "says"), [("missing", "is missing"), ("stale", "lacks patchify")])
def test_a_missing_or_stale_extension_is_not_silently_replaced(installed, tmp_path, damage, says):
    shutil.copytree(installed, tmp_path, dirs_exist_ok=True)
    library = tmp_path / "jepa_kernels/_C.abi3.so"
    if damage == "missing":
        library.unlink()
    else:  # so that it registers another name
        library.write_bytes(library.read_bytes().replace(b"\0patchify\0", b"\0patchifi\0"))
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import jepa_kernels"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith("ImportError") and says in said and "build_ext --inplace" in said


def test_a_source_tree_runs_in_place(sdist, installed, tmp_path):
    """With the library built in place, and without it if the build leaves it out; the latest build decides."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.glob("jepa_kernels-*")
    (tmp_path / "built").mkdir()
    shutil.copytree(installed / "jepa_kernels", tmp_path / "built/jepa_kernels")  # newer than its sources: not rebuilt
    for no_ext, ops in (("1", []), ("0", ["jepa_kernels::gather"])):
        build = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-lib", tmp_path / "built"]
        run(*build, cwd=tree, env=os.environ | {"JEPA_KERNELS_NO_EXT": no_ext})
        assert alone(LOOK, tree / "kernels", "jepa_kernels::gather").splitlines()[2].split() == ops


def test_building_without_torch_says_what_to_do(tmp_path):
    """In a separate environment that has only setuptools."""
    import setuptools

    venv.create(tmp_path / "bare", with_pip=False)
    (tmp_path / "only").mkdir()
    for package in ("setuptools", "_distutils_hack"):
        (tmp_path / "only" / package).symlink_to(Path(setuptools.__file__).parents[1] / package)
    command = [tmp_path / "bare/bin/python", ROOT / "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    variables = {k: v for k, v in os.environ.items() if k != "JEPA_KERNELS_NO_EXT"}
    variables |= {"PYTHONPATH": str(tmp_path / "only"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for remedy in ("Install torch first", "--no-build-isolation", "JEPA_KERNELS_NO_EXT=1"):
        assert remedy in done.stderr
    assert not (tmp_path / "lib").exists()
