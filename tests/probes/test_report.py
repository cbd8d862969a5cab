"""The table of several models' results."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jepa.probes import report
from jepa.probes.report import arranged, read
from probing import options


def result(
    protocol: str,
    digest: str,
    rows: list[dict],
    *,
    day: int = 1,
    task: str | None = None,
    settings: dict | None = None,
    **model: Any,
) -> dict:
    about = {"objective": "cjepa", "name": "vit_base", "patch_size": 16, "crop_size": 224, "epochs": 100}
    content: dict[str, Any] = {"protocol": protocol, "task": task, "data": "photos", "form": "", "rows": rows}
    content |= {"weights": f"runs/{digest}", "settings": settings or {}}
    return content | {"model": {**about, "digest": digest, **model}, "date": f"2026-01-{day:02}T00:00:00+00:00"}


def write(folder: Path, content: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['protocol']}.json"
    path.write_text(json.dumps(content))
    return path


def test_two_models_are_one_table_and_the_newest_result_counts(tmp_path: Path) -> None:
    a, b, other, untrained, pixels = (round(random.uniform(10, 90), 3) for _ in range(5))
    beside = [{"features": "untrained encoder", "class": untrained}, {"features": "pixels", "class": pixels}]
    paper, old = {"features": "paper", "class": 73.7}, {"features": "target encoder", "class": 1.0}
    ours = {"features": "target encoder", "class": a}
    write(tmp_path / "z/old", result("linear", "a", [old, *beside], task="ImageNet"))
    write(tmp_path / "a", result("linear", "a", [ours, *beside, paper], task="ImageNet", day=3))
    write(tmp_path / "y/old", result("linear", "a", [old, *beside], task="ImageNet", day=2))
    write(
        tmp_path / "b",
        result("linear", "b", [{"features": "encoder", "class": b}], day=4, objective="lejepa", epochs=7),
    )
    write(tmp_path / "c", result("clevr", "a", [{"features": "target encoder", "count": other, "distance": 1.25}]))
    write(tmp_path / "d", {"protocol": "notes"})  # not ours
    said = report.run(options(report, tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert text in said and str(tmp_path / "report.png") in said
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header = ["method", "model", "epochs", "weights", "linear ImageNet: class", "linear photos: class"]
    header += ["clevr photos: count", "clevr photos: distance"]
    assert table[0] == header
    shape, none = "base/16, 224 px", "-"
    rows = {tuple(row) for row in table[2:]}
    assert rows == {
        ("cjepa", shape, "100", "runs/a", f"{a:.1f} (73.7)", none, f"{other:.1f}", "1.2"),
        ("lejepa", shape, "7", "runs/b", none, f"{b:.1f}", none, none),
        ("untrained encoder", shape, "", "", f"{untrained:.1f}", none, none, none),
        ("pixels", "", "", "", f"{pixels:.1f}", none, none, none),
    }
    picture = np.asarray(Image.open(tmp_path / "report.png").convert("L"))
    ink = picture < 128
    assert 0.005 < ink.mean() < 0.5 and picture.max() > 240
    lines = np.diff(ink.any(1).astype(int), prepend=0) == 1
    assert lines.sum() >= 5, "a line of the header and four rows"


def test_models_of_other_weights_have_rows_of_their_own(tmp_path: Path) -> None:
    for digest in ("a", "b"):
        write(tmp_path / digest, result("knn", digest, [{"features": "encoder", "class": 50.0}]))
    _, rows = arranged(read(tmp_path))
    assert rows == [["cjepa", "base/16, 224 px", "100", f"runs/{digest}", "50.0"] for digest in ("a", "b")]


def test_other_data_and_forms_have_columns_of_their_own(tmp_path: Path) -> None:
    for number, changed in enumerate(
        ({}, {"data": "flowers"}, {"form": "paper"}, {"data": "flowers", "form": "paper"})
    ):
        row = {"features": "encoder", "class": 50.0 + number}
        write(tmp_path / str(number), result("linear", "a", [row], day=number + 1) | changed)
    header, rows = arranged(read(tmp_path))
    wanted = ["linear photos", "linear flowers", "linear paper photos", "linear paper flowers"]
    assert header[4:] == [f"{name}: class" for name in wanted] and rows[0][4:] == ["50.0", "51.0", "52.0", "53.0"]


GOOD = result("knn", "a", [{"features": "encoder", "class": 50.0}])


@pytest.mark.parametrize(
    "content",
    [
        "", json.dumps(GOOD)[:100], "[]", "3", "{}", json.dumps(GOOD | {"rows": 3}), json.dumps(GOOD | {"rows": [3]}),
        json.dumps({key: value for key, value in GOOD.items() if key != "date"}),
        json.dumps(GOOD | {"model": {"digest": "a"}}), json.dumps(GOOD | {"model": None}),
        json.dumps(GOOD | {"rows": [{"features": "encoder", "class": "high"}]}),
        json.dumps({key: value for key, value in GOOD.items() if key != "task"}),
    ],
)  # fmt: skip
def test_a_broken_result_is_named(tmp_path: Path, content: str) -> None:
    write(tmp_path / "good", GOOD)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/knn.json").write_text(content)
    with pytest.raises(ValueError, match=r"bad/knn\.json is not a result of evaluate\.py") as caught:
        report.run(options(report, tmp_path))
    assert "\n" not in str(caught.value) and not (tmp_path / "report.md").exists()


def test_a_folder_without_results_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no results; looked for linear\*\.json, .*knn\*\.json.* at any depth"):
        report.run(options(report, tmp_path))


def test_encoders_of_the_same_weights_have_rows_of_their_own() -> None:
    parts = {"target_encoder": "fp32", "encoder": "bf16"}
    found = {part: round(random.uniform(10, 90), 1) for part in parts}
    results = [
        result("knn", "a", [{"features": part, "class": found[part]}], settings={"part": part, "precision": precision})
        for part, precision in parts.items()
    ]
    _, rows = arranged(results)
    assert [row[3:] for row in rows] == [
        ["runs/a", str(found["target_encoder"])],
        ["runs/a, encoder, bf16", str(found["encoder"])],
    ]
