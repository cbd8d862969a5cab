"""A run starts from the weights in a file, whoever wrote it: every tensor is where it belongs, and the rest is fresh.

The files are written here, from the documentation of their layouts, by code that shares nothing with the readers.
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import plain
from jepa.config.schema import Config
from jepa.methods import build
from jepa.model.vit import build_encoder
from jepa.state.checkpoint import Progress, Saver
from jepa.state.foreign import open_initial
from jepa.state.initial import start_from
from jepa.state.interop import PARTS, Weights, save_safetensors
from jepa.state.partitions import flats
from jepa.state.restore import CheckpointError
from jepa.train import zero
from jepa.train.teacher import Teacher
from processes import rows, start, write_config
from small import every_row, run_ranks, small_config, whole_weights
from soak import log_of

WIDTH, DEPTH, HEADS, PATCH, SIDE, NARROW = 24, 2, 2, 4, 8, 16  # of small_config
Tensors = dict[str, Tensor]


def block(prefix: str, width: int) -> Tensors:
    shapes = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,)}
    shapes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    made = {f"{prefix}.{name}.weight": torch.randn(shape) / 5 for name, shape in shapes.items()}
    return made | {f"{prefix}.{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}


def encoder(width: int = WIDTH, depth: int = DEPTH, patch: int = PATCH) -> Tensors:
    """Random weights under the published names."""
    made = {"patch_embed.proj.weight": torch.randn(width, 3, patch, patch) / 5}
    made |= {name: torch.randn(width) for name in ("patch_embed.proj.bias", "norm.weight", "norm.bias")}
    return made | {k: v for i in range(depth) for k, v in block(f"blocks.{i}", width).items()}


def predictor(width: int = NARROW) -> Tensors:
    made = {"predictor_embed.weight": torch.randn(width, WIDTH), "mask_token": torch.randn(1, 1, width)}
    made |= {"predictor_proj.weight": torch.randn(WIDTH, width), "predictor_proj.bias": torch.randn(WIDTH)}
    made |= {f"predictor_{name}": torch.randn(width) for name in ("embed.bias", "norm.weight", "norm.bias")}
    return made | {k: v for i in range(2) for k, v in block(f"predictor_blocks.{i}", width).items()}


class Model(NamedTuple):
    encoder: Tensors
    target_encoder: Tensors
    predictor: Tensors


def model() -> Model:
    return Model(encoder(), encoder(), predictor())


# --- writers


def table(width: int = WIDTH, side: int = SIDE) -> Tensor:
    return plain.positions(width, side)[None].float()


def write_official(path: Path, parts: dict[str, Tensors], prefix: str = "module.", side: int = SIDE) -> Path:
    """What the published code saves: beside the weights an optimizer's state and numbers, some of them numpy's."""
    opt = {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": np.float64(1)}]}
    content: dict[str, Any] = {
        "opt": opt,
        "scaler": None,
        "epoch": np.int64(3),
        "loss": np.float32(0.3),
        "lr": np.float64(1e-3),
        "batch_size": 4,
    }
    for part, tensors in parts.items():
        name, width = ("predictor_pos_embed", NARROW) if part == "predictor" else ("pos_embed", WIDTH)
        content[part] = {prefix + k: v for k, v in ({name: table(width, side)} | tensors).items()}
    torch.save(content, path)
    return path


def write_timm(path: Path, tensors: Tensors, **more: Tensor) -> Path:
    """With a classifier, as after fine-tuning."""
    head = {"head.weight": torch.randn(5, WIDTH), "head.bias": torch.randn(5)}
    tensors = {"pos_embed": table(), **tensors, **head, **more}
    safetensors.torch.save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def huggingface_names(tensors: Tensors) -> Tensors:
    """From the documentation of IJepaModel."""
    made = {"embeddings.position_embeddings": table()}
    for name, value in tensors.items():
        kind = name.rpartition(".")[2]
        layer = f"encoder.layer.{name.split('.')[1]}"
        if name.startswith("patch_embed"):
            made[f"embeddings.patch_embeddings.projection.{kind}"] = value
        elif name.startswith("norm."):
            made[f"layernorm.{kind}"] = value
        elif ".qkv." in name:
            for i, which in enumerate(("query", "key", "value")):
                made[f"{layer}.attention.attention.{which}.{kind}"] = value[i * WIDTH : (i + 1) * WIDTH].clone()
        elif ".attn.proj." in name:
            made[f"{layer}.attention.output.dense.{kind}"] = value
        elif ".mlp." in name:
            made[f"{layer}.{'intermediate' if '.fc1.' in name else 'output'}.dense.{kind}"] = value
        else:
            made[f"{layer}.layernorm_{'before' if '.norm1.' in name else 'after'}.{kind}"] = value
    return made


def write_huggingface(folder: Path, tensors: Tensors, files: int = 1, bins: bool = False, **config: Any) -> Path:
    folder.mkdir()
    about = {"model_type": "ijepa", "num_attention_heads": HEADS, "hidden_act": "gelu", "hidden_size": WIDTH}
    (folder / "config.json").write_text(json.dumps(about | config))
    named = huggingface_names(tensors) | {"pooler.dense.weight": torch.randn(WIDTH, WIDTH)}
    for i in range(files):
        share = dict(list(named.items())[i::files])
        number = f"-{i + 1:05d}-of-{files:05d}" if files > 1 else ""
        if bins:
            torch.save(share, folder / f"pytorch_model{number}.bin")
        else:
            safetensors.torch.save_file(share, folder / f"model{number}.safetensors")
    return folder


def write_export(path: Path, parts: dict[str, Tensors], config: Config) -> Path:
    shapes = {part: {name: list(value.shape) for name, value in tensors.items()} for part, tensors in parts.items()}
    weights = Weights(config, {}, shapes, lambda part, name: parts[part][name])
    save_safetensors(weights, list(parts), torch.float32, path)
    return path


WRITERS: dict[str, tuple[tuple[str, ...], Callable[[Path, dict[str, Tensors]], Path]]] = {
    "official": (PARTS, lambda p, m: write_official(p / "x.pth.tar", m)),
    "official, compiled": (PARTS, lambda p, m: write_official(p / "x.pth.tar", m, "module._orig_mod.")),
    "official, compiled first": (PARTS, lambda p, m: write_official(p / "x.pth.tar", m, "_orig_mod.module.")),
    "official, without predictor": (PARTS[:2], lambda p, m: write_official(p / "x.pth.tar", m, "")),
    "our export": (PARTS, lambda p, m: write_export(p / "x", m, small_config())),
    "our export of one encoder": (PARTS[:1], lambda p, m: write_export(p / "x", m, small_config())),
    "timm": (("encoder",), lambda p, m: write_timm(p / "x.safetensors", m["encoder"])),
    "timm, pickled": (("encoder",), lambda p, m: write_timm(p / "x.pth", m["encoder"])),
    "Hugging Face": (("encoder",), lambda p, m: write_huggingface(p / "x", m["encoder"])),
    "Hugging Face, three files": (("encoder",), lambda p, m: write_huggingface(p / "x", m["encoder"], 3)),
    "Hugging Face, pickled": (("encoder",), lambda p, m: write_huggingface(p / "x", m["encoder"], 2, bins=True)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_tensor_is_read_as_it_was_written(writer: str, tmp_path: Path) -> None:
    parts, write = WRITERS[writer]
    wanted = {part: getattr(model(), part) for part in parts}
    found = open_initial(write(tmp_path, wanted), small_config())
    assert found.parts.keys() == wanted.keys() and found.side == SIDE
    for part in parts:
        assert found.parts[part].keys() == wanted[part].keys()
        for name, (shape, read) in found.parts[part].items():
            assert shape == list(wanted[part][name].shape) and torch.equal(read(), wanted[part][name]), (part, name)
    assert bool(found.unread) == writer.startswith(("timm", "Hugging"))


def test_files_in_half_precision_are_read_as_they_are(tmp_path: Path) -> None:
    wanted = encoder()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for suffix in ("safetensors", "pth"):
            path = tmp_path / f"{dtype}.{suffix}"
            low = {name: value.to(dtype) for name, value in ({"pos_embed": table()} | wanted).items()}
            safetensors.torch.save_file(low, path) if suffix == "safetensors" else torch.save(low, path)
            for name, stored in open_initial(path, small_config()).parts["encoder"].items():
                assert torch.equal(stored.read(), wanted[name].to(dtype).float()), (path, name)


def test_another_resolution_is_read_and_told(tmp_path: Path) -> None:
    for crop in (32, 48, 20):
        side = int(torch.randint(2, 20, ()))
        path = write_official(tmp_path / f"{crop}.pth.tar", model()._asdict(), side=side)
        found = open_initial(path, small_config(f"data.crop_size={crop}", "mask.min_keep=1"))
        assert found.side == side and not any("pos_embed" in name for part in found.parts.values() for name in part)


# --- refusals


def changed(tensors: dict[str, Any], changes: dict[str, Callable[[], Any] | None]) -> dict[str, Any]:
    """With entries replaced by what a function makes, or left out."""
    for key, make in changes.items():
        name = key.replace("__", ".")
        tensors = {k: v for k, v in tensors.items() if k != name} | ({name: make()} if make else {})
    return tensors


def refused_official(**changes: Callable[[], Tensors] | None) -> Callable[[Path], Path]:
    return lambda folder: write_official(folder / "x.pth.tar", changed(model()._asdict(), changes))


def refused_timm(**changes: Callable[[], Tensor] | None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        safetensors.torch.save_file(changed({"pos_embed": table()} | encoder(), changes), folder / "x")
        return folder / "x"

    return write


def refused_huggingface(**change: Any) -> Callable[[Path], Path]:
    return lambda folder: write_huggingface(folder / "x", encoder(), **change)


def text(folder: Path, name: str = "x", content: str = "no weights") -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    return folder / name


def prefixed_twice(folder: Path) -> Path:
    names = {"norm.weight": torch.ones(WIDTH), "module.norm.weight": torch.zeros(WIDTH)}
    torch.save({"encoder": encoder() | names}, folder / "x")
    return folder / "x"


def one_export(folder: Path, *words: str) -> Path:
    return write_export(folder / "x", {"encoder": encoder()}, small_config(*words))


def two_grids(folder: Path) -> Path:
    first, second = {"pos_embed": table(side=3)} | encoder(), {"predictor_pos_embed": table(NARROW)} | predictor()
    torch.save({"encoder": first, "predictor": second}, folder / "x")
    return folder / "x"


def in_two_files(folder: Path) -> Path:
    path = write_huggingface(folder / "x", encoder(), 2)
    safetensors.torch.save_file({"layernorm.bias": torch.zeros(WIDTH)}, path / "model-00003-of-00003.safetensors")
    return path


OURS = "wanted one of our checkpoints"
REFUSED: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "another patch size": (
        refused_official(target_encoder=lambda: encoder(patch=8)),
        ("mask.patch_size 8 (here 4)", "give mask.patch_size=8"),
    ),
    "another width": (
        refused_official(encoder=lambda: encoder(width=32)),
        ("meta.embed_dim 32 (here 24)", "give meta.embed_dim=32"),
    ),
    "another depth": (refused_official(encoder=lambda: encoder(depth=3)), ("meta.depth 3 (here 2)",)),
    "a named size": (
        lambda folder: write_timm(folder / "x.pth", encoder(384, 12, 16)),
        ("meta.embed_dim 384 (here 24)", "give meta.model_name=vit_small mask.patch_size=16"),
    ),
    "another predictor": (refused_official(predictor=lambda: predictor(20)), ("meta.pred_emb_dim 20 (here 16)",)),
    "a predictor alone": (
        refused_official(encoder=None, target_encoder=None),
        ("found predictor", "wanted target_encoder"),
    ),
    "heads in our export": (lambda folder: one_export(folder, "meta.num_heads=4"), ("meta.num_heads 4 (here 2)",)),
    "heads at Hugging Face": (refused_huggingface(num_attention_heads=3), ("meta.num_heads 3 (here 2)",)),
    "another model": (refused_huggingface(model_type="vit"), ("found model_type 'vit'", "wanted 'ijepa'")),
    "another activation": (refused_huggingface(hidden_act="relu"), ("hidden_act 'relu'", "'gelu'")),
    "a config that is none": (
        lambda folder: text(folder, "x/config.json", "[" * 10**5).parent,
        ("config.json is not a model's config",),
    ),
    "a Hugging Face folder without weights": (
        lambda folder: text(folder, "x/config.json", '{"model_type": "ijepa"}').parent,
        ("no tensor", OURS),
    ),
    "a tensor in two files": (in_two_files, ("layernorm.bias is in two of model-00001-of-00002.safetensors",)),
    "a key of another shape": (
        lambda folder: write_huggingface(folder / "x", encoder() | {"blocks.1.attn.qkv.bias": torch.zeros(70)}),
        ("blocks.1.attn.qkv.bias", "wanted three of one shape"),
    ),
    "learned positions": (
        refused_timm(pos_embed=lambda: table() + 1e-3 * torch.randn(1, SIDE**2, WIDTH)),
        ("pos_embed is not I-JEPA's sine-cosine table",),
    ),
    "positions of no square": (refused_timm(pos_embed=lambda: table()[:, 1:]), ("[1, 63, 24]", "square grid")),
    "no positions": (refused_timm(pos_embed=None), ("no pos_embed", OURS)),
    "two grids": (two_grids, ("['3', '8'] patches a side",)),
    "a class token": (
        refused_timm(cls_token=lambda: torch.zeros(1, 1, WIDTH)),
        ("cls_token: [1, 1, 24] in the file, missing in the model",),
    ),
    "layer scale": (refused_timm(blocks__0__ls1__gamma=lambda: torch.zeros(WIDTH)), ("blocks.0.ls1.gamma",)),
    "a missing tensor": (refused_timm(blocks__1__norm2__bias=None), ("blocks.1.norm2.bias: missing in the file",)),
    "integers": (refused_timm(norm__bias=lambda: torch.zeros(WIDTH, dtype=torch.int64)), ("norm.bias is I64",)),
    "a name twice": (prefixed_twice, ("encoder.norm.weight is there twice",)),
    "no file": (lambda folder: folder / "nothing", ("no such file", OURS)),
    "another folder": (lambda folder: folder, ("another folder", OURS)),
    "a text": (text, ("cannot be read as safetensors", OURS)),
    "a damaged checkpoint": (lambda folder: text(folder, "x/state.json", "{}").parent, ("state.json is damaged",)),
    "a list": (lambda folder: torch.save([1], folder / "x") or folder / "x", ("found list", OURS)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_one_clear_error(what: str, tmp_path: Path) -> None:
    write, words = REFUSED[what]
    path = write(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_initial(path, small_config())
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 1000
    assert all(word in message for word in words), message


# --- into the engine


CASES = [(*case, "adamw_ema") for case in itertools.product((0, 1, 2, 3), ("fp32", "bf16"))]
CASES += [(stage, precision, "torch") for stage, precision in enumerate(("bf16", "fp32", "bf16", "fp32"))]
MOMENTUM = 0.75


def started(path: Path, folder: Path, *words: str) -> tuple[Config, Any, Teacher]:
    """An engine as engine/train.py makes it, with the weights at `path`."""
    import train

    config = small_config(
        f"meta.init_from={path}", f"logging.folder={folder}", f"data.mean={list(plain.MEAN)}",
        f"data.std={list(plain.STD)}", *words,
    )  # fmt: skip
    model_engine, teacher = train.start_model(config, torch.device("cpu"))
    start_from(config, model_engine)
    teacher.refresh()
    return config, model_engine, teacher


def deviations(model_engine: Any, teacher: Teacher, fresh: Tensors, wanted: Model, low: torch.dtype) -> list[str]:
    """What of an engine's state is not the weights in the file, or not fresh."""
    weights, emas = whole_weights(model_engine), whole_weights(model_engine, "ema")
    expected = {f"encoder.{k}": v for k, v in wanted.encoder.items()}
    expected |= {f"predictor.{k}": v for k, v in wanted.predictor.items()}
    expected |= {k: v.to(low).float() for k, v in fresh.items() if k.startswith("projector.")}
    wrong = [f"weight of {name}" for name, value in weights.items() if not torch.equal(value, expected[name].flatten())]
    if weights.keys() != expected.keys():
        wrong.append("names")
    averages = {f"encoder.{k}": v.flatten() for k, v in wanted.target_encoder.items()}
    if emas.keys() != averages.keys():
        wrong.append("names of averages")
    wrong += [f"average of {name}" for name in averages if not torch.equal(emas[name], averages[name])]
    for kind in ("exp_avg", "exp_avg_sq"):
        wrong += [f"{kind} of {name}" for name, value in whole_weights(model_engine, kind).items() if value.any()]
    for name, p in teacher.averages["encoder"].named_parameters():
        if not torch.equal(p.flatten(), averages[f"encoder.{name}"].to(low)):
            wrong.append(f"the target encoder's {name}")
    if model_engine.zero_optimization_stage() < 3:
        for name, p in model_engine.module.named_parameters():
            if not torch.equal(p.flatten(), expected[name].flatten().to(low)):
                wrong.append(f"training weight of {name}")
    return wrong


def targets_deviate(teacher: Teacher, wanted: Model, low: torch.dtype) -> list[str]:
    """Where the first targets are not those of the file's target encoder, in float64."""
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    weights = {name: value.to(low).double() for name, value in wanted.target_encoder.items()}
    right = plain.encoded(plain.embedded(images, weights, PATCH), weights, DEPTH, HEADS)
    error = (teacher(images).double() - right).norm() / right.norm()
    return [] if error < (1e-5 if low == torch.float32 else 0.03) else [f"the targets, by {error:.1e}"]


def step_deviates(config: Config, model_engine: Any, teacher: Teacher, wanted: Model) -> list[str]:
    """The first step counts as the first, and moves the average from the target encoder towards the new weights."""
    from jepa.data.masks import sample_masks

    zero.schedule(model_engine, torch.tensor([0.01, 0.1, MOMENTUM], dtype=torch.float64))
    masks = sample_masks(config.mask_spec, seed=0, step=0, first=0, batch=4)
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    model_engine.backward(model_engine([images], every_row(masks.context, masks.target), teacher(images)).loss)
    if not zero.step(model_engine).applied:
        return ["the first step was skipped"]
    wrong, weights = [], whole_weights(model_engine)
    for name, ema in whole_weights(model_engine, "ema").items():
        old = wanted.target_encoder[name.removeprefix("encoder.")].flatten().double()
        right = MOMENTUM * old + (1 - MOMENTUM) * weights[name].double()
        if not (ema - right).abs().max() <= 1e-6 * right.abs().max():
            wrong.append(f"the new average of {name}")
        before = wanted.encoder[name.removeprefix("encoder.")].flatten()
        moved = (weights[name] - before * (1 - 0.01 * 0.1 * (len(wanted.encoder[name[8:]].shape) > 1))).abs()
        if not 0.005 < moved.max() < 0.0101:  # AdamW's first step is lr times the gradient's sign
            wrong.append(f"the first step of {name}: {moved.max()}")
    counts = {
        float(model_engine.basic_optimizer.state[flat.weight]["step"]) for flat in flats(model_engine) if flat.fragments
    }
    return wrong if counts == {1.0} else [*wrong, f"steps counted: {counts}"]


def start_all(path: Path, folder: Path, wanted: Model) -> list[str]:
    found = []
    for stage, precision, optimizer in CASES:
        words = (f"engine.zero_stage={stage}", f"engine.optimizer={optimizer}")
        words += (f"meta.use_bfloat16={precision == 'bf16'}",)
        low, here = torch.bfloat16 if precision == "bf16" else torch.float32, folder / f"{stage}{precision}{optimizer}"
        config, model_engine, teacher = started(path, here, *words)
        torch.manual_seed(config.engine.seed)
        fresh = dict(build(config).named_parameters())
        wrong = deviations(model_engine, teacher, fresh, wanted, low) + targets_deviate(teacher, wanted, low)

        saver = Saver(
            config, model_engine, steps_per_epoch=5
        )  # nothing was applied yet, and the average must not be lost
        saver.begin()
        saver.save(Progress(step=1, skipped=1))
        import train

        again, other = train.start_model(config, torch.device("cpu"))
        Saver(config, again, steps_per_epoch=5).resume("latest")
        other.refresh()
        wrong += [f"resumed: {what}" for what in deviations(again, other, fresh, wanted, low)]
        wrong += step_deviates(config, model_engine, teacher, wanted)
        found += [f"ZeRO-{stage} {precision} {optimizer}: {what}" for what in wrong]
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_starts_from_the_file(ranks: int, tmp_path: Path) -> None:
    wanted = model()
    path = write_official(tmp_path / "x.pth.tar", wanted._asdict())
    for found in run_ranks(ranks, start_all, path, tmp_path, wanted):
        assert not found, found


def start_one(paths: dict[str, Path], folder: Path) -> dict[str, dict[str, Tensors]]:
    found = {}
    for name, path in paths.items():
        _, model_engine, _ = started(path, folder, "loss.objective=ijepa")
        found[name] = {kind: whole_weights(model_engine, kind) for kind in ("weight", "ema")}
    return found


@pytest.mark.ranks
def test_one_encoder_serves_for_both(tmp_path: Path) -> None:
    only, expected, paths = ("encoder", "target_encoder"), {}, {}
    for part in only:
        expected[part] = encoder()
        paths[part] = write_export(tmp_path / part, {part: expected[part]}, small_config())
    expected["timm"] = encoder()
    paths["timm"] = write_timm(tmp_path / "timm.pth", expected["timm"])
    found = run_ranks(2, start_one, paths, tmp_path)[0]
    for name, weights in expected.items():
        for (key, value), kind in itertools.product(weights.items(), ("weight", "ema")):
            assert torch.equal(found[name][kind][f"encoder.{key}"], value.flatten()), (name, kind, key)
    predictors = [{k: v for k, v in f["weight"].items() if k.startswith("predictor.")} for f in found.values()]
    for each in predictors[1:]:  # fresh, from the run's seed
        assert all(torch.equal(each[k], predictors[0][k]) for k in each)


def fail(path: Path, folder: Path) -> str:
    try:
        started(path, folder)
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.ranks
def test_all_ranks_fail_together(tmp_path: Path) -> None:
    path = write_official(tmp_path / "x.pth.tar", {"encoder": encoder(patch=8)})
    first, second = run_ranks(2, fail, path, tmp_path)
    assert first == second and "mask.patch_size 8 (here 4)" in first and first.startswith("meta.init_from: ")


# --- others' libraries


def features(path: Path, images: Tensor) -> Tensor:
    """Of our encoder with the weights at `path`."""
    config = small_config(f"data.mean={list(plain.MEAN)}", f"data.std={list(plain.STD)}")
    ours, found = build_encoder(config), open_initial(path, config).parts["encoder"]
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(found[name].read())
        return ours(images)


def normalised(images: Tensor) -> Tensor:
    return ((images / 255 - torch.tensor(plain.MEAN)) / torch.tensor(plain.STD)).permute(0, 3, 1, 2)


def test_what_transformers_saves_computes_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    about = transformers.IJepaConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        image_size=32, patch_size=PATCH, layer_norm_eps=1e-6, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.IJepaModel(about).eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        theirs.embeddings.position_embeddings.copy_(table())
        wanted = theirs(normalised(images)).last_hidden_state
    for size in ("5GB", "20KB"):
        theirs.save_pretrained(tmp_path / size, max_shard_size=size)
        found = features(tmp_path / size, images)
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_what_timm_saves_computes_the_same(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm.models.vision_transformer", reason="needs timm")
    size = {"img_size": 32, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    theirs = timm.VisionTransformer(**size, class_token=False, global_pool="avg", fc_norm=False, num_classes=7).eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) / 5)
        theirs.pos_embed.copy_(table())
        wanted = theirs.forward_features(normalised(images))
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        assert (features(tmp_path / name, images) - wanted).norm() < 1e-5 * wanted.norm()


# --- recipes, by engine/train.py


STILL = ("optimization.lr=0", "optimization.start_lr=0", "optimization.final_lr=0", "optimization.ema=[0.5, 0.5]")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", tmp_path / "no images")


def train(ranks: int, folder: Path, *words: object) -> str:
    done = start(ranks, folder, *words, "data.synthetic=80")
    assert done.wait() == [0] * ranks, done.text()
    return done.text()


def tensors_of(checkpoint: Path) -> dict[str, Tensors]:
    """The tensors of a one-rank checkpoint by kind and name, read by its documented layout."""
    state = json.loads((checkpoint / "state.json").read_text())
    (file,) = state["files"]
    flat = safetensors.torch.load_file(checkpoint / file["name"])
    return {
        kind: {
            name: flat[f"{kind}.{i}"][offset : offset + length].view(state["shapes"][name])
            for name, _, length, i, offset in file["pieces"]
            if f"{kind}.{i}" in flat
        }
        for kind in ("weight", "ema")
    }


@pytest.mark.ranks
def test_cjepa_on_top_of_a_trained_ijepa(config: Path, tmp_path: Path) -> None:
    ijepa, words = tmp_path / "ijepa", ("--config", config)
    train(1, ijepa, *words, "loss.objective=ijepa", "engine.max_steps=3", "optimization.lr=0.01")
    words += (f"meta.init_from={ijepa}/jepa-latest", "logging.save_every=2")
    told = train(1, tmp_path / "whole", *words, "engine.max_steps=5")
    assert f"starting from {ijepa}/jepa-latest, our checkpoint: encoder and target encoder each from its own; " in told
    assert "predictor from its predictor; fresh projector" in told and "positions" not in told
    log = log_of(tmp_path / "whole")[0]
    assert [row["step"] for row in log] == list(range(5)) and all(row["loss"] != row["jepa"] for row in log)

    # The first step has the images of step 0 and the trained weights, as a replay of that step with them says.
    replay = ("--replay-step", 0, "--resume", ijepa / "jepa-latest")
    said = train(1, tmp_path / "replay", "--config", config, "loss.objective=ijepa", "meta.pred_depth=2", *replay)
    jepa = float(re.search(r"rank 0: .*jepa (\S+)", said)[1])
    assert log[0]["jepa"] == pytest.approx(jepa, rel=1e-5)
    cold = train(1, tmp_path / "cold", "--config", config, "engine.max_steps=1") and rows(tmp_path / "cold")
    assert cold[0]["jepa"] != pytest.approx(jepa, rel=1e-3)
    assert log[0]["lr"] == cold[0]["lr"]

    # A resumed run does not read the file again, whatever the config now says.
    again = (tmp_path / "parts", *words, "--resume", "auto")
    assert "starting from" in train(1, *again, "engine.max_steps=3")
    told = train(1, *again, "meta.init_from=nowhere", "engine.max_steps=4")
    assert "resuming from" in told and "starting from" not in told
    named = ("meta.load_checkpoint=true", "meta.read_checkpoint=jepa-step00000002", "engine.max_steps=5")
    told = train(1, tmp_path / "parts", *words, *named)
    assert f"resuming from {tmp_path}/parts/jepa-step00000002 at step 2" in told
    assert log_of(tmp_path / "parts")[0] == log
    state = json.loads((tmp_path / "parts/jepa-latest/state.json").read_text())
    assert state["config"]["meta"]["init_from"] == f"{ijepa}/jepa-latest"


@pytest.mark.ranks
def test_an_official_file_goes_on_at_another_crop_size(config: Path, tmp_path: Path) -> None:
    wanted, steps = model(), 3
    path = write_official(tmp_path / "IN1K-vit.pth.tar", wanted._asdict())
    words = ("--config", config, f"meta.init_from={path}", "data.crop_size=48", f"engine.max_steps={steps}")
    told = train(1, tmp_path / "still", *words, *STILL)
    assert "in the published code's layout: encoder and target encoder each from its own" in told
    assert "positions computed for 12 x 12 patches, it was trained on 8 x 8" in told
    found = tensors_of(tmp_path / "still/jepa-latest")
    for name, value in wanted.encoder.items():
        assert torch.equal(found["weight"][f"encoder.{name}"], value), name
        average = value.double() + 0.5**steps * (wanted.target_encoder[name].double() - value)
        torch.testing.assert_close(found["ema"][f"encoder.{name}"].double(), average, rtol=1e-6, atol=1e-6)
    for name, value in wanted.predictor.items():
        assert torch.equal(found["weight"][f"predictor.{name}"], value), name

    train(2, tmp_path / "moving", *words)
    losses = [row["loss"] for row in rows(tmp_path / "moving")]
    assert len(losses) == steps and all(np.isfinite(losses))


def nothing_is_finite(rank: int) -> None:
    from jepa.train import step

    step.poison = lambda loss: loss * float("nan")


@pytest.mark.ranks
def test_the_average_outlives_steps_that_were_all_skipped(config: Path, tmp_path: Path) -> None:
    wanted, folder = model(), tmp_path / "run"
    path = write_official(tmp_path / "x.pth.tar", wanted._asdict())
    words = ("--config", config, "data.synthetic=80", "loss.objective=ijepa")
    done = start(1, folder, *words, f"meta.init_from={path}", "engine.max_steps=1", fault=nothing_is_finite)
    assert done.wait() == [0] and "step 0 skipped" in done.text()
    train(1, folder, *words, "--resume", "engine.max_steps=2", *STILL)
    found = tensors_of(folder / "jepa-latest")["ema"]
    for name, value in wanted.target_encoder.items():
        average = (value.double() + wanted.encoder[name].double()) / 2
        torch.testing.assert_close(found[f"encoder.{name}"].double(), average, rtol=1e-6, atol=1e-6)
    said = train(1, tmp_path / "replay", *words, "--replay-step", 1, "--resume", folder / "jepa-step00000001")
    loss = float(re.search(r"rank 0: total (\S+)", said)[1])
    assert rows(folder)[-1]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.ranks
def test_a_file_that_does_not_fit_stops_the_run_with_one_line(config: Path, tmp_path: Path) -> None:
    path = write_official(tmp_path / "x.pth.tar", {"encoder": encoder(patch=8)})
    done = start(1, tmp_path / "run", "--config", config, "data.synthetic=80", f"meta.init_from={path}")
    assert done.wait() == [1] and "Traceback" not in done.text()
    assert f"meta.init_from: rank 0: {path}: its encoder has mask.patch_size 8 (here 4)" in done.text()
