"""Paths and overrides are what was typed: `~` and variables expanded, and nothing else read into them."""

import os
import random
import string
from pathlib import Path

import pytest

from jepa.config.file import load_config, parse_config
from jepa.config.schema import Config, ConfigError
from jepa.config.words import command_line
from small import MAPPING, small_config

PATHS = (
    "data.root_path", "data.image_folder", "logging.folder", "meta.init_from", "meta.read_checkpoint",
    "eval.train_path", "eval.val_path",
)  # fmt: skip
TEXTS = (*PATHS, "logging.write_tag", "logging.wandb")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    return tmp_path


@pytest.mark.parametrize("key", PATHS)
def test_home_and_variables_are_expanded_in_every_path(key: str, home: Path) -> None:
    section, name = key.split(".")
    for typed, wanted in {
        "~": home, "~/x": home / "x", "$DISK/x": home / "disk/x", "a/${DISK}/$HOME/b": f"a/{home}/disk/{home}/b",
        "x~/~": "x~/~", "5$": "5$", "cost$5": "cost$5",
    }.items():  # fmt: skip
        assert small_config(f"{key}={typed}")[key] == str(wanted)
        assert parse_config({**MAPPING, section: {**MAPPING.get(section, {}), name: typed}})[key] == str(wanted)


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("unknown", ["$NOT_SET_HERE", "${NOT_SET_HERE}", "~nobody_of_that_name"])
def test_what_cannot_be_expanded_is_refused_where_it_is_used(
    key: str, unknown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    probing = ["eval.train_path=a", "eval.val_path=b", "eval.every=1"]
    with pytest.raises(ConfigError) as caught:
        small_config(*probing, f"{key}={unknown}/x")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key} = ") and unknown.strip("~") in problem and f"give {key}=<path>" in problem
    if key.startswith("data."):
        assert small_config("data.synthetic=64", f"{key}={unknown}/x")[key] == f"{unknown}/x"


AWKWARD = (
    "photos #2", "*.tar", "{a,b}.tar", "train-{000..146}.tar", "a=b", "a: b", "[a]", "&x", "!y", "- z", "5", "1e-3",
    "true", "no", "2024-01-01", "0x10", "@a", "`a`", "%a", "a, b", "?", "|", ">", "läufe", "a'b", '"', "a\\n",
    " a", "a ", "#",
)  # fmt: skip


@pytest.mark.parametrize("key", TEXTS)
def test_a_text_is_taken_as_it_is_typed(key: str) -> None:
    made = ["".join(random.choices(string.printable[:95].replace("$", ""), k=9)) for _ in range(50)]
    for text in (*AWKWARD, *(f"x{word}" for word in made)):
        assert small_config(f"{key}={text}")[key] == text


def test_quotes_and_null_are_yaml_s() -> None:
    assert small_config("logging.wandb='5 # 6'")["logging.wandb"] == "5 # 6"
    assert small_config('logging.write_tag="a\\tb"')["logging.write_tag"] == "a\tb"
    assert small_config("logging.wandb=null")["logging.wandb"] is None
    assert small_config("logging.folder=null")["logging.folder"] == "null"  # it cannot be unset
    assert small_config("logging.folder = runs/a")["logging.folder"] == "runs/a"


def test_lists_and_numbers_still_parse() -> None:
    rate, size = random.random(), random.randint(1, 99)
    config = small_config(f"optimization.lr={rate:e}", f"loss.projector=[{size}, 8]", "data.mean=[.1, 2e-1, 0.3]")
    assert config["optimization.lr"] == float(f"{rate:e}") and config["loss.projector"] == (size, 8)
    assert config["data.mean"] == (0.1, 0.2, 0.3)
    assert small_config("engine.compile=false", "engine.precision=null")["engine.precision"] is None
    with pytest.raises(ConfigError, match=r"engine.attention = '\*x': must be"):
        small_config("engine.attention=*x")


def test_a_base_is_found_by_a_variable(home: Path) -> None:
    (home / "disk").mkdir()
    (home / "disk/base.yaml").write_text("engine: {seed: 7}\n")
    (home / "a.yaml").write_text("base: $DISK/base.yaml\n")
    with pytest.raises(ConfigError) as caught:
        load_config(home / "a.yaml")
    assert all("is missing" in problem for problem in caught.value.problems)  # the base was read


def test_the_words_of_a_command_line(home: Path) -> None:
    given = [
        "knn",
        "~/w",
        "--out=$DISK/o",
        "--store",
        "${DISK}/s",
        "--only",
        "data.root_path=~/x",
        "-x",
        "*.tar",
        "a=$b",
    ]
    wanted = ["knn", f"{home}/w", f"--out={home}/disk/o", "--store", f"{home}/disk/s", "--only", "data.root_path=~/x"]
    with pytest.raises(ValueError, match=r"a=\$b: \$b is not set"):
        command_line(given)
    assert command_line(given[:-1]) == [*wanted, "-x", "*.tar"]


@pytest.mark.parametrize(
    "added", [["--local-rank=1"], ["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "1"]]
)
def test_what_launchers_add_is_left_out(added: list[str]) -> None:
    words = ["--config", "a.yaml", "data.batch_size=1"]
    at = random.choice([0, 2, 3])
    assert command_line([*words[:at], *added, *words[at:]]) == words


def test_a_checkpoint_is_looked_for_in_the_runs_folder_and_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    config: Config = small_config("logging.folder=runs/lr=1")
    assert config.checkpoint("latest") == "latest" and config.checkpoint("auto") == "auto"
    assert config.checkpoint("jepa-ep1") == "runs/lr=1/jepa-ep1"  # named so if there is none
    assert config.checkpoint("runs/lr=1/jepa-ep1") == "runs/lr=1/jepa-ep1"
    for here in ("jepa-ep2", "runs/lr=1/jepa-ep2", "runs/lr=1/old/jepa-ep3"):
        os.makedirs(here)
        assert config.checkpoint(here) == here
    assert config.checkpoint("jepa-ep2") == "runs/lr=1/jepa-ep2" and config.checkpoint("./jepa-ep2") == "jepa-ep2"
    assert config.checkpoint("old/jepa-ep3") == "runs/lr=1/old/jepa-ep3"
    os.rmdir("runs/lr=1/jepa-ep2")
    assert config.checkpoint("jepa-ep2") == "jepa-ep2"
