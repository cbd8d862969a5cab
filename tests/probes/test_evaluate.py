"""evaluate.py as users start it, on a small checkpoint, and the same encoder in other people's formats."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import evaluate
from jepa.config.file import load_config
from jepa.data.synthetic import write
from jepa.probes import linear
from jepa.probes.job import digest
from jepa.state.encoder import _config_of, load_encoder
from jepa.state.interop import open_weights, save_huggingface, save_published, save_safetensors
from processes import ROOT
from small import MAPPING

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@dataclass
class Trained:
    """A run of three steps on drawn scenes, which its online probe has examined at the end."""

    root: Path
    log: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.root / "run/jepa-latest"

    @property
    def epochs(self) -> int:
        """Whole ones; the config's are two."""
        return 3 // (60 // MAPPING["data"]["batch_size"])

    @property
    def folders(self) -> list[str]:
        return ["--train", str(self.root / "set/images/train"), "--val", str(self.root / "set/images/val")]


def start(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    write(root / "set", {"train": 60, "val": 24})
    train, val = (root / "set/images" / split for split in ("train", "val"))
    config = MAPPING | {"data": MAPPING["data"] | {"root_path": str(train)}}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    start(
        ROOT / "engine/train.py", "--config", root / "config.yaml", f"logging.folder={root / 'run'}",
        "engine.max_steps=3", "eval.every=3", f"eval.train_path={train}", f"eval.val_path={val}", "eval.knn_k=5",
    )  # fmt: skip
    return Trained(root, json.loads((root / "run/jepa.jsonl").read_text().splitlines()[-1]))


def here(monkeypatch: pytest.MonkeyPatch, *words: object, code: int = 0) -> None:
    """In this process."""
    monkeypatch.setattr(sys, "argv", ["engine/evaluate.py", *map(str, words)])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert evaluate.main() == code


def result(folder: Path, protocol: str) -> dict[str, Any]:
    """The only one of this protocol, which is named after the images, too."""
    (path,) = folder.glob(f"{protocol}-*.json")
    return json.loads(path.read_text())


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        row["features"]: {name: value for name, value in row.items() if name != "features"} for row in found["rows"]
    }


def test_the_program_gives_the_figures_of_the_online_probe_on_one_and_two_ranks(
    trained: Trained, tmp_path: Path
) -> None:
    program, words = ROOT / "engine/evaluate.py", [*trained.folders, "--k", 5, "--k", 20, "--device", "cpu"]
    said = start(program, "knn", trained.weights, *words, "--out", tmp_path / "one")
    found = result(tmp_path / "one", "knn")
    rows = rows_of(found)
    assert list(rows) == ["target encoder", "untrained encoder", "pixels"]
    assert rows["target encoder"]["class k=5"] == pytest.approx(100 * trained.log["knn"])
    for name, row in rows.items():
        shown = "  +".join(f"{value:.1f} %" for value in row.values())
        assert re.search(rf"^{name}  +{shown}$", said.stdout, re.M), said.stdout
    assert (
        f"written to {tmp_path / 'one/knn-set-k-5-20.json'}" in said.stdout and "untrained encoder: done" in said.stderr
    )
    assert found["protocol"] == "knn" and found["task"] is None and found["ranks"] == 1
    assert found["weights"] == str(trained.weights) and found["model"]["digest"] == digest(
        load_encoder(trained.weights)[0], "(0.485, 0.456, 0.406) (0.229, 0.224, 0.225)"
    )
    size = {"objective": "cjepa", "name": "vit_tiny", "width": 24, "depth": 2, "patch_size": 4, "crop_size": 32}
    assert found["model"] == {**size, "epochs": trained.epochs, "digest": found["model"]["digest"]}
    assert found["settings"]["k"] == [5, 20] and found["settings"]["out"] == str(tmp_path / "one")
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    start(*torchrun, program, "knn", trained.weights, *words, "--out", tmp_path / "two")
    two = result(tmp_path / "two", "knn")
    assert two["ranks"] == 2 and two["rows"] == found["rows"]


def test_linear_clevr_lowshot_and_the_report_share_the_stored_features(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = ("--store", tmp_path / "store", "--device", "cpu"), tmp_path / "eval/run"
    images = [word for folder in trained.folders[1::2] for word in ("--images", folder)]
    here(monkeypatch, "features", trained.weights, *images, *store, "--out", out)
    usable = rows_of(result(out, "features"))
    assert usable["target encoder"] == dict.fromkeys(trained.folders[1::2], 100.0)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.f32")}
    assert len(files) == 4
    here(monkeypatch, "linear", trained.weights, *trained.folders, *store, "--out", out, "--only")
    monkeypatch.setattr(linear, "STEPS", 100)
    here(monkeypatch, "clevr", trained.weights, "--data", trained.root / "set", *store, "--out", out, "--only")
    here(monkeypatch, "lowshot", trained.weights, *trained.folders, *store, "--out", out, "--labels", "3", "--only")
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert rows_of(result(out, "linear"))["target encoder"]["class"] == pytest.approx(100 * trained.log["linear"])
    clevr = rows_of(result(out, "clevr"))
    assert list(clevr) == ["target encoder", "pixels"] and list(clevr["pixels"]) == ["count", "distance"]
    assert list(rows_of(result(out, "lowshot"))["pixels"]) == ["3"]
    capsys.readouterr()
    here(monkeypatch, "report", tmp_path / "eval")
    table = (tmp_path / "eval/report.md").read_text()
    assert table in capsys.readouterr().out and (tmp_path / "eval/report.png").stat().st_size > 10_000
    figures = (
        "linear quick set: class",
        r"lowshot linear-3\S* set: 3",
        "clevr quick set: count",
        "clevr quick set: distance",
    )
    header = r" \| ".join(["method", "model", "epochs", "weights", *figures])
    assert re.search(rf"^\| {header} \|$", table, re.M), table
    assert re.search(rf"^\| cjepa \| tiny/4, 32 px \| {trained.epochs} \| ", table, re.M)


def test_an_encoder_is_the_same_in_every_format(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, config = open_weights(trained.weights), str(trained.root / "config.yaml")
    save_published(weights, torch.float32, tmp_path / "model.pth.tar")
    save_safetensors(weights, ["target_encoder", "encoder"], torch.float32, tmp_path / "model.safetensors")
    save_huggingface(weights, "target_encoder", torch.float32, tmp_path / "huggingface")
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    encoder, _ = load_encoder(trained.weights)
    other, _ = load_encoder(trained.weights, "encoder")
    assert not torch.equal(encoder(images), other(images))
    for name, given in (("model.pth.tar", load_config(config)), ("model.safetensors", None), ("huggingface", None)):
        same, found = load_encoder(tmp_path / name, config=given)
        assert torch.equal(same(images), encoder(images)) and not same.training
        assert found.data.crop_size == 32 and found.vit == weights.config.vit
        if name != "huggingface":
            assert torch.equal(load_encoder(tmp_path / name, "encoder", given)[0](images), other(images))

    words = (*trained.folders, "--k", 5, "--only", "--device", "cpu", "--store", tmp_path / "store")
    here(monkeypatch, "knn", trained.weights, *words, "--out", tmp_path / "checkpoint")
    wanted = result(tmp_path / "checkpoint", "knn")
    files = sorted((tmp_path / "store").rglob("*.f32"))
    for name, more in (("model.pth.tar", ("--config", config)), ("model.safetensors", ()), ("huggingface", ())):
        here(monkeypatch, "knn", tmp_path / name, *words, *more, "--out", tmp_path / f"of-{name}")
        found = result(tmp_path / f"of-{name}", "knn")
        assert found["rows"] == wanted["rows"] and found["model"]["digest"] == wanted["model"]["digest"]
        assert sorted((tmp_path / "store").rglob("*.f32")) == files, "the stored features are shared"


SIZES = {  # hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, patch_size, image_size
    "vit_huge": (1280, 32, 16, 5120, 14, 224),
    "vit_huge at 448": (1280, 32, 16, 5120, 16, 448),
    "vit_giant": (1408, 40, 16, 6144, 16, 224),
    "vit_large": (1024, 24, 16, 4096, 16, 224),
    "another": (96, 5, 3, 288, 8, 64),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_hugging_face_folder_says_which_model_it_holds(name: str, tmp_path: Path) -> None:
    keys = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size"
    model = dict(zip(keys, SIZES[name], strict=True))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ijepa", **model}))
    mean, deviation = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": deviation}))
    config = _config_of(tmp_path)
    size = config.vit
    assert (size.embed_dim, size.depth, size.num_heads) == SIZES[name][:3]
    assert int(size.embed_dim * size.mlp_ratio) == model["intermediate_size"]
    assert (config.mask.patch_size, config.data.crop_size) == SIZES[name][4:]
    assert (config.data.mean, config.data.std) == (mean, deviation)
    if name != "another":
        assert config.meta.model_name == name.split()[0]


def test_mistakes_are_one_line_and_not_a_traceback(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_safetensors(open_weights(trained.weights), ["encoder"], torch.float32, tmp_path / "encoder.safetensors")
    save_huggingface(open_weights(trained.weights), "encoder", torch.float32, tmp_path / "huggingface")
    (tmp_path / "file").write_text("nothing")
    (tmp_path / "empty").mkdir()
    out, none = ("--out", tmp_path / "out"), tmp_path / "nowhere"
    config = ("--config", trained.root / "config.yaml")

    def refused(pattern: str, *words: object) -> None:
        capsys.readouterr()
        here(monkeypatch, *words, code=1)
        printed = capsys.readouterr().err
        last = printed.strip().splitlines()[-1]
        assert re.match(rf"engine/evaluate\.py {words[0]}: .*{pattern}", last), printed
        assert "Traceback" not in printed

    knn_of = ("knn", trained.weights)
    refused("nowhere does not exist; wanted a checkpoint folder or a weights file", "knn", none, *trained.folders, *out)
    refused("file", "knn", tmp_path / "file", *trained.folders, *out)
    refused("empty", "knn", tmp_path / "empty", *trained.folders, *out)
    part = "has no target_encoder; it has encoder"
    refused(rf"encoder\.safetensors {part}", "knn", tmp_path / "encoder.safetensors", *trained.folders, *out)
    for path in (trained.weights, tmp_path / "huggingface"):
        refused("a config is given, but", "knn", path, *config, *trained.folders, *out)
    (tmp_path / "huggingface/config.json").write_text('{"hidden_size": 24}')
    refused("wanted an IJepaModel's config", "knn", tmp_path / "huggingface", *trained.folders, *out)
    refused("nowhere.*does not exist", *knn_of, *trained.folders[:3], none, *out)
    refused(r"--out: .*file/out cannot be written", *knn_of, *trained.folders, "--out", tmp_path / "file/out")
    refused("choose another --store", *knn_of, *trained.folders, *out, "--store", tmp_path / "file/store")
    refused("--layers 9: must be from 1 to the encoder's 2 blocks", *knn_of, *trained.folders, *out, "--layers", 9)
    refused("is not in CLEVR's layout: looked for", "clevr", trained.weights, "--data", none, *out)
    refused("no results; looked for", "report", tmp_path / "empty")
    for words in (["--help"], ["knn"], ["knn", none, "--layers", "two"], ["nonsense"]):
        monkeypatch.setattr(sys, "argv", ["engine/evaluate.py", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            evaluate.main()
        assert stopped.value.code == (0 if words == ["--help"] else 2)


def test_a_wrong_path_is_one_line_of_the_program(trained: Trained, tmp_path: Path) -> None:
    words = ("knn", trained.weights, *trained.folders[:3], tmp_path / "nowhere", "--out", tmp_path, "--device", "cpu")
    done = start(ROOT / "engine/evaluate.py", *words, code=1)
    assert len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("protocol", ["features", "knn", "linear", "lowshot", "clevr", "report"])
def test_every_protocol_has_help(
    protocol: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", protocol, "--help"])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 0 and f"evaluate.py {protocol}" in capsys.readouterr().out
