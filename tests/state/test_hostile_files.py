"""Malicious files either load or raise one of the engine's own errors: no crash, hang, code execution or large memory.

Sizes and checksums are corrected after every change, as an attacker would.
"""

import copy
import hashlib
import io
import json
import os
import random
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa.config.schema import ConfigError
from jepa.methods import build
from jepa.state import interop, manifest
from jepa.state.encoder import load_encoder
from jepa.state.foreign import open_initial
from jepa.state.restore import CheckpointError, read_state
from small import KEYS, small_config

CONFIG = small_config()
ALLOWED = 200 * 2**10  # KiB by which loading a tiny file may raise the peak memory


def digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact checkpoint of two ranks, each with half of every parameter, as at ZeRO-3."""
    folder, model = tmp_path_factory.mktemp("hostile") / "whole", build(CONFIG)
    folder.mkdir()
    files = []
    for rank in range(2):
        kinds, offsets, pieces = ("weight", "exp_avg", "exp_avg_sq", "ema"), [0, 0], []
        lines: dict[str, list[torch.Tensor]] = {f"{kind}.{i}": [] for i in range(2) for kind in kinds}
        for name, p in model.named_parameters():
            half = (p.numel() + 1) // 2
            values, flat = p.detach().flatten()[rank * half :][:half], int(not name.startswith("encoder."))
            if values.numel():
                pieces.append([name, rank * half, values.numel(), flat, offsets[flat]])
                offsets[flat] += values.numel()
                for kind in kinds:
                    lines[f"{kind}.{flat}"].append(values)
        path = folder / f"rank-{rank:05d}.safetensors"
        safetensors.torch.save_file({k: torch.cat(v) for k, v in lines.items() if k != "ema.1"}, path)
        files.append({"name": path.name, **digest(path), "pieces": pieces})
    state = {
        "format": 3, "step": 3, "applied": 3, "samples": 12, "skipped": 0, "steps_per_epoch": 2,
        "fingerprint": CONFIG.fingerprint(1), "config": CONFIG.model_dump(mode="json"), "versions": {"torch": "2"},
        "files": files,
        "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
    }  # fmt: skip
    (folder / "state.json").write_text(manifest.seal(state))
    encoder, _ = load_encoder(folder)
    for (name, a), b in zip(encoder.named_parameters(), model.encoder.parameters(), strict=True):
        assert torch.equal(a, b), name
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    path = checkpoint.parent / "exported.safetensors"
    interop.save_safetensors(interop.open_weights(checkpoint), ["target_encoder"], torch.float32, path)
    return path


@pytest.fixture(scope="module")
def published(checkpoint: Path) -> Path:
    path = checkpoint.parent / "x.pth.tar"
    interop.save_published(interop.open_weights(checkpoint), torch.float32, path)
    torch.save(torch.load(path) | {"loss": np.float64(0.5), "lr": np.float32(0.1)}, path)
    return path


@pytest.fixture(scope="module")
def timm(checkpoint: Path) -> Path:
    path = checkpoint.parent / "timm.safetensors"
    interop.save_timm(interop.open_weights(checkpoint), "encoder", torch.float32, path)
    return path


@pytest.fixture(scope="module")
def huggingface(checkpoint: Path) -> Path:
    path = checkpoint.parent / "huggingface"
    interop.save_huggingface(interop.open_weights(checkpoint), "encoder", torch.float32, path)
    return path


def loads(load: Callable[[], object]) -> bool:
    """Whether it loads; raises on any but the engine's own errors, on overlong messages and on large memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load()
    except (CheckpointError, ConfigError) as error:
        assert 0 < len(str(error)) < 5000
        return False
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < ALLOWED
    return True


def read_everything(weights: interop.Weights) -> None:
    for part in weights.shapes:
        for _ in weights.tensors(part):
            pass


def start_from(path: Path) -> None:
    """Opens a file as a run does that starts from it, and reads everything."""
    for tensors in open_initial(path, CONFIG).parts.values():
        for shape, read in tensors.values():
            assert list(read().shape) == shape


VALUES = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(max_size=5), st.integers(-3, 100),
    st.sampled_from([2**31, 2**40, 2**53, 2**62, 2**64, 10**30, 10**400, -(10**30), 1e308, 1e-320]),
    st.sampled_from(["../../x", "/etc/passwd", "rank-00000.safetensors", "rank-00002.safetensors", "weight.0", "F64"]),
    st.sampled_from(["vit_giant", "nan", "packed", "1e18", "encoder.norm.bias", "\0", "..", "", "a" * 5000]),
    st.sampled_from(["[]", "{}", "[[]]", '{"a": 1}', "[0, 1]", "[24]"]).map(json.loads),
)  # fmt: skip


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in nested lists and dicts."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in inner for found in [(*path, key), *places(value, (*path, key))]]


def change(root: Any, data: st.DataObject) -> None:
    """Replaces, nudges, deletes, repeats or swaps a value anywhere in `root`; all depths are equally likely."""
    everywhere = places(root)
    depth = data.draw(st.sampled_from(sorted({len(place) for place in everywhere})))
    *path, last = data.draw(st.sampled_from([place for place in everywhere if len(place) == depth]))
    parent = root
    for key in path:
        parent = parent[key]
    action = data.draw(st.sampled_from(["replace", "nudge", "delete", "repeat", "swap"]))
    if action == "nudge" and type(parent[last]) is int:
        parent[last] += data.draw(st.sampled_from([-1, 1, 8, -8]))
    elif action == "delete":
        del parent[last]
    elif action == "repeat" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[last]))
    elif action == "swap" and isinstance(parent, dict):
        other = data.draw(st.sampled_from(list(parent)))
        parent[last], parent[other] = parent[other], parent[last]
    else:
        parent[last] = data.draw(VALUES)


@settings(deadline=None, max_examples=250)
@given(data=st.data())
def test_a_changed_state_loads_or_is_refused(data: st.DataObject, checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        change(state, data)
    folder = checkpoint.parent / "state"
    folder.mkdir(exist_ok=True)
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(checkpoint / name)
    (folder / "state.json").write_text(manifest.seal(state))
    loads(lambda: read_everything(interop.open_weights(folder)))


REFUSED = {
    "a path above the folder": lambda s: s["files"][0].update(name="../whole/rank-00000.safetensors"),
    "an absolute path": lambda s: s["files"][0].update(name="/etc/hostname"),
    "a file twice": lambda s: s["files"].append(s["files"][0]),
    "a piece twice": lambda s: s["files"][0]["pieces"].append(s["files"][0]["pieces"][0]),
    "a missing piece": lambda s: s["files"][1]["pieces"].pop(),
    "a piece of an unknown parameter": lambda s: s["files"][0]["pieces"].append(["x", 0, 1, 0, 0]),
    "overlapping pieces": lambda s: s["files"][0]["pieces"][0].__setitem__(2, s["files"][0]["pieces"][0][2] + 1),
    "pieces in one place": lambda s: s["files"][0]["pieces"][1].__setitem__(4, 0),
    "a piece beyond its file": lambda s: s["files"][0]["pieces"][-1].__setitem__(4, 10**9),
    "a negative start": lambda s: s["files"][0]["pieces"][0].__setitem__(1, -1),
    "more elements than bytes": lambda s: s["shapes"].update({"encoder.norm.bias": [10**6, 10**9]}),
    "an empty shape": lambda s: s["shapes"].update({"encoder.norm.bias": [24, 0]}),
    "no fingerprint": lambda s: s.pop("fingerprint"),
    "a later format": lambda s: s.update(format=4),
    "a fractional step": lambda s: s.update(step=2.5),
    "not a number": lambda s: s.update(step=float("nan")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_state_is_refused_for(what: str, checkpoint: Path, tmp_path: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    REFUSED[what](state)
    (tmp_path / "state.json").write_text(manifest.seal(state))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**5, "", "\0", "null", "9" * 10**6, '{"format": 1}', "\ud800"]
)
def test_a_state_that_is_none(text: str, tmp_path: Path) -> None:
    content = text.encode(errors="surrogatepass")
    digest = hashlib.sha256(content + b"}").hexdigest()
    for whole in (content, content + f', "sha256": "{digest}"}}'.encode()):
        (tmp_path / "state.json").write_bytes(whole)
        assert not loads(lambda: read_state(tmp_path))


def rewritten(path: Path, changed: Callable[[Any], None]) -> bytes:
    """A safetensors file with its header changed, and the rest as it was."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def noise(data: st.DataObject, content: bytes, among: int) -> bytes:
    """A few of the first `among` bytes changed, or the end cut off."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, among - 1))] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.sampled_from([len(changed), random.randrange(len(changed))]))])


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_changed_rank_file_loads_or_is_refused(data: st.DataObject, checkpoint: Path) -> None:
    folder = checkpoint.parent / "rank"
    folder.mkdir(exist_ok=True)
    state = json.loads((checkpoint / "state.json").read_text())
    for file in state["files"]:
        source = checkpoint / file["name"]
        change_it = data.draw(st.sampled_from([lambda header: change(header, data), lambda header: None]))
        content = rewritten(source, change_it)
        (folder / file["name"]).write_bytes(noise(data, content, 400))
        file |= digest(folder / file["name"])
    (folder / "state.json").write_text(manifest.seal(state))
    loads(lambda: read_everything(interop.open_weights(folder)))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_changed_export_loads_or_is_refused(data: st.DataObject, exported: Path) -> None:
    def changed(header: dict) -> None:
        about = json.loads(header["__metadata__"]["jepa"])
        for _ in range(data.draw(st.integers(0, 2))):
            section, key = data.draw(st.sampled_from(KEYS)).split(".")
            about["config"][section][key] = data.draw(VALUES)
        if data.draw(st.booleans()):
            change(about, data)
        header["__metadata__"]["jepa"] = json.dumps(about)
        if data.draw(st.booleans()):
            change(header, data)

    path = exported.parent / "changed.safetensors"
    content = rewritten(exported, changed)
    path.write_bytes(noise(data, content, 400) if data.draw(st.booleans()) else content)
    loads(lambda: load_encoder(path))


@pytest.mark.parametrize(
    "change",
    ["meta.depth=1024", "meta.embed_dim=65536", "meta.mlp_ratio=64", "meta.model_name=vit_giant", "mask.patch_size=2"],
)
def test_a_file_that_claims_a_large_model_is_refused(change: str, exported: Path, tmp_path: Path) -> None:
    def changed(header: dict) -> None:
        about = json.loads(header["__metadata__"]["jepa"])
        about["config"] = small_config(change, "meta.num_heads=4").model_dump(mode="json")
        header["__metadata__"]["jepa"] = json.dumps(about)

    (tmp_path / "x").write_bytes(rewritten(exported, changed))
    assert not loads(lambda: load_encoder(tmp_path / "x"))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_changed_pickle_loads_or_is_refused(data: st.DataObject, published: Path) -> None:
    path = published.parent / "changed.pth.tar"
    with zipfile.ZipFile(published) as source:
        members = {name: source.read(name) for name in source.namelist()}
    (pickled,) = [name for name in members if name.endswith("data.pkl")]
    members[pickled] = noise(data, members[pickled], data.draw(st.sampled_from([40, 400, len(members[pickled])])))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as target:
        for name, content in members.items():
            if data.draw(st.integers(0, 60)):  # else it is missing
                target.writestr(name, content)
    path.write_bytes(written.getvalue())
    loads(lambda: read_everything(interop.open_weights(path, CONFIG)))
    loads(lambda: start_from(path))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_changed_state_dict_loads_or_is_refused(data: st.DataObject, timm: Path) -> None:
    content = rewritten(timm, lambda header: change(header, data))
    path = timm.parent / "changed.timm"
    path.write_bytes(noise(data, content, 400) if data.draw(st.booleans()) else content)
    loads(lambda: start_from(path))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_changed_hugging_face_folder_loads_or_is_refused(data: st.DataObject, huggingface: Path) -> None:
    folder = huggingface.parent / "changed"
    folder.mkdir(exist_ok=True)
    about = json.loads((huggingface / "config.json").read_text())
    if data.draw(st.booleans()):
        change(about, data)
    text = json.dumps(about).encode()
    (folder / "config.json").write_bytes(noise(data, text, min(400, len(text))))
    few = data.draw(st.sampled_from([lambda header: None, lambda header: change(header, data)]))
    (folder / "model.safetensors").write_bytes(rewritten(huggingface / "model.safetensors", few))
    loads(lambda: start_from(folder))


def made(call: Callable, *args: object, state: object = None) -> object:
    """What a pickle stores as a call of `call` and, if there is a state, as setting it."""
    return type("Made", (), {"__reduce__": lambda self: (call, args, state) if state else (call, args)})()


def test_a_pickle_with_code_in_it_does_not_run(published: Path, tmp_path: Path) -> None:
    attack, marker = made(os.mkdir, str(tmp_path / "marker")), tmp_path / "marker"
    weights = torch.load(published, weights_only=False)["encoder"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "ijepa"}')
    for path, content in {
        tmp_path / "beside": {"encoder": weights, "loss": attack},
        tmp_path / "among": {"encoder": weights | {"x": attack}},
        tmp_path / "alone": attack,
        tmp_path / "folder" / "pytorch_model.bin": {"embeddings.mask_token": attack},
    }.items():
        torch.save(content, path)
        assert not loads(lambda path=path: start_from(path.parent if path.suffix == ".bin" else path))
        assert not marker.exists()
    torch.load(tmp_path / "beside", weights_only=False)
    assert marker.exists(), "the attack does not work"


def test_numpys_own_code_never_sees_a_file(published: Path, tmp_path: Path) -> None:
    """A dtype whose state calls its bytes pointers: numpy would follow them."""
    forged = made(np.dtype, "V8", False, True, state=(3, "|", None, None, None, 8, 1, 0x3F))
    content = torch.load(published, weights_only=False)
    content["loss"] = made(np.float64(1).__reduce__()[0], forged, b"\x01" * 8)
    torch.save(content, tmp_path / "forged")
    assert loads(lambda: start_from(tmp_path / "forged"))
    assert interop.unpickled(tmp_path / "forged")["loss"] is None


def test_a_tensor_larger_than_its_file_is_refused(published: Path, tmp_path: Path) -> None:
    """Positions of a huge grid from one stored row, by a stride of 0."""
    content = torch.load(published, weights_only=False)
    content["encoder"]["module.pos_embed"] = torch.zeros(1, 1, 24).expand(1, 1000**2, 24)
    torch.save(content, tmp_path / "large")
    assert (tmp_path / "large").stat().st_size < 2**20
    assert not loads(lambda: start_from(tmp_path / "large"))
