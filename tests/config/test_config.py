"""Configs: what loads, what is rejected and with which message, and that DeepSpeed reads the config made for it."""

import random
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa.config.file import SECTIONS, load_config, parse_config, to_yaml
from jepa.config.read import read
from jepa.config.schema import Config, ConfigError
from jepa.data.augment import View
from jepa.train.zero import deepspeed_config
from small import KEYS

CONFIGS = Path(__file__).parents[2] / "engine/configs"
SHIPPED = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "base")
PATHS = ["data.root_path=/images", "logging.folder=/runs"]

# The values of the four published configs that differ between them.
PUBLISHED = {
    "in1k_vith14_ep300": ("vit_huge", 12, 14, 224, 128, 300, 40),
    "in1k_vith16-448_ep300": ("vit_huge", 12, 16, 448, 16, 300, 40),
    "in22k_vitg16_ep44": ("vit_giant", 16, 16, 224, 16, 44, 3),
    "in22k_vith14_ep66": ("vit_huge", 12, 14, 224, 32, 66, 3),
}


def published_yaml(name: str) -> str:
    model, pred_depth, patch, crop, batch, epochs, warmup = PUBLISHED[name]
    return f"""
data: {{batch_size: {batch}, color_jitter_strength: 0.0, crop_scale: [0.3, 1.0], crop_size: {crop},
  image_folder: imagenet_full_size/061417/, num_workers: 10, pin_mem: true, root_path: $replace_this_with_a_path,
  use_color_distortion: false, use_gaussian_blur: false, use_horizontal_flip: false}}
logging: {{folder: $replace_this_with_a_path/run/, write_tag: jepa}}
mask: {{allow_overlap: false, aspect_ratio: [0.75, 1.5], enc_mask_scale: [0.85, 1.0], min_keep: 10,
  num_enc_masks: 1, num_pred_masks: 4, patch_size: {patch}, pred_mask_scale: [0.15, 0.2]}}
meta: {{copy_data: false, load_checkpoint: false, model_name: {model}, pred_depth: {pred_depth}, pred_emb_dim: 384,
  read_checkpoint: null, use_bfloat16: true}}
optimization: {{ema: [0.996, 1.0], epochs: {epochs}, final_lr: 1.0e-06, final_weight_decay: 0.4, ipe_scale: 1.0,
  lr: 0.001, start_lr: 0.0002, warmup: {warmup}, weight_decay: 0.04}}
"""


def small(**changes: Any) -> dict[str, dict[str, Any]]:
    """A valid mapping, changed by `section__key=value`."""
    mapping: dict[str, dict[str, Any]] = {
        "meta": {"model_name": "vit_tiny"},
        "data": {"root_path": "images", "batch_size": 8, "crop_size": 64},
        "mask": {"patch_size": 8, "min_keep": 4},
        "optimization": {"epochs": 3, "warmup": 1},
        "logging": {"folder": "runs/x"},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        mapping.setdefault(section, {})[key] = value
    return mapping


def flat(mapping: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, body in mapping.items() for key, value in body.items()}


def problems(load: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load()
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return list(caught.value.problems)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_load_once_their_paths_are_given(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(published_yaml(name))
    refused = problems(lambda: load_config(path))
    assert sorted(line.split(" = ")[0] for line in refused) == ["data.root_path", "logging.folder"]

    config = load_config(path, PATHS)
    _, _, patch, crop, batch, *_ = PUBLISHED[name]
    assert config.grid * patch == crop
    assert config.batch(2048 // batch) == (batch, 1, 2048)
    assert config.precision == "bf16" and config.loss.objective == "ijepa"
    for section, body in yaml.safe_load(published_yaml(name)).items():
        for key, value in body.items():
            if f"{section}.{key}" not in ("data.root_path", "logging.folder"):
                assert getattr(getattr(config, section), key) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("published", "shipped"),
    [(name, f"{name}_ijepa") for name in PUBLISHED if name != "in22k_vith14_ep66"],
)
def test_shipped_recipes_are_the_published_ones(published: str, shipped: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(published_yaml(published))
    theirs = load_config(tmp_path / "config.yaml", PATHS).model_dump()
    ours = load_config(
        CONFIGS / f"{shipped}.yaml", [*PATHS, "data.image_folder=imagenet_full_size/061417/"]
    ).model_dump()
    theirs["engine"]["global_batch_size"] = 2048
    theirs["logging"]["checkpoint_freq"] = ours["logging"]["checkpoint_freq"]
    assert ours == theirs


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_resolve_to_complete_ones(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert path.stem.endswith(config.loss.objective) or path.stem == "demo"

    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    others = [key for key in KEYS if not key.startswith("loss.")]
    own = [f"loss.{key}" for key in type(config.loss).model_fields]
    assert sorted(flat(yaml.safe_load(to_yaml(config)))) == sorted(others + own)
    assert load_config(again) == config == parse_config(config.model_dump(mode="json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recipes_say_only_what_their_base_does_not(path: Path) -> None:
    own = yaml.safe_load(path.read_text())
    said = flat(read(path.with_name(own.pop("base"))).mapping)
    assert not [key for key, value in flat(own).items() if key in said and said[key] == value]


def test_the_base_explains_every_key_with_its_default(tmp_path: Path) -> None:
    text = (CONFIGS / "base.yaml").read_text()
    commented = re.findall(r"^  # (\w+): ", text, re.M)
    keys = [key for key in KEYS if not key.startswith("loss.")]
    required = [key for key in keys if SECTIONS[key.split(".")[0]].model_fields[key.split(".")[1]].is_required()]
    assert sorted(commented) == sorted(key.split(".")[1] for key in required)
    assert set(flat(yaml.safe_load(text))) == set(keys) - set(required)

    mapping = small(data__root_path=None, data__synthetic=10, mask__min_keep=10, optimization__warmup=40)
    mapping["optimization"]["epochs"] = 50
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"base": str(CONFIGS / "base.yaml"), **mapping}))
    assert load_config(tmp_path / "config.yaml") == parse_config(mapping)

    refused = problems(lambda: load_config(CONFIGS / "base.yaml", ["data.synthetic=10"]))
    assert sorted(refused) == sorted(f"{key}: is missing and has no default" for key in required)


def test_the_papers_recipe_explains_every_key_of_its_loss() -> None:
    path = CONFIGS / "in1k_vitb16_ep600_cjepa.yaml"
    assert set(yaml.safe_load(path.read_text())["loss"]) == set(load_config(path).loss.model_dump())
    for other in SHIPPED:
        if (loss := load_config(other).loss).objective == "cjepa":
            assert loss == load_config(path).loss


def test_twins_differ_in_the_objective_alone() -> None:
    twins = [path for path in SHIPPED if path.stem.endswith("_cjepa")]
    assert len(twins) == 4
    for path in twins:
        twin = path.with_name(path.name.replace("cjepa", "ijepa"))
        folder = f"logging.folder={load_config(path).logging.folder}"
        assert load_config(twin, ["loss.objective=cjepa", folder]) == load_config(path)


def test_overrides_take_yaml_and_the_last_one_wins() -> None:
    overrides = ["optimization.lr=1e-3", "optimization.lr=5E-4", "engine.max_steps=1e5", "data.image_folder="]
    overrides += [
        "loss.objective=cjepa",
        "loss.projector=[32, 64]",
        "engine.global_batch_size=null",
        "mask.allow_overlap=true",
        "meta.depth=2",
    ]
    mapping = small(data__image_folder="below", engine__global_batch_size=64)
    before = yaml.safe_dump(mapping)
    config = parse_config(mapping, overrides)
    assert config.optimization.lr == 5e-4 and config.engine.max_steps == 100_000 and config.data.image_folder == ""
    assert config.engine.global_batch_size is None and config.mask.allow_overlap
    assert config["loss.projector"] == (32, 64) and config.vit.depth == 2 and config.vit.embed_dim == 192
    assert yaml.safe_dump(mapping) == before


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(small()) + "loss: {objective: cjepa, beta_vicreg: 1e-3, beta_sim: '2.5e1'}\nengine:\n"
    )
    config = load_config(path)
    assert (config["loss.beta_vicreg"], config["loss.beta_sim"]) == (1e-3, 25.0)


@settings(deadline=None)
@given(st.data())
def test_a_misspelt_key_is_told_the_right_one(data: st.DataObject) -> None:
    known = data.draw(st.sampled_from([key for key in KEYS if len(key.partition(".")[2]) > 4]))
    section, _, key = known.partition(".")
    at = data.draw(st.integers(0, len(key) - 1))
    wrong = data.draw(st.sampled_from([key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:], key.upper()]))
    if wrong in SECTIONS[section].model_fields:
        return
    place = data.draw(st.sampled_from([section, section[1:], section + "s"]))
    expected = [f"{place}.{wrong}: unknown key; the nearest known key is {known}"]
    assert problems(lambda: parse_config(small(), [f"{place}.{wrong}=1"])) == expected
    assert problems(lambda: parse_config({**small(), place: {**small().get(place, {}), wrong: 1}})) == expected
    assert problems(lambda: parse_config({**small(), "bsae": "a.yaml"})) == [
        "bsae: unknown key; the nearest known key is base"
    ]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([key for key in KEYS if sum(k.endswith(key[key.index(".") :]) for k in KEYS) == 1]))
def test_a_key_in_the_wrong_section_is_told_the_right_one(known: str) -> None:
    section, _, key = known.partition(".")
    for other in [name for name in SECTIONS if name != section]:
        assert problems(lambda: parse_config(small(), [f"{other}.{key}=1"]))[0].endswith(f" {known}")  # noqa: B023
    assert problems(lambda: parse_config({**small(), key: 1}))[0].endswith(f" {known}")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["mask.patch_size=7"], "mask.patch_size"),
        (["mask.patch_size=64"], "mask.patch_size"),
        (["data.crop_size=4096", "mask.patch_size=2"], "mask.patch_size"),
        (["mask.min_keep=49"], "mask.min_keep"),
        (["mask.num_pred_masks=40"], "mask.num_pred_masks"),
        (["mask.num_pred_masks=2000"], "mask.num_pred_masks"),
        (["mask.pred_mask_scale=[0.001, 0.002]"], "mask.pred_mask_scale"),
        (["mask.pred_mask_scale=[0.3, 0.2]"], "mask.pred_mask_scale"),
        (["meta.num_heads=7", "meta.pred_num_heads=3"], "meta.num_heads"),
        (["meta.embed_dim=90"], "meta.embed_dim"),
        (["meta.pred_emb_dim=90"], "meta.pred_emb_dim"),
        (["meta.pred_num_heads=5"], "meta.pred_num_heads"),
        (["meta.copy_data=true"], "meta.copy_data"),
        (["meta.model_name=vit_colossal"], "meta.model_name"),
        (["data.color_jitter_strength=2.6"], "data.color_jitter_strength"),
        (["data.std=[0.2, 0.2, 0]"], "data.std[2]"),
        (["data.decoder=gpu", "engine.device=cpu"], "data.decoder"),
        (["data.decoder=gpu", "engine.deterministic=true"], "data.decoder"),
        (["data.root_path=null"], "data.root_path"),
        (["data.synthetic=0"], "data.synthetic"),
        (["data.batch_size=true"], "data.batch_size"),
        (["data.batch_size=0"], "data.batch_size"),
        (["optimization.epochs=2.5"], "optimization.epochs"),
        (["optimization.warmup=3.5"], "optimization.warmup"),
        (["optimization.lr=.nan"], "optimization.lr"),
        (["optimization.betas=[0.9, 1]"], "optimization.betas[1]"),
        (["engine.zero_stage=4"], "engine.zero_stage"),
        (["engine.zero_stage=0", "engine.optimizer=apex", "meta.use_bfloat16=true"], "engine.optimizer"),
        (["engine.global_batch_size=12"], "engine.global_batch_size"),
        (["engine.global_batch_size=40", "engine.gradient_accumulation_steps=2"], "engine.global_batch_size"),
        (["loss.objective=cjepa", "mask.num_pred_masks=1"], "mask.num_pred_masks"),
        (["loss.objective=cjepa", "loss.projector=[]"], "loss.projector"),
        (["eval.every=5"], "eval.every"),
        (["logging.write_tag="], "logging.write_tag"),
    ],
)
def test_what_cannot_run_is_refused(overrides: list[str], key: str) -> None:
    (problem,) = problems(lambda: parse_config(small(), overrides))
    assert problem.startswith(f"{key} = ")


@pytest.mark.parametrize("published", [True, False])
def test_engine_precision_wins_over_the_published_key(published: bool) -> None:
    mapping = small(meta__use_bfloat16=published)
    for precision in ("bf16", "fp32"):
        config = parse_config(mapping, [f"engine.precision={precision}"])
        assert config.precision == precision and config.dtype.itemsize == {"bf16": 2, "fp32": 4}[precision]
        assert deepspeed_config(config, 1, 1000)["bf16"]["enabled"] == (precision == "bf16")
    assert parse_config(mapping, ["engine.precision=null"]).precision == ("bf16" if published else "fp32")


def test_every_problem_is_reported_at_once() -> None:
    mapping = small(mask__patch_size=7, optimization__leraning_rate=1, meta__num_heads=5)
    del mapping["logging"]["folder"]
    found = problems(lambda: parse_config(mapping, ["engine.zero_stage=9", "nonsense", "data.mean=[1", "optim.x=1"]))
    named = [
        "'nonsense'",
        "'data.mean=[1'",
        "optimization.leraning_rate",
        "optim.x",
        "logging.folder",
        "engine.zero_stage",
    ]
    assert sorted(line.split(":")[0].split(" = ")[0] for line in found) == sorted(named)

    mapping["logging"]["folder"] = "runs"
    found = problems(lambda: parse_config(mapping))
    assert len(found) == 4 and {"mask.patch_size = 7", "meta.num_heads = 5"} < {line.split(":")[0] for line in found}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "word",
        "data: [unclosed",
        "data: {a: 1, a: 2}",
        "\x00",
        "a: !!bool x",
        "a: 2024-13-45",
        "a: &b [*b]",
        "? [1]\n: 2",
        "a: !!python/object:os.system x",
        "[" * 5000,
        "meta:\n  depth: 1\nmeta:\n  depth: 2",
    ],
)
def test_a_file_that_is_no_config(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x80\x81")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary.yaml", "nul\0"):
        with pytest.raises(ConfigError):
            load_config(path)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.just(10**400),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["1e-3", "cjepa", "packed", "$replace_this", "vit_base", "bf16", "1e400"]),
)
junk = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(scalars | st.sampled_from([*SECTIONS]), inner, max_size=4)
    ),
    max_leaves=8,
)
names = st.one_of(st.sampled_from(KEYS), st.text(max_size=12))


def only_config_errors(load: Callable[[], Config]) -> None:
    try:
        config = load()
        deepspeed_config(config, 3, 1000)
    except ConfigError as error:
        assert error.problems and str(error)


@settings(deadline=None, max_examples=150)
@given(junk, st.lists(st.tuples(names, junk), max_size=4))
def test_junk_is_a_config_or_a_config_error(mapping: Any, values: list[tuple[str, Any]]) -> None:
    only_config_errors(lambda: parse_config(mapping))
    only_config_errors(lambda: parse_config({section: mapping for section in SECTIONS}))
    changed = small()
    for name, value in values:
        section, _, key = name.partition(".")
        changed.setdefault(section, {})[key] = value
    only_config_errors(lambda: parse_config(changed))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(max_size=12) | st.builds("{}={}".format, names, st.text(max_size=12)), max_size=4))
def test_junk_overrides_are_config_errors(overrides: list[str]) -> None:
    only_config_errors(lambda: parse_config(small(), overrides))


YAML_BITS = [
    "data:", "data: ", "\n  ", "\n", "root_path", "batch_size", "meta", ": ", "- ", "[", "]", "{", "}", "&a ", "*a",
    "base: ", "config.yaml", "<<: *a", "!!float ", "!!int ", "!!binary ", "!!timestamp ", "!!set ", "!!omap ",
    "!!python/name:os.system ", "!!python/object/apply:os.getcwd []", "~", "1_0", "0x" + "f" * 5000, "9" * 5000,
    "1:59:59", ".inf", "2024-13-45", '"\\uD800"', "'", "? ", "| ", "%YAML 9.9\n", "---", "...", "\t", "#",
]  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(YAML_BITS) | st.text(max_size=5), max_size=12).map("".join), st.sampled_from(SHIPPED))
def test_text_is_a_config_or_a_config_error(text: str, path: Path) -> None:
    """As a whole file, anywhere in a complete config or a recipe, and as the value of any key."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(CONFIGS, folder, dirs_exist_ok=True)
    whole = random.choice([path.read_text(), to_yaml(load_config(path))])
    at = random.randrange(len(whole))
    for content in (text, whole[:at] + text + whole[at:], whole[:at] + text):
        (folder / "config.yaml").write_text(content, errors="surrogatepass")
        only_config_errors(lambda: load_config(folder / "config.yaml", PATHS))
    only_config_errors(lambda: load_config(path, [*PATHS, f"{random.choice(KEYS)}={text}"]))
    shutil.rmtree(folder)


def nested(line: str, levels: int) -> str:
    """Each line refers to the previous one several times: fully expanded, it would not fit into memory."""
    first = "x0: &a0 {k: 1}\n"
    return first + "".join(f"x{i + 1}: &a{i + 1} " + line.format(",".join([f"*a{i}"] * 9)) for i in range(levels))


@pytest.mark.parametrize(
    "text",
    [
        nested("[{}]\n", 30) + "data: {root_path: *a30, batch_size: *a30}\nmeta: *a30",
        nested("{{<<: [{}]}}\n", 30),
        "data:\n" + "".join(f" k{i}: 1\n" for i in range(9000)),
        f"data: {{{'k' * 10**5}: 1}}",
        "#" * 2**20,
    ],
    ids=["lists of lists", "merges of merges", "many keys", "a long key", "a large file"],
)
def test_small_files_do_not_fill_time_or_memory(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml", [f"data.root_path={text[:999]}"])
    assert len(str(caught.value)) < 20_000


# --- the batch


@settings(deadline=None)
@given(
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 12),
    steps=st.none() | st.integers(1, 6),
    wanted=st.integers(1, 600),
)
def test_the_batch_multiplies_out_or_the_error_says_how(
    batch_size: int, world_size: int, steps: int | None, wanted: int
) -> None:
    mapping = small(data__batch_size=batch_size, engine__gradient_accumulation_steps=steps)
    assert parse_config(mapping).batch(world_size) == (batch_size, steps or 1, batch_size * (steps or 1) * world_size)

    mapping["engine"]["global_batch_size"] = wanted
    try:
        micro, accumulation, total = parse_config(mapping).batch(world_size)
    except ConfigError as error:
        assert wanted % (batch_size * world_size) or (steps and batch_size * world_size * steps != wanted)
        (problem,) = error.problems
        if "; give " in problem:
            for way in problem.split("; give ")[1].split(" or "):
                config = parse_config(mapping, [way])
                assert config.batch(world_size).global_batch == config.engine.global_batch_size
    else:
        assert (micro, total) == (batch_size, wanted) and micro * accumulation * world_size == total
        assert accumulation == (steps or accumulation)


def test_vicreg_needs_two_images() -> None:
    config = parse_config(small(data__batch_size=1, loss__objective="cjepa"))
    assert problems(lambda: config.batch(1))[0].startswith("data.batch_size = 1")
    assert config.batch(2).global_batch == 2
    assert parse_config(small(data__batch_size=1)).batch(1).global_batch == 1


class _Read(dict):
    """A dict that records which keys were looked up."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def __copy__(self) -> "_Read":
        return self


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("bf16", [True, False])
def test_deepspeed_reads_every_key(stage: int, bf16: bool) -> None:
    """Checked because DeepSpeed silently ignores unknown top-level keys."""
    from deepspeed.runtime.config import DeepSpeedConfig

    clip = None if stage % 2 else 0.5
    mapping = small(
        engine__zero_stage=stage, meta__use_bfloat16=bf16, optimization__clip_grad=clip, engine__global_batch_size=24
    )
    config = parse_config(mapping)
    given = _Read(deepspeed_config(config, 1, 1000))
    parsed = DeepSpeedConfig(given)
    assert given.read >= set(given)
    assert parsed.zero_config.stage == stage and parsed.bfloat16_config.enabled is bf16
    assert parsed.train_micro_batch_size_per_gpu == 8 and parsed.gradient_accumulation_steps == 3
    assert parsed.train_batch_size == 24 and parsed.gradient_clipping == (0 if config.gated else clip or 0)
    assert config.gated == (stage in (1, 2) or (stage == 0 and not bf16))
    assert not (stage and config.gated and parsed.zero_config.compute_grad_norm)
    assert stage == 0 or parsed.zero_config.reduce_bucket_size == 1000
    assert parsed.optimizer_name is None and parsed.scheduler_name is None and parsed.zero_allow_untested_optimizer


# --- the images' folder


def test_the_train_folder_is_taken_beside_val_and_is_a_class_elsewhere(tmp_path: Path) -> None:
    plain = parse_config(small(data__root_path=str(tmp_path), data__image_folder="images/"))
    (tmp_path / "images/class").mkdir(parents=True)
    assert plain.data.folder == tmp_path / "images"
    (tmp_path / "images/train").mkdir()
    assert plain.data.folder == tmp_path / "images"
    (tmp_path / "images/val").mkdir()
    assert plain.data.folder == tmp_path / "images/train"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], View(64, (0.3, 1.0))),
        (["use_horizontal_flip=true", "use_gaussian_blur=true"], View(64, (0.3, 1.0), flip=0.5, blur=0.5)),
        (["color_jitter_strength=0.5"], View(64, (0.3, 1.0))),
        (["use_color_distortion=true", "crop_scale=[0.2, 0.9]"], View(64, (0.2, 0.9), grey=0.2)),
        (
            ["use_color_distortion=true", "color_jitter_strength=0.5", "crop_size=32"],
            View(32, (0.3, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8, grey=0.2),
        ),
    ],
)
def test_the_published_keys_of_augmentation_make_a_view(given: list[str], wanted: View) -> None:
    assert parse_config(small(), [f"data.{one}" for one in given]).data.view == wanted


@pytest.mark.parametrize("name", ["lejepa", "simsiam", "vicreg"])
def test_the_published_keys_of_augmentation_hold_for_every_method(name: str) -> None:
    mapping = small() | {"loss": {"objective": name}}
    usual = parse_config(mapping)
    keys = ["data.use_gaussian_blur=true", "data.use_color_distortion=true", "data.color_jitter_strength=0.5"]
    config = parse_config(mapping, keys)
    for view, before in zip(config.method.views(config), usual.method.views(usual), strict=True):
        assert view == replace(before, blur=0.5, jitter=(0.4, 0.4, 0.4, 0.1))


def test_synthetic_images_need_no_path() -> None:
    for path in ("null", "$replace_this"):
        config = parse_config(small(), [f"data.root_path={path}", "data.synthetic=1e3"])
        assert config.data.synthetic == 1000


def test_deterministic_runs_decode_where_pixels_do_not_depend_on_the_batch() -> None:
    for decoder in ("auto", "cpu", "gpu"):
        assert parse_config(small(), [f"data.decoder={decoder}"]).decoder == decoder
        if decoder != "gpu":
            assert parse_config(small(), [f"data.decoder={decoder}", "engine.deterministic=true"]).decoder == "cpu"


def test_the_checkpoint_to_read_is_a_path_or_a_name_in_the_runs_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    for name, wanted in {
        None: "latest", "jepa-ep3": "runs/x/jepa-ep3", "./jepa-ep3": "jepa-ep3", "/runs/y/jepa-ep3": "/runs/y/jepa-ep3",
        "other/jepa-ep3": "other/jepa-ep3", "~/jepa-ep3": "/home/x/jepa-ep3", "auto": "auto",
    }.items():  # fmt: skip
        assert parse_config(small(meta__read_checkpoint=name)).resumed == wanted, name
