"""One table of all results below a folder: a row per model, a column per figure, in Markdown and as a picture.

    python engine/evaluate.py report eval

reads every result that evaluate.py wrote there, and writes report.md and report.png into the folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from jepa.pictures.tables import draw_table

from .results import unusual

# In the order of the papers' tables: classification, then low-level tasks, then dense ones.
WORDS = ("method", "model", "epochs", "weights")  # the first columns
ORDER = ("linear", "lowshot", "finetune", "knn", "clevr", "davis", "segment", "detect")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER")


def run(args: argparse.Namespace) -> str:
    """Writes both files and returns the table as text. Raises ValueError like `read`."""
    results = read(args.folder)
    header, rows = arranged(results)
    text = markdown(header, rows)
    (args.folder / "report.md").write_text(text)
    draw_table(header, rows, len(WORDS), args.folder / "report.png")
    return f"{text}\nwritten to {args.folder / 'report.md'} and {args.folder / 'report.png'}"


def read(folder: Path) -> list[dict[str, Any]]:
    """The results below `folder`, oldest first. Raises ValueError if there are none, or naming one that is broken."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        if path.stem.partition("-")[0] not in ORDER:
            continue
        try:
            content = json.loads(path.read_text())
            arranged([content])  # so that it has all that the table needs
            _ = content["date"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a result of evaluate.py ({type(error).__name__}: {error})") from error
        found.append(content)
    if not found:
        raise ValueError(
            f"{folder}: no results; looked for {', '.join(f'{name}*.json' for name in ORDER)} at any depth"
        )
    return sorted(found, key=lambda content: content["date"])


def arranged(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows. Of a model's results of a protocol, form and data set the last one counts. Rows: each
    model's encoder, then those it is compared with; a paper's figure stands beside the model's own."""
    columns: dict[tuple[str, str], None] = {}
    rows: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for protocol in ORDER:
        for result in results:
            if result["protocol"] != protocol:
                continue
            model = result["model"]
            shape = f"{model['name'].removeprefix('vit_')}/{model['patch_size']}, {model['crop_size']} px"
            what = " ".join(filter(None, (protocol, result["form"], result["task"] or result["data"])))
            paper: dict[str, Any] = next((row for row in result["rows"] if row["features"] == "paper"), {})
            for number, row in enumerate(result["rows"]):
                if row is paper:
                    continue
                weights = ", ".join([result["weights"], *unusual(result)])
                key = (
                    model["objective"],
                    shape,
                    "?" if model["epochs"] is None else str(model["epochs"]),
                    weights,
                    model["digest"],
                )
                if number:  # what a model is compared with is told apart by its shape alone
                    key = row["features"], shape if row["features"] != "pixels" else "", "", "", ""
                line = rows.setdefault(key, {})
                for figure, value in row.items():
                    if figure == "features":
                        continue
                    columns[what, figure] = None
                    beside = f" ({paper[figure]:.1f})" if number == 0 and figure in paper else ""
                    line[what, figure] = f"{value:.1f}{beside}"
    header = [*WORDS, *(f"{what}: {figure}" for what, figure in columns)]
    return header, [[*key[:4], *(line.get(column, "-") for column in columns)] for key, line in rows.items()]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(WORDS) + ["---:"] * (len(header) - len(WORDS)), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Percent; in brackets, what the paper reports.\n\n{table}\n"
