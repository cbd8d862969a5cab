"""What tells one result from another: the names of their files and the forms of their columns."""

import itertools
import random
from pathlib import Path
from typing import Any

from jepa.probes.results import file_name, form_of

DEFAULTS: dict[str, Any] = {
    "form": "quick",
    "label": None,
    "k": None,
    "layers": 1,
    "part": "target_encoder",
    "precision": "fp32",
}
DEFAULTS |= {"labels": None, "list": None, "lr": [0.05, 0.01], "epochs": 50, "thousand": False, "out": None, "val": "v"}
OTHERS: dict[str, list[Any]] = {
    "form": ["paper"],
    "label": [["count"], ["shape"], ["count", "shape"]],
    "k": [[5], [5, 20]],
    "layers": [4],
    "part": ["encoder"],
    "precision": ["bf16"],
    "labels": ["1%", "10%"],
    "list": [Path("lists/a.txt"), Path("lists/b.txt")],
    "lr": [[0.1], [0.1, 0.2]],
    "epochs": [5],
    "thousand": [True],
}


def name_of(settings: dict[str, Any]) -> str:
    given = DEFAULTS | settings
    content = {"protocol": "linear", "data": "photos", "form": form_of(given, DEFAULTS), "settings": given}
    return file_name(content)


def test_settings_that_make_another_figure_make_another_file() -> None:
    assert name_of({}) == "linear-quick-photos.json"
    every = [{name: value} for name, values in OTHERS.items() for value in values]
    both = [one | other for one, other in itertools.combinations(random.sample(every, 9), 2)]
    names = [name_of(settings) for settings in [{}, *every, *(each for each in both if len(each) == 2)]]
    assert len(set(names)) >= len({str(sorted((DEFAULTS | s).items(), key=str)) for s in [{}, *every]})
    assert len(set(name_of(settings) for settings in [{}, *every])) == 1 + len(every)
    assert all(name == Path(name).name and " " not in name for name in names)
    assert name_of({"thousand": True}) == "linear-quick-thousand-photos.json"
    assert name_of({"label": ["count"], "part": "encoder"}) == "linear-quick-photos-label-count-encoder.json"


def test_where_it_is_written_makes_no_other_figure() -> None:
    assert name_of({"out": Path("elsewhere")}) == name_of({})
    assert form_of(DEFAULTS | {"lr": [0.1], "epochs": 5}, DEFAULTS) == "quick-lr 0.1-epochs 5"
