"""The doctor names what is wrong and nothing else; its scan counts what is there, goes on, and writes a list."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import doctor
import jepa_kernels
from jepa.data import scan
from jepa.data.loader import Loader
from jepa.data.sources import ImageSource, open_images
from jepa.ranks import machine
from jepa.ranks.machine import Finding, contained
from jepa.train import packages, selftest
from jepa.train.packages import Facts

ROOT = Path(__file__).resolve().parents[1]
GOOD = Facts(
    versions={"torch": "2.13.0+cu130", "triton": "3.7.1", "deepspeed": "0.19.8", "xformers": "0.0.35"},
    cuda="13.0",
    driver="580.65.06",
    has_nvidia=True,
    dali=["nvidia-dali-cuda130"],
    read=("0.19.8",),
)


def program(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), **environment}
    command = [sys.executable, str(ROOT / "engine/doctor.py"), *map(str, words)]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=900)


def levels(findings) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


# --- the whole


@pytest.mark.slow
def test_it_examines_this_machine():
    run = program("--json", "--device", "cpu", RANK="1", WORLD_SIZE="2", MASTER_ADDR="10.255.255.1")
    said = json.loads(run.stdout)
    found = {row["name"]: row for row in said["findings"]}
    assert "Traceback" not in run.stderr
    for name in ("torch", "device", "kernels", "ops", "self-test", "attention", "optimizer", "training"):
        assert found[name]["level"] in ("ok", "note"), found[name]
    assert torch.__version__ in found["torch"]["says"]
    assert f"{len(jepa_kernels.OPS)} ops agree" in found["self-test"]["says"]
    assert all(op in found["ops"]["says"] for op in jepa_kernels.OPS)
    wrong = [row["name"] for row in said["findings"] if row["level"] == "wrong"]
    assert said["wrong"] == wrong and run.returncode == bool(wrong)
    assert all(row["cure"] for row in said["findings"] if row["level"] == "wrong")


@pytest.mark.parametrize(
    "words, said",
    [
        ("--list x.txt", "--list needs --data"),
        ("--data x --list x.csv", "ends in .txt"),
        ("--data x --list /nowhere/x.txt", "no folder /nowhere"),
        ("--workers 0", "wanted 1 or more"),
        ("--data /nowhere/at/all", "does not exist"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor.py", *words.split()])
    try:
        code = doctor.main()
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and said in capsys.readouterr().err


def child(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


@pytest.mark.slow
def test_a_package_that_crashes_when_it_is_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "deepspeed.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    found = list(doctor.results("packages", doctor.start("packages", "cpu", debug=False), time.monotonic() + 300))
    assert found[-1].level == "wrong" and "SIGABRT" in found[-1].says
    assert str(tmp_path / "deepspeed.py") in found[-1].says and levels(found)["torch"] == "ok"


def test_a_part_that_crashes_hangs_or_fails_is_named():
    first = 'import os, time; print(\'["ok", "DALI", "2.4.0", "", []]\', flush=True);'
    for ends, how in (("os.abort()", "SIGABRT"), ("time.sleep(600)", "in time"), ("raise OSError('full')", "full")):
        found = list(doctor.results("packages", child(first + ends), time.monotonic() + 2))
        assert [finding.level for finding in found] == ["ok", "wrong"]
        assert how in found[1].says and "DALI" in found[1].says and found[1].cure
    assert levels(doctor.results("jpeg", child(first), time.monotonic() + 60)) == {"DALI": "ok"}


def test_a_check_that_raises_is_a_finding():
    def check():
        yield Finding("ok", "a", "b")
        raise LookupError("of another kind")

    found = list(contained("this check", check))
    assert levels(found) == {"a": "ok", "this check": "wrong"} and "of another kind" in found[1].says


def test_the_report_has_the_cure_and_stays_narrow(capsys):
    finding = Finding("wrong", "name", "many words " * 40, "do this", ("one", "two"))
    assert doctor.show([finding]) == [finding]
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= doctor.WIDTH
    assert [line.strip() for line in lines[-3:]] == ["one", "two", "-> do this"]


# --- the machine


def test_an_old_python_and_processor_are_named(tmp_path):
    (old,) = machine.python((3, 10, 4))
    assert old.level == "wrong" and "3.10.4" in old.says
    assert levels(machine.python((3, 12, 0))) == {"Python": "ok"}
    for flags, level in (("sse4_2 avx", "note"), ("avx avx2", "ok"), ("avx2 avx512f", "ok")):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : Some CPU\nflags : {flags}\n\nprocessor : 1\n")
        (found,) = machine.processor(tmp_path / "cpuinfo", "x86_64")
        assert found.level == level and "Some CPU" in found.says and ("AVX2" in found.says) == ("avx512f" not in flags)
    assert levels(machine.processor(tmp_path / "cpuinfo", "aarch64")) == {"processor": "ok"}


@pytest.mark.parametrize("soft, level", [(64, "wrong"), (512, "note"), (4096, "ok"), (-1, "ok")])
def test_few_open_files_are_named(soft, level):
    (found,) = machine.open_files((soft, 2048))
    assert found.level == level and ("ulimit -n 2048" in found.cure) == (level != "ok")


@pytest.mark.parametrize(
    "mebibytes, gpus, level", [(64, 8, "wrong"), (64, 1, "note"), (64, 0, "note"), (8000, 8, "ok")]
)
def test_little_shared_memory_is_named(mebibytes, gpus, level, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (mebibytes << 20, 0, mebibytes << 20))
    (found,) = machine.shared_memory(gpus)
    assert found.level == level and f"{mebibytes} of {mebibytes} MiB" in found.says


def test_a_missing_compiler_is_wrong_where_one_is_called(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert levels(machine.compiler(needed=True)) == {"compiler": "wrong"}
    assert levels(machine.compiler(needed=False)) == {"compiler": "note"}


# --- packages


@pytest.mark.parametrize(
    "fault, name, cure",
    [
        ({"versions": {"torch": "2.9.1"}}, "torch", "pip install"),
        ({"versions": {"torch": "2.13.0+cpu"}, "cuda": None}, "torch and GPU", "build of torch for CUDA"),
        ({"driver": "535.183.01"}, "torch and driver", "newer driver"),
        ({"driver": "470.57", "cuda": "12.8", "dali": []}, "torch and driver", "newer driver"),
        ({"versions": {"triton": "3.4.0"}}, "triton", "triton"),
        ({"versions": {"deepspeed": "0.20.1"}}, "DeepSpeed", "deepspeed==0.19.8"),
        ({"dali": ["nvidia-dali-cuda120"]}, "DALI and torch", "nvidia-dali-cuda130"),
        ({"cuda": "12.8"}, "DALI and torch", "nvidia-dali-cuda120"),
        ({"dali": ["nvidia-dali-cuda120", "nvidia-dali-cuda130"]}, "DALI twice", "pip uninstall"),
        ({"versions": {"xformers": "0.0.29.post1"}}, "xformers", "0.0.35"),
    ],
)
def test_each_known_bad_pair_is_named_alone(fault, name, cure):
    assert list(packages.known_pairs(GOOD)) == []
    planted = {**vars(GOOD), **fault, "versions": {**GOOD.versions, **fault.get("versions", {})}}
    (found,) = packages.known_pairs(Facts(**planted))
    assert found.name == name and cure in found.cure


def test_nothing_is_known_against_what_is_not_there():
    assert list(packages.known_pairs(Facts(read=("0.19.8",)))) == []


def test_a_torchvision_for_another_torch_is_named(monkeypatch):
    wants = {"torchvision": ["numpy", "torch (==2.12.0)", "triton==1; extra == 'x'"], "timm": ["torch>=1"]}
    here = {"torchvision": "0.27.0", "torch": "2.13.0+cpu", "numpy": "2.4.6", "timm": "1.0", "triton": "3.7.1"}

    def requires(name):
        if name not in here:
            raise metadata.PackageNotFoundError(name)
        return wants.get(name)

    monkeypatch.setattr(metadata, "requires", requires)
    monkeypatch.setattr(metadata, "version", here.__getitem__)
    (found,) = packages.requirements()
    assert found.level == "wrong" and "torchvision 0.27.0 wants torch==2.12.0" in found.says
    wants["torchvision"][1] = "torch (==2.13.0)"
    assert list(packages.requirements()) == []


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package that runs `code` when it is imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, version: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


def test_what_is_missing_or_cannot_be_imported_is_wrong(install):
    install("jepa_broken", "1.2", "raise RuntimeError('operator that::is does not exist')")
    install("jepa_whole", "3.4", "")
    (broken,) = packages.imported("jepa_broken")
    (missing,) = packages.imported("jepa_missing")
    (whole,) = packages.imported("jepa_whole")
    assert (broken.level, missing.level, whole) == ("wrong", "wrong", Finding("ok", "jepa_whole", "3.4"))
    assert "1.2" in broken.says and "that::is" in broken.says and "pip install" in missing.cure


def test_optional_packages_are_wrong_only_if_they_are_here_and_broken(install, monkeypatch):
    for name in ("jepa_first", "jepa_second"):
        install(name, "1.0", "raise OSError('libsomething.so: undefined symbol')")
    install("jepa_works", "2.0", "")
    optional = [(name, name, "this") for name in ("jepa_first", "jepa_second", "jepa_works", "jepa_absent")]
    monkeypatch.setattr(packages, "OPTIONAL", optional)
    broken, here, missing = packages.optional()
    assert broken.level == "wrong" and "jepa_first 1.0, jepa_second 1.0" in broken.says
    assert (here.says, missing.says) == ("jepa_works 2.0", "jepa_absent (optional)")


def test_the_kernels_library_is_wrong_if_missing_and_noted_if_stale(tmp_path, monkeypatch):
    package, source = tmp_path / "kernels/jepa_kernels", tmp_path / "csrc/gather.cpp"
    package.mkdir(parents=True)
    source.parent.mkdir()
    library = package / "_C.abi3.so"
    for path in (library, source):
        path.touch()
    monkeypatch.setattr(jepa_kernels, "__file__", str(package / "__init__.py"))
    for age, level in ((-100, "ok"), (100, "note")):
        os.utime(source, times=(library.stat().st_mtime + age,) * 2)
        (found,) = packages.ours()
        assert found.level == level and ("gather.cpp" in found.says) == (level == "note")
    (package / "NO_EXT").touch()
    assert levels(packages.ours()) == {"kernels": "note"}
    monkeypatch.setitem(sys.modules, "jepa_kernels", None)
    (found,) = packages.ours()
    assert found.level == "wrong" and found.cure


# --- the self-test


@pytest.mark.parametrize("op", ["gather", "ema_"])
def test_a_kernel_that_computes_something_else_is_found(op):
    original = getattr(packages_of(op), f"{op.rstrip('_')}_ref")

    def wrong(*args):
        result = original(*args)
        changed = result if isinstance(result, torch.Tensor) else args[0][0]
        changed.view(-1)[-1] += 1
        return result

    assert selftest_of("self-test").level == "ok"
    with torch.library._scoped_library("jepa_kernels", "IMPL") as library:
        library.impl(op, wrong, "CPU", allow_override=True)
        found = selftest_of("self-test")
        assert found.level == "wrong" and found.says.endswith(f"references: {op}")


def packages_of(op: str):
    return sys.modules[f"jepa_kernels.{op.rstrip('_')}"]


def selftest_of(name: str) -> Finding:
    return next(finding for finding in selftest.kernels("cpu") if finding.name == name)


def test_an_op_that_is_not_compared_is_found(monkeypatch):
    monkeypatch.setattr(
        selftest, "call_every_op", lambda device, dtype: jepa_kernels.sigreg_slices(4, 3, seed=1, step=2)
    )
    found = selftest_of("self-test")
    others = set(jepa_kernels.OPS) - {"sigreg_normals_"}
    assert found.level == "wrong" and set(found.says.partition(": ")[2].split(", ")) == others


# --- the scan


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture
def folder(tmp_path):
    """Images of every kind in two classes, and what a scan must find of them."""
    root, modes, sides = tmp_path / "images", {}, []
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
    for number in range(random.randint(9, 30)):
        mode = random.choice(["RGB", "L", "CMYK"])
        height, width = random.randint(24, 60), random.randint(24, 60)
        channels = {"RGB": (3,), "L": (), "CMYK": (4,)}[mode]
        pixels = np.random.default_rng(random.getrandbits(32)).integers(0, 256, (height, width, *channels), np.uint8)
        Image.fromarray(pixels, mode).save(root / random.choice(["cat", "dog"]) / f"{number}.jpg")
        modes[mode] = modes.get(mode, 0) + 1
        sides.append(min(height, width))
    good = sorted(root.rglob("*.jpg"))
    Image.new("RGBA", (30, 30)).save(root / "cat/0 alpha.png")
    modes["RGBA"] = 1
    sides.append(30)
    (root / "dog/zz copy.jpg").write_bytes(good[0].read_bytes())
    (root / "dog/cut.jpg").write_bytes(good[-1].read_bytes()[:200])
    (root / "dog/empty.png").touch()
    (root / "dog/words.jpg").write_text("not an image")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 70000, 70000, 8, 2, 0, 0, 0))
    (root / "dog/huge.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    )
    copied = Image.open(good[0])
    modes[copied.mode] += 1
    sides.append(min(copied.size))
    return root, modes, sorted(sides), good


BAD = {f"dog/{name}" for name in ("cut.jpg", "empty.png", "words.jpg", "huge.png")}


@pytest.mark.slow
def test_a_scan_counts_what_is_there_and_its_list_trains(folder, tmp_path):
    root, modes, sides, good = folder
    source = open_images(root)
    found = scan.scan(source, tmp_path / "kept.jsonl", workers=2)
    counts = scan.count(source, found)
    paths = [path for path in root.rglob("*") if path.is_file()]
    assert counts["images"] == len(paths) and counts["bytes"] == sum(path.stat().st_size for path in paths)
    assert counts["modes"] == modes and counts["classes"] == 2
    assert counts["formats"] == {"JPEG": len(good) + 1, "PNG": 1}
    assert counts["shorter side"] == [sides[0], sides[len(sides) // 2], sides[-1]]
    assert {os.path.relpath(name, root) for name in counts["unreadable"]} == BAD
    assert counts["copies"] == {str(root / "dog/zz copy.jpg"): str(good[0])}
    assert len(counts["copies in another class"]) == (good[0].parent.name == "cat")

    assert scan.write_list(tmp_path / "list.txt", source, found) == []
    again = open_images(tmp_path / "list.txt")
    kept = sorted([*good, root / "cat/0 alpha.png"])
    assert sorted(again.name(i) for i in range(len(again))) == list(map(str, kept))
    assert [again.classes[label] for label in again.labels] == [Path(f).parent.name for f in again.files]
    if found.decoder == "DALI":
        from jepa.data.augment import View

        loader = Loader(again, [View(16, (0.3, 1.0))], batch_size=len(again), num_workers=1)
        batch = loader.batch(0)
        assert batch.replaced == 0 and sorted(batch.files) == list(map(str, kept))


class Stops:
    """A progress bar whose user presses Ctrl-C after so many images."""

    def __init__(self, after: int) -> None:
        self.left = after

    def update(self, number: int) -> None:
        self.left -= number
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_scan_goes_on_and_looks_again_only_at_what_changed(folder, tmp_path, monkeypatch):
    (root, modes, _, _), kept = folder, tmp_path / "cache/kept.jsonl"
    source, looked, real = open_images(root), [], scan._look_at

    def look_at(source, todo, *rest):
        looked.append([source.name(i) for i in todo])
        return real(source, todo, *rest)

    monkeypatch.setattr(scan, "_look_at", look_at)
    with pytest.raises(KeyboardInterrupt):
        scan.scan(source, kept, 1, Stops(after=5))
    with kept.open("a") as lines:
        lines.write('["half of a li')
    whole = scan.scan(source, kept, 1)
    assert [len(names) for names in looked] == [len(source), len(source) - 5]
    counts = scan.count(source, whole)
    assert counts["modes"] == modes and {os.path.relpath(name, root) for name in counts["unreadable"]} == BAD

    assert scan.scan(source, kept, 1) == whole and looked[2:] == [[]]
    changed = root / "dog/words.jpg"
    Image.new("RGB", (20, 20)).save(changed)
    again = scan.scan(source, kept, 1)
    assert looked[3] == [str(changed)] and len(again.unreadable) == len(whole.unreadable) - 1


class Deadly(ImageSource):
    """One of its images kills whoever reads it."""

    def read(self, i: int) -> np.ndarray:
        if self.name(i).endswith("words.jpg"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(i)

    def take(self, indices: np.ndarray) -> "Deadly":
        return Deadly(**vars(super().take(indices)))


@pytest.mark.slow
def test_an_image_that_kills_its_process_is_named_and_the_scan_goes_on(folder):
    root = folder[0]
    source = Deadly(**vars(open_images(root)))
    counts = scan.count(source, scan.scan(source, None, workers=2))
    assert {os.path.relpath(name, root) for name in counts["unreadable"]} == BAD
    assert counts["unreadable"][str(root / "dog/words.jpg")] == scan.CRASHES


@pytest.mark.slow
def test_the_members_of_tars_are_counted_and_not_listed(folder, tmp_path, monkeypatch, capsys):
    root, modes, _, _ = folder
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(root, "all")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--data", str(tmp_path / "all.tar"), "--json"])
    assert doctor.main() == 1
    said = json.loads(capsys.readouterr().out)
    assert said["data"]["modes"] == modes and len(said["data"]["unreadable"]) == len(BAD)
    sys.argv += ["--list", str(tmp_path / "list.txt")]
    assert doctor.main() == 2
    assert "tars" in capsys.readouterr().err and not (tmp_path / "list.txt").exists()


@pytest.mark.slow
def test_the_program_scans_writes_a_list_and_says_so(folder, tmp_path):
    root, _, _, good = folder
    odd = root / "cat/a\ttab.png"
    Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(odd)
    words = ("--data", root, "--list", tmp_path / "list.txt")
    run = program(*words, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert run.returncode == 1 and "wrong: unreadable" in run.stdout
    assert f"{len(good) + 1} images in {tmp_path / 'list.txt'}" in run.stdout
    assert "1 names have a tab" in run.stdout and "Traceback" not in run.stderr
    for name in ("cut.jpg", "empty.png", "huge.png", "words.jpg"):
        (root / "dog" / name).unlink()
    assert program(*words, XDG_CACHE_HOME=str(tmp_path / "cache")).returncode == 0


@pytest.mark.slow
def test_a_list_that_would_be_empty_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    source = open_images(tmp_path)
    with pytest.raises(ValueError, match="no image"):
        scan.write_list(tmp_path / "list.txt", source, scan.scan(source, None, 1))
