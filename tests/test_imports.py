"""Which modules may import what. The source is parsed, not imported, so lazy imports count as well."""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(ROOT.glob("kernels/jepa_kernels/*.py"))
ENGINE = sorted(ROOT.glob("engine/**/*.py"))
TREE = sorted(
    path for folder in ("kernels", "engine", "benchmarks", "tests") for path in ROOT.glob(f"{folder}/**/*.py")
)
CSRC = sorted(ROOT.glob("csrc/*"))

MODULE_OF = {"PyYAML": "yaml", "pillow": "PIL", "flash-attn-4": "flash_attn"}
MODULE_OF |= dict.fromkeys(["nvidia-dali-cuda120", "nvidia-dali-cuda130"], "nvidia")


class Import(NamedTuple):
    """`from module import name`, or `import module` with no name; a relative module begins with its dots."""

    module: str
    name: str | None

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]  # "" if relative


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> list[Import]:
    return imports_in(tree(path))


def imports_in(module: ast.Module) -> list[Import]:
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [Import("." * node.level + (node.module or ""), alias.name) for alias in node.names]
    return found


def outside(path: Path) -> set[str]:
    """The packages that a file imports, except the standard library and its own."""
    return {i.top for i in imports(path)} - {""} - sys.stdlib_module_names


def is_op(path: Path) -> bool:
    return any(isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.library.define" for n in ast.walk(tree(path)))


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@named(KERNELS)
def test_the_kernels_import_torch_and_triton_and_no_other_op(path):
    assert outside(path) <= {"torch", "triton"}
    if is_op(path):
        beside = {i.module.removeprefix(".") or i.name for i in imports(path) if not i.top}
        assert beside.isdisjoint(p.stem for p in KERNELS if is_op(p))


@named([path for path in KERNELS if is_op(path)])
def test_every_launch_is_on_its_tensors_device(path):
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    module = tree(path)
    kernels = {f.name for f in module.body if isinstance(f, ast.FunctionDef) and "triton.jit" in ast.unparse(f)}
    guarded = {
        inner
        for node in ast.walk(module)
        if isinstance(node, ast.With) and ast.unparse(node.items[0].context_expr).startswith("torch.cuda.device_of(")
        for inner in ast.walk(node)
    }
    launches = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and ast.unparse(node.func.value) in kernels
    ]
    assert launches and not [ast.unparse(launch) for launch in launches if launch not in guarded]


def test_the_ops_are_found():
    assert {"gather", "covariance"} <= {path.stem for path in KERNELS if is_op(path)}


def test_training_says_how_to_wait_before_torch_is_loaded():
    """jepa/__init__.py sets what libgomp reads when it is loaded."""
    assert imports_of_others(ROOT / "engine/train.py")[0].top == "jepa"
    assert not imports_of_others(ROOT / "engine/jepa/__init__.py")


def imports_of_others(path: Path) -> list[Import]:
    return [i for i in imports(path) if i.top not in sys.stdlib_module_names]


@named(ENGINE)
def test_the_engine_takes_public_names_of_the_kernels(path):
    assignment = next(n for n in tree(ROOT / "kernels/jepa_kernels/__init__.py").body if isinstance(n, ast.Assign))
    assert ast.unparse(assignment.targets[0]) == "__all__"
    public = ast.literal_eval(assignment.value)
    for i in imports(path):
        if i.top == "jepa_kernels":
            assert i.module == "jepa_kernels" and i.name in (None, *public), i


@named(ENGINE)
def test_deepspeed_and_dali_each_have_one_place(path):
    assert "deepspeed" not in outside(path) or path.name in ("zero.py", "zero_step.py")
    assert "nvidia" not in outside(path) or path.name == "decode.py"


@named([path for path in ENGINE if ROOT / "engine/jepa" in path.parents])
def test_the_engines_library_does_not_import_its_programs(path):
    assert outside(path).isdisjoint(program.stem for program in ROOT.glob("engine/*.py"))


@named(TREE)
def test_nothing_needs_the_folders_to_be_packages(path):
    assert outside(path).isdisjoint({"engine", "kernels", "benchmarks", "tests"})


@named(KERNELS + ENGINE)
def test_what_is_imported_is_declared(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    if path in ENGINE:
        wanted += [one for name, extra in project["optional-dependencies"].items() if name != "test" for one in extra]
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in wanted]
    declared = {MODULE_OF.get(name, name.replace("-", "_")) for name in names}
    ours = {"jepa", "jepa_kernels"} if path in ENGINE else set()
    assert outside(path) <= declared | ours


ROOMS = ("data", "config", "ranks", "model", "methods", "state", "train", "pictures", "probes")
CLOSED = {"pictures": {"train"}, "probes": {"train"}}  # rooms before a room that it still may not use
OPENED = {"engine/jepa/probes/finetune.py": {"train"}}  # it trains, by DeepSpeed
LIBRARY = [path for path in ENGINE if ROOT / "engine/jepa" in path.parents]


def strings(module: ast.Module) -> list[str]:
    """All but the docstrings."""
    alone = {node.value for node in ast.walk(module) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(module) if isinstance(node, ast.Constant) and node not in alone]
    return [node.value for node in constants if isinstance(node.value, str)]


def rooms_used(path: Path) -> set[str]:
    """The rooms that a module of the library imports, other than for annotations."""
    module, found = tree(path), set()
    module.body = [
        node for node in module.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    for i in imports_in(module):
        assert not i.module.startswith(".."), "between rooms imports are absolute"
        if i.top == "jepa":
            found.add(i.module.split(".")[1] if "." in i.module else i.name)
    return found


@named([path for path in LIBRARY if path.parent.name != "jepa"])
def test_a_room_uses_only_those_before_it(path):
    """config.schema also finds jepa.methods, at run time and by name: a config has a section that is its method's."""
    room = path.relative_to(ROOT / "engine/jepa").parts[0]
    before = ROOMS[: ROOMS.index(room) + 1]
    closed = CLOSED.get(room, set()) - OPENED.get(str(path.relative_to(ROOT)), set())
    assert rooms_used(path) <= {*before} - closed
    by_name = [text for text in strings(tree(path)) if re.fullmatch(r"jepa\.[a-z_.]+", text)]
    assert by_name == (["jepa.methods"] if path.match("config/schema.py") else [])


def test_every_module_is_in_a_room():
    found = {path.relative_to(ROOT / "engine/jepa").parts[0] for path in LIBRARY}
    assert found == {"__init__.py", *ROOMS}


METHODS = [path.stem for path in (ROOT / "engine/jepa/methods").glob("*.py") if path.stem not in ("__init__", "base")]
OTHER_MEANINGS = {
    "engine/jepa/state/interop.py": {"ijepa"},  # Hugging Face's IJepaModel and its model_type
    "engine/jepa/state/foreign.py": {"ijepa"},
    "engine/jepa/state/encoder.py": {"ijepa"},
    "engine/jepa/train/selftest.py": {"vicreg"},  # the op of jepa_kernels
    "benchmarks/contenders.py": {"vicreg"},  # likewise
    "benchmarks/scaling.py": {"vicreg", "cjepa"},  # the op's module; a run whose every kind of traffic is counted
}


def words_of(path: Path) -> list[str]:
    """The names and strings in a file's code, without docstrings, the published repository's and the configs' names."""
    module = tree(path)
    known = "|".join(["facebookresearch/ijepa", *(config.stem for config in ROOT.glob("engine/configs/*.yaml"))])
    keys = ("id", "attr", "arg", "name", "module", "asname")
    names = [getattr(node, key, None) for node in ast.walk(module) for key in keys]
    return [re.sub(known, "", text) for text in strings(module)] + [name for name in names if isinstance(name, str)]


@named([path for path in (*ENGINE, *ROOT.glob("benchmarks/*.py")) if path.parent.name != "methods"])
def test_nothing_outside_methods_names_a_method(path):
    """Comments and docstrings may: papers have names."""
    allowed = OTHER_MEANINGS.get(str(path.relative_to(ROOT)), set())
    named_here = {method for word in words_of(path) for method in METHODS if method in word.lower()}
    assert named_here == allowed


RUNS_WHAT_IT_READS = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load",
    "marshal.loads", "shelve.open", "joblib.load", "dill.load", "dill.loads", "torch.jit.load", "torch.hub.load",
    "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "yaml.full_load_all", "yaml.unsafe_load_all",
}  # fmt: skip


@named([*KERNELS, *ENGINE, *sorted(ROOT.glob("benchmarks/*.py"))])
def test_no_file_that_is_read_can_run_code(path):
    safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef) and safe_loaders & {ast.unparse(base) for base in node.bases}:
            safe_loaders.add(node.name)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):  # otherwise the calls below could have other names
            assert node.module not in ("pickle", "marshal", "shelve", "joblib", "dill", "yaml")
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert name not in RUNS_WHAT_IT_READS, f"line {node.lineno}"
        assert name != "torch.load" or options.get("weights_only") == "True", f"line {node.lineno}"
        assert name != "yaml.load" or ast.unparse(node.args[1]) in safe_loaders, f"line {node.lineno}"
        assert options.get("allow_pickle", "False") == "False", f"line {node.lineno}"


@named(CSRC)
def test_csrc_includes_the_stable_abi_and_the_standard_library(path):
    for line in path.read_text().splitlines():
        if re.match(r"\s*#\s*include", line):
            header = re.search(r'[<"](.+)[>"]', line)[1]
            standard = "<" in line and re.fullmatch(r"[a-z_]+", header)
            stable = "<" in line and header.startswith(("torch/csrc/stable/", "torch/headeronly/"))
            assert standard or stable or (path.parent / header).is_file(), line
