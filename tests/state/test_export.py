"""Exports read back as what was trained, by this engine's readers and by ones that share no code with them."""

import importlib
import json
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import export
from jepa.config.file import to_yaml
from jepa.data.masks import sample_masks
from jepa.methods import build
from jepa.state.checkpoint import Saver
from jepa.state.encoder import load_encoder
from jepa.state.interop import ENCODERS, PARTS, open_weights
from jepa.state.restore import CheckpointError
from jepa.train import zero
from packages import need
from small import every_row, run_ranks, small_config, whole_weights

pytestmark = pytest.mark.ranks

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
SETTINGS = ("data.batch_size=2", f"data.mean={MEAN}", f"data.std={STD}", "engine.zero_stage=2")


def train_and_save(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Three steps on two ranks; returns the fp32 weights and the average, gathered from both."""
    config = small_config(*SETTINGS, f"logging.folder={folder}")
    torch.manual_seed(0)
    model_engine = zero.start(build(config), config)
    saver = Saver(config, model_engine, steps_per_epoch=2)
    progress = saver.begin()
    for step in range(3):
        masks = sample_masks(config.mask_spec, seed=0, step=step, first=0, batch=2)
        zero.schedule(model_engine, torch.tensor([0.05, 0.1, 0.9], dtype=torch.float64))
        images, features = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8), torch.randn(2, 64, 24)
        model_engine.backward(model_engine([images], every_row(masks.context, masks.target), features).loss)
        progress.count(bool(zero.step(model_engine).applied), 4)
    saver.save(progress)
    return {kind: whole_weights(model_engine, kind) for kind in ("weight", "ema")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A checkpoint, and the {part: {name: flat values}} that it should hold."""
    folder = tmp_path_factory.mktemp("run")
    state = run_ranks(2, train_and_save, folder)[0]
    kinds = {"target_encoder": ("ema", "encoder."), "encoder": ("weight", "encoder.")}
    kinds["predictor"] = ("weight", "predictor.")
    return folder / "jepa-latest", {
        part: {name.removeprefix(prefix): v for name, v in state[kind].items() if name.startswith(prefix)}
        for part, (kind, prefix) in kinds.items()
    }


def run_export(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr("sys.argv", ["export.py", *map(str, args)])
    return export.main()


def images() -> Tensor:
    return torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)


def test_safetensors_hold_what_was_trained(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, wanted = run
    assert run_export(monkeypatch, checkpoint, "--to", "safetensors", "--part", "all", "--out", tmp_path / "a") == 0
    stored = safetensors.torch.load_file(tmp_path / "a")
    assert len(stored) == sum(map(len, wanted.values()))
    for part in PARTS:
        for name, value in wanted[part].items():
            assert torch.equal(stored[f"{part}.{name}"].flatten(), value), (part, name)
    assert not torch.equal(stored["encoder.norm.bias"], stored["target_encoder.norm.bias"])

    again = [tmp_path / "a", "--to", "safetensors", "--part", "all", "--out", tmp_path / "b", "--dtype", "bf16"]
    assert run_export(monkeypatch, *again) == 0
    for name, value in safetensors.torch.load_file(tmp_path / "b").items():
        assert torch.equal(value, stored[name].bfloat16()), name

    x = images()
    for which in ENCODERS:
        trained, config = load_encoder(checkpoint, which)
        exported, same = load_encoder(tmp_path / "a", which)
        assert config == same and torch.equal(trained(x), exported(x))
    assert open_weights(checkpoint).trained == open_weights(tmp_path / "b").trained
    assert open_weights(checkpoint).trained == {"epoch": 1, "step": 3, "samples": 12}


def test_the_published_layout_and_back(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, wanted = run
    (tmp_path / "config.yaml").write_text(to_yaml(small_config()))
    there, back = tmp_path / "jepa.pth.tar", tmp_path / "back.safetensors"
    assert run_export(monkeypatch, checkpoint, "--to", "published", "--out", there) == 0
    content = torch.load(there, weights_only=True)
    assert content["epoch"] == 1
    for part in PARTS:
        positions = {"module.predictor_pos_embed" if part == "predictor" else "module.pos_embed"}
        assert set(content[part]) == {f"module.{name}" for name in wanted[part]} | positions
        for name, value in wanted[part].items():
            assert torch.equal(content[part][f"module.{name}"].flatten(), value), (part, name)

    args = ["--to", "safetensors", "--part", "all", "--config", tmp_path / "config.yaml", *SETTINGS[:3]]
    assert run_export(monkeypatch, there, *args, "--out", back) == 0
    x = images()
    for which in ENCODERS:
        assert torch.equal(load_encoder(checkpoint, which)[0](x), load_encoder(back, which)[0](x))
    for name, value in open_weights(back).tensors("predictor"):
        assert torch.equal(value.flatten(), wanted["predictor"][name]), name


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)


def huggingface_forward(folder: Path, x: Tensor) -> Tensor:
    """transformers' IJepaModel in float64 from the three files alone; uses every tensor, by its name there."""
    config = json.loads((folder / "config.json").read_text())
    pre = json.loads((folder / "preprocessor_config.json").read_text())
    w = {name: value.double() for name, value in safetensors.torch.load_file(folder / "model.safetensors").items()}
    assert (config["model_type"], config["architectures"]) == ("ijepa", ["IJepaModel"])
    assert pre["size"]["height"] == config["image_size"] == x.shape[1]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w.pop(f"{name}.weight"), w.pop(f"{name}.bias"))

    pixels = (x.double() * pre["rescale_factor"] - torch.tensor(pre["image_mean"])) / torch.tensor(pre["image_std"])
    kernel, bias = (w.pop(f"embeddings.patch_embeddings.projection.{kind}") for kind in ("weight", "bias"))
    assert kernel.shape[0] == config["hidden_size"]
    y = F.conv2d(pixels.permute(0, 3, 1, 2), kernel, bias, stride=config["patch_size"]).flatten(2).mT
    y = y + w.pop("embeddings.position_embeddings")
    eps = config["layer_norm_eps"]
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        normed = layer_norm(y, w, f"{layer}.layernorm_before", eps)
        q, k, v = (linear(normed, f"{layer}.attention.attention.{which}") for which in ("query", "key", "value"))
        y = y + linear(attend(q, k, v, config["num_attention_heads"]), f"{layer}.attention.output.dense")
        inner = linear(layer_norm(y, w, f"{layer}.layernorm_after", eps), f"{layer}.intermediate.dense")
        assert inner.shape[-1] == config["intermediate_size"]
        y = y + linear(F.gelu(inner), f"{layer}.output.dense")
    y = layer_norm(y, w, "layernorm", eps)
    assert all("norm" in name for name in w), "a tensor that the model does not have"
    return y


def timm_forward(w: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """timm's VisionTransformer without class token, with its final norm before the mean, in float64."""
    pixels = (x.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    kernel, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    y = F.conv2d(pixels.permute(0, 3, 1, 2), kernel, bias, stride=kernel.shape[-1]).flatten(2).mT + w["pos_embed"]
    for i in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = F.linear(layer_norm(y, b, "norm1", 1e-6), b["attn.qkv.weight"], b["attn.qkv.bias"]).chunk(3, -1)
        y = y + F.linear(attend(q, k, v, heads), b["attn.proj.weight"], b["attn.proj.bias"])
        inner = F.gelu(F.linear(layer_norm(y, b, "norm2", 1e-6), b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        y = y + F.linear(inner, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return layer_norm(y, w, "norm", 1e-6)


@pytest.mark.parametrize("part", ENCODERS)
def test_others_compute_the_same_features(part: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _ = run
    for to in ("huggingface", "timm"):
        assert run_export(monkeypatch, checkpoint, "--to", to, "--part", part, "--out", tmp_path / to) == 0
    x = images()
    with torch.no_grad():
        wanted = load_encoder(checkpoint, part)[0](x).double()
    weights = {name: value.double() for name, value in safetensors.torch.load_file(tmp_path / "timm").items()}
    for y in (huggingface_forward(tmp_path / "huggingface", x), timm_forward(weights, x, heads=2)):
        assert (y - wanted).norm() < 2e-6 * wanted.norm()


def normalised(x: Tensor) -> Tensor:
    return ((x / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def in_transformers(file: Path, x: Tensor) -> Tensor:
    """Features from its own image processor and model."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model, report = transformers.IJepaModel.from_pretrained(file, add_pooling_layer=False, output_loading_info=True)
    assert not any(report.values()), report
    processor = transformers.AutoImageProcessor.from_pretrained(file)
    pixels = processor(images=list(x.numpy()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, normalised(x))
    with torch.no_grad():
        return model(pixels).last_hidden_state


def in_timm(file: Path, x: Tensor) -> Tensor:
    """Built as engine/export.py documents it."""
    need("timm")  # which needs torchvision
    timm = importlib.import_module("timm.models.vision_transformer")
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    kinds = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    model = timm.VisionTransformer(**size, **kinds).eval()
    model.load_state_dict(safetensors.torch.load_file(file))
    with torch.no_grad():
        features = model.forward_features(normalised(x))
        torch.testing.assert_close(model(normalised(x)), features.mean(1))
        return features


@pytest.mark.parametrize(("to", "loaded"), [("huggingface", in_transformers), ("timm", in_timm)])
def test_their_own_libraries_compute_the_same_features(
    to: str, loaded: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_export(monkeypatch, run[0], "--to", to, "--out", tmp_path / "out") == 0
    x = images()
    with torch.no_grad():
        wanted = load_encoder(run[0])[0](x)
    assert (loaded(tmp_path / "out", x) - wanted).norm() < 1e-5 * wanted.norm()


class Attack:
    """Creates a folder when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_code_in_it_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(small_config()))
    content = {"target_encoder": {"module.norm.bias": Attack(tmp_path / "marker")}, "epoch": 1}
    torch.save(content, tmp_path / "zipped")
    torch.save(content, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    (tmp_path / "bare").write_bytes(pickle.dumps(content))
    for name in ("zipped", "legacy", "bare"):
        args = (tmp_path / name, "--to", "safetensors", "--out", tmp_path / "out")
        for more in ((), ("--config", tmp_path / "config.yaml")):
            assert run_export(monkeypatch, *args, *more) == 1
            assert len(capsys.readouterr().err.splitlines()) == 1
            assert not (tmp_path / "marker").exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "zipped", weights_only=False)
    assert (tmp_path / "marker").exists(), "the attack does not work"


def published(run: Any, tmp_path: Path) -> dict[str, Any]:
    weights = open_weights(run[0])
    return {part: {f"module.{name}": value for name, value in weights.tensors(part)} for part in PARTS} | {"epoch": 3}


def without(content: dict, name: str) -> None:
    del content["target_encoder"][name]


FOREIGN = {
    "blocks.1.norm2.bias": lambda c: without(c, "module.blocks.1.norm2.bias"),
    "target_encoder": lambda c: [c.pop(part) for part in PARTS],
    "predictor_embed.weight": lambda c: c["predictor"].update({"module.predictor_embed.weight": torch.zeros(16, 25)}),
    "head.weight": lambda c: c["encoder"].update({"module.head.weight": torch.zeros(2)}),
    "encoder.norm.bias": lambda c: c["encoder"].update({"module.norm.bias": [0.0] * 24}),
    "norm.weight is not a plain": lambda c: c["encoder"].update({"module.norm.weight": torch.zeros(24).to_sparse()}),
    "pos_embed": lambda c: c["encoder"].update({"module.pos_embed": torch.randn(1, 64, 24)}),
    "[1, 16, 24]": lambda c: c["target_encoder"].update({"module.pos_embed": torch.zeros(1, 16, 24)}),
}


@pytest.mark.parametrize("named", FOREIGN)
def test_a_file_of_another_model_is_told_apart(named: str, run: Any, tmp_path: Path) -> None:
    content = published(run, tmp_path)
    FOREIGN[named](content)
    torch.save(content, tmp_path / "x.pth.tar")
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path / "x.pth.tar", small_config())
    assert named in str(caught.value)


def test_a_config_of_another_model_is_told_apart(run: Any, tmp_path: Path) -> None:
    torch.save(published(run, tmp_path), tmp_path / "x.pth.tar")
    for change in ("meta.depth=3", "meta.depth=1", "meta.depth=1000", "meta.embed_dim=32", "meta.pred_emb_dim=20"):
        with pytest.raises(CheckpointError, match="config"):
            open_weights(tmp_path / "x.pth.tar", small_config(change))


def test_mistakes_are_one_line_and_leave_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = run[0], tmp_path / "new" / "out"
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "noise").write_bytes(torch.randint(0, 256, (999,), dtype=torch.uint8).numpy().tobytes())
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.jpg", "no tensor")
    safetensors.torch.save_file({"norm.weight": torch.zeros(3)}, tmp_path / "theirs.safetensors")
    (tmp_path / "config.yaml").write_text(to_yaml(small_config()))
    torch.save({part: values for part, values in published(run, tmp_path).items() if part == "encoder"}, tmp_path / "e")
    config = ("--config", tmp_path / "config.yaml")
    for word, args in {
        "does not exist": ("nowhere", "--to", "timm"),
        "noise": (tmp_path / "noise", "--to", "timm"),
        "theirs.safetensors": (tmp_path / "theirs.safetensors", "--to", "timm"),
        "a config is needed": (tmp_path / "photos.zip", "--to", "timm"),
        "not a file of plain tensors": (tmp_path / "photos.zip", "--to", "timm", *config),
        "its own config": (checkpoint, "--to", "timm", *config),
        "needs --config": (checkpoint, "--to", "timm", "meta.depth=3"),
        "huggingface": (checkpoint, "--to", "huggingface", "--part", "predictor"),
        "no target_encoder": (tmp_path / "e", "--to", "published", *config),
    }.items():
        assert run_export(monkeypatch, *args, "--out", out) == 1, word
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and word in lines[0], lines
    for place in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert run_export(monkeypatch, checkpoint, "--to", "published", "--out", place) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "taken").read_text() == "mine"
    assert not out.parent.exists() and not list(tmp_path.glob(".*"))
