"""Which packages are here, whether they work, and whether they fit one another: each with the cure if not.

`PAIRS` is the table of what is known not to go together. Nothing is imported at the top: a package that cannot be
imported is something to report.
"""

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jepa.ranks.machine import Finding, compiler, contained, shared_memory

DALI = {"12": "nvidia-dali-cuda120", "13": "nvidia-dali-cuda130"}
DRIVER = {"12": 525, "13": 580}  # the oldest that runs builds for this CUDA
IN_USE = ("torch", "triton", "deepspeed", "numpy", "pillow", "pydantic", "PyYAML", "safetensors", "matplotlib", "tqdm")
# What is installed, what is imported, what uses it.
OPTIONAL = (
    ("torchvision", "torchvision", "fine-tuning, segmentation, detection"),
    ("timm", "timm", "fine-tuning"),
    ("torchmetrics", "torchmetrics", "detection, segmentation"),
    ("pycocotools", "pycocotools.coco", "detection"),
    ("tensorboard", "tensorboard", "logging.tensorboard"),
    ("wandb", "wandb", "logging.wandb"),
    ("xformers", "xformers.ops", "engine.attention=xformers"),
    ("flash-attn-4", "flash_attn.cute", "engine.attention=flash_attn"),
    ("flash-attn", "flash_attn", "engine.attention=flash_attn"),
    ("apex", "apex.optimizers", "engine.optimizer=apex"),
)
REINSTALL = "reinstall it: pip install --force-reinstall --no-deps -c constraints.txt"


@dataclass
class Facts:
    """What is installed here. Versions are None where there is none."""

    versions: dict[str, str | None] = field(default_factory=dict)
    cuda: str | None = None  # that torch was built for
    driver: str | None = None
    has_nvidia: bool = False
    dali: list[str] = field(default_factory=list)  # the names of DALI's packages
    read: tuple[str, ...] = ()  # the versions of DeepSpeed that the step was written against

    @property
    def built(self) -> str:
        """CUDA's major version, "" for a CPU build."""
        return (self.cuda or "").partition(".")[0]

    def version(self, package: str) -> str:
        return self.versions.get(package) or ""

    def older(self, package: str, than: tuple[int, ...]) -> bool:
        here = self.versions.get(package)
        return here is not None and tuple(map(int, re.findall(r"\d+", here)[: len(than)])) < than


class Pair(NamedTuple):
    """Two things that do not go together, if `here`."""

    name: str
    here: Callable[[Facts], bool]
    says: Callable[[Facts], str]
    cure: Callable[[Facts], str]
    level: Literal["note", "wrong"] = "wrong"


PAIRS = (
    Pair(
        "torch",
        lambda f: f.older("torch", (2, 10)),
        lambda f: f"{f.version('torch')}: the kernels need 2.10 or newer",
        lambda f: "pip install -c constraints.txt torch",
    ),
    Pair(
        "torch and GPU",
        lambda f: f.has_nvidia and bool(f.version("torch")) and not f.cuda,
        lambda f: f"this machine has an NVIDIA GPU, which torch {f.version('torch')}, built without CUDA, cannot use",
        lambda f: "install a build of torch for CUDA that the driver runs; or train with engine.device=cpu",
    ),
    Pair(
        "torch and driver",
        lambda f: f.driver is not None and f.built in DRIVER and int(f.driver.split(".")[0]) < DRIVER[f.built],
        lambda f: (
            f"torch {f.version('torch')}, built for CUDA {f.cuda}, needs driver {DRIVER[f.built]} or newer; "
            f"{f.driver} is loaded"
        ),
        lambda f: "a newer driver, or torch built for CUDA 12 (525 or newer): pip install torch==2.10.0",
    ),
    Pair(
        "triton",
        lambda f: f.older("triton", (3, 5)),
        lambda f: f"{f.version('triton')}: the kernels need 3.5 or newer",
        lambda f: "pip install -c constraints.txt triton",
    ),
    Pair(
        "DeepSpeed",
        lambda f: bool(f.version("deepspeed")) and f.version("deepspeed").partition("+")[0] not in f.read,
        lambda f: f"{f.version('deepspeed')}: the end of a step was written against {' or '.join(f.read)}",
        lambda f: f"pip install deepspeed=={f.read[-1]}",
    ),
    Pair(
        "DALI and torch",
        lambda f: bool(f.built in DALI and f.dali) and DALI[f.built] not in f.dali,
        lambda f: f"{f.dali[0]} beside torch {f.version('torch')}, which is built for CUDA {f.cuda}",
        lambda f: f"pip uninstall {' '.join(f.dali)}; pip install {DALI[f.built]}",
    ),
    Pair(
        "DALI twice",
        lambda f: len(f.dali) > 1,
        lambda f: f"{' and '.join(f.dali)} overwrite each other's files",
        lambda f: f"pip uninstall {' '.join(f.dali)}; pip install {DALI.get(f.built, DALI['13'])}",
    ),
    Pair(
        "xformers",
        lambda f: f.older("xformers", (0, 0, 35)),
        lambda f: f"{f.version('xformers')}: engine.attention=xformers is written to 0.0.35",
        lambda f: "pip install 'xformers>=0.0.35', or leave engine.attention=sdpa",
        "note",
    ),
)


def facts() -> Facts:
    """Of this environment. Raises whatever importing torch raises."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
    import torch

    from jepa.ranks.device import driver_version, has_nvidia

    try:
        from . import zero_step

        read = zero_step.READ
    except Exception:  # what it imports is broken, and reported by itself
        read = (installed.get("deepspeed", ""),)
    return Facts(
        versions={**installed, "torch": torch.__version__},
        cuda=torch.version.cuda,
        driver=driver_version(),
        has_nvidia=has_nvidia(),
        dali=sorted(name for name in installed if name.startswith("nvidia-dali-cuda")),
        read=read,
    )


def known_pairs(facts: Facts) -> Iterator[Finding]:
    for pair in PAIRS:
        if pair.here(facts):
            yield Finding(pair.level, pair.name, pair.says(facts), pair.cure(facts))


def requirements() -> Iterator[Finding]:
    """What the packages here ask of one another's versions, where it is not so."""
    Requirement = importlib.import_module("packaging.requirements").Requirement  # DeepSpeed and pytest bring it
    interesting = {"torch", "triton", "numpy", "pillow", "pydantic"}
    for name in (*IN_USE, *(package for package, _, _ in OPTIONAL), *DALI.values()):
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, wanted):
            if requirement.name.lower() not in interesting or (
                requirement.marker and not requirement.marker.evaluate({"extra": ""})
            ):
                continue
            try:
                here = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                continue  # torch builds for CPUs ask for triton without needing it
            if not requirement.specifier.contains(here, prereleases=True):
                said = (
                    f"{name} {metadata.version(name)} wants {requirement.name}{requirement.specifier}; here is {here}"
                )
                cure = (
                    f"install a {name} that fits {requirement.name} {here.partition('+')[0]}, or pip uninstall {name}"
                )
                yield Finding("wrong", f"{name} and {requirement.name}", said, cure)


def torch_here(device: str) -> Iterator[Finding]:
    """torch and the device that it gives a run."""
    import torch

    from jepa.ranks.device import choose

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("ok", "torch", f"{torch.__version__}, {built}")
    try:
        chosen = choose(device, local=0)
    except ValueError as error:
        said, _, cure = str(error).partition("\n")
        yield Finding("wrong", "device", said, cure)
        yield from contained("compiler", lambda: compiler(needed=False))
        yield from shared_memory()
        return
    if chosen.type == "cpu":
        yield Finding(
            "ok", "device", f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        )
    else:
        yield from _gpus(torch)
    gpus = torch.cuda.device_count() if chosen.type == "cuda" else 0
    yield from contained("compiler", lambda: compiler(needed=gpus > 0))
    yield from contained("shared memory", lambda: shared_memory(gpus))


def _gpus(torch: Any) -> Iterator[Finding]:
    from jepa.ranks.device import driver_version

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds = sorted({f"{g.name}, sm_{g.major}{g.minor}, {g.total_memory / 2**30:.0f} GiB" for g in gpus})
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    said = f"{len(gpus)} x {' and '.join(kinds)}; driver {driver_version() or 'unknown'}, NCCL {nccl}"
    said += f", cuDNN {torch.backends.cudnn.version()}"
    oldest = min((g.major, g.minor) for g in gpus)
    if oldest < (8, 0):
        cure = "use Ampere or newer, or engine.precision=fp32"
        yield Finding("note", "device", f"{said}; below sm_80 bf16 is emulated and FlashAttention is not used", cure)
    elif len(kinds) > 1:
        yield Finding("note", "device", f"{said}; ranks wait for the slowest", "CUDA_VISIBLE_DEVICES chooses")
    else:
        yield Finding("ok", "device", said)


def ours() -> Iterator[Finding]:
    """The kernels' package and its compiled part."""
    try:
        import jepa_kernels
    except ImportError as error:
        said, _, cure = " ".join(str(error).split()).partition(". ")
        yield Finding("wrong", "kernels", said, cure or "pip install --no-build-isolation -e .")
        return
    folder = Path(jepa_kernels.__file__).parent
    library, sources = folder / "_C.abi3.so", sorted((folder.parents[1] / "csrc").glob("*"))
    rebuild = "python setup.py build_ext --inplace"
    if (folder / "NO_EXT").exists():
        yield Finding("note", "kernels", f"{folder}, built without C++: plain PyTorch serves on the CPU", rebuild)
    elif any(source.stat().st_mtime > library.stat().st_mtime for source in sources):
        newest = max(sources, key=lambda source: source.stat().st_mtime)
        yield Finding("note", "kernels", f"{library} is older than its source, {newest.name}", rebuild)
    else:
        yield Finding("ok", "kernels", f"{jepa_kernels.__version__}, {library}")


def imported(package: str, module: str | None = None, cure: str = "") -> Iterator[Finding]:
    """A package that the engine cannot do without."""
    try:
        version = metadata.version(package)
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(module or package)
        yield Finding("ok", package, version)
    except metadata.PackageNotFoundError:
        yield Finding("wrong", package, "not installed", cure or f"pip install -c constraints.txt {package}")
    except Exception as error:
        yield Finding(
            "wrong", package, f"{version} cannot be imported: {_short(error)}", cure or f"{REINSTALL} {package}"
        )


def dali(facts: Facts) -> Iterator[Finding]:
    extra = "engine-cu12" if facts.built == "12" else "engine-cu13"
    cure = f'pip install --no-build-isolation -e ".[{extra}]"; to time a run without images, data.synthetic=10000'
    if not facts.dali:
        yield Finding("wrong", "DALI", "not installed: nothing decodes images", cure)
        return
    name = facts.dali[-1]
    from jepa.data.decode import dali as load

    try:
        load()
        yield Finding("ok", "DALI", f"{facts.version(name)} ({name})")
    except Exception as error:
        yield Finding(
            "wrong", "DALI", f"{name} {facts.version(name)} cannot be imported: {_short(error)}", f"{REINSTALL} {name}"
        )


def optional() -> Iterator[Finding]:
    """Those that are here and work, those that are here and do not, and those that are not."""
    here, missing = [], []
    broken: dict[str, list[tuple[str, str]]] = {}  # by reason: one that does not work takes others with it
    for package, module, use in OPTIONAL:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                importlib.import_module(module)
            here.append(f"{package} {version}")
        except Exception as error:
            broken.setdefault(_short(error), []).append((f"{package} {version}", use))
    for reason, packages in broken.items():
        names, (first, _, _) = ", ".join(name for name, _ in packages), packages[0][0].partition(" ")
        uses = dict.fromkeys(word for _, use in packages for word in use.split(", "))
        said = f"{names} cannot be imported ({reason}); for {', '.join(uses)}"
        built = f"for torch {metadata.version('torch')}, from the index that torch came from"
        yield Finding("wrong", first, said, f"install the {first} that is built {built}; or pip uninstall {first}")
    if here:
        yield Finding("ok", "optional", ", ".join(here))
    if missing:
        yield Finding("ok", "not here", f"{', '.join(missing)} (optional)")


def _short(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else f"{text[:160]}..."


def examine(device: str) -> Iterator[Finding]:
    """All of it, in the order of the report."""
    yield from contained("torch", lambda: torch_here(device))
    yield from contained("triton", lambda: imported("triton"))
    yield from contained("kernels", ours)
    yield from contained("DeepSpeed", lambda: imported("deepspeed"))
    try:
        found = facts()
    except Exception:  # torch cannot be imported, which is above
        return
    yield from contained("DALI", lambda: dali(found))
    yield from contained("known pairs", lambda: known_pairs(found))
    yield from contained("requirements", requirements)
    yield from contained("optional", optional)
