"""A GPU that works, the CPU, or an error: what is decided for each machine, and what is said."""

import re
from pathlib import Path

import pytest
import torch

from jepa.ranks import device
from jepa.ranks.device import choose, driver_version, has_nvidia

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."
MODULES = {
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024": "535.183.01",
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)": "580.65.06",
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretends a build of torch, a number of GPUs that it can use, and whether there are signs of others."""

    def set_up(
        built: str | None, gpus: int, nvidia: bool = True, said: str = TOO_OLD, driver: str | None = "1"
    ) -> None:
        def init() -> None:
            raise RuntimeError(said)

        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus or 8)  # NVML counts GPUs that CUDA cannot use
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(device, "has_nvidia", lambda: nvidia)
        monkeypatch.setattr(device, "driver_version", lambda: driver)

    return set_up


def test_a_gpu_that_works_is_used_unless_the_cpu_is_asked_for(machine, capsys):
    machine("13.0", gpus=4)
    assert [choose(asked, 3) for asked in ("auto", "cuda", "cpu")] == [torch.device("cuda", 3)] * 2 + [
        torch.device("cpu")
    ]
    for asked in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"process 4 .* no GPU \(4 found\).*engine.device=cpu"):
            choose(asked, 4)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("driver", [None, "470.57.02"])
@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_an_error_that_says_why_and_how_to_go_on(machine, monkeypatch, asked, driver):
    machine("13.0", gpus=0, driver=driver)
    monkeypatch.setattr(torch, "__version__", "2.99.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "17")
    with pytest.raises(ValueError) as caught:
        choose(asked)
    wanted = (
        asked,
        "2.99.1",
        "CUDA 13.0",
        driver or "no NVIDIA driver found",
        TOO_OLD[:-1],
        "='17'",
        "engine.device=cpu",
    )
    assert all(part in str(caught.value) for part in wanted), str(caught.value)
    assert choose("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("built", "nvidia", "why"), [("12.8", False, "no NVIDIA GPU"), (None, True, "without CUDA")])
def test_where_nothing_says_gpu_auto_is_the_cpu_in_so_many_words_and_cuda_an_error(machine, capsys, built, nvidia, why):
    machine(built, gpus=0, nvidia=nvidia)
    assert choose("auto", 0) == choose("auto", 1) == torch.device("cpu")
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and "CPU" in err and why in err
    with pytest.raises(ValueError, match="device cuda"):
        choose("cuda")


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_signs_of_an_nvidia_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    cards = {"network": ("0x15b3", "0x020000"), "amd": ("0x1002", "0x030000"), "sound": ("0x10de", "0x040300")}
    for name, (vendor, kind) in cards.items():
        for root in ("none", "card"):
            write(tmp_path / root / f"sys/bus/pci/devices/{name}/vendor", vendor)
            write(tmp_path / root / f"sys/bus/pci/devices/{name}/class", kind)
    (tmp_path / "none/sys/bus/pci/devices/gone").mkdir()
    assert not has_nvidia(tmp_path / "none")
    write(tmp_path / "card/sys/bus/pci/devices/gpu/vendor", "0x10de")
    write(tmp_path / "card/sys/bus/pci/devices/gpu/class", "0x030200")
    write(tmp_path / "module/proc/driver/nvidia/version")
    write(tmp_path / "node/dev/nvidia0")
    assert all(has_nvidia(tmp_path / root) for root in ("card", "module", "node"))
    write(tmp_path / "bin/nvidia-smi", "#!/bin/sh")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    assert has_nvidia(tmp_path / "none")


@pytest.mark.parametrize("line", MODULES)
def test_the_version_of_the_driver(tmp_path, line):
    assert driver_version(tmp_path) is None
    write(tmp_path / "proc/driver/nvidia/version", f"{line}\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1)")
    assert driver_version(tmp_path) == MODULES[line]
    write(tmp_path / "proc/driver/nvidia/version", re.sub(r"\d", "", line))
    assert driver_version(tmp_path) is None
