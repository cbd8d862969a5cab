"""The curves of a run: a panel for each quantity in its log."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .style import PALETTE, SCALE, STYLE, UNIT, write


class Panel(NamedTuple):
    """Log keys drawn together, with the label of each line; a single line needs none.

    `noisy`: drawn pale behind a running mean.
    """

    title: str
    lines: dict[str, str]
    noisy: bool = False


TIMES = Panel(
    "Step time (ms)", {"step_ms": "all", "data_wait_ms": "waiting for images", "cpu_ms": "of processors"}, noisy=True
)
LOSS = Panel("Loss", {"loss": ""}, noisy=True)
OTHERS = (
    Panel("Teacher distance", {"teacher_distance": ""}),
    Panel("Accuracy of probes (%)", {"knn": "k-NN", "linear": "linear"}),
    Panel("Gradient norm", {"grad_norm": ""}, noisy=True),
    Panel("Learning rate", {"lr": ""}),
    Panel("Weight decay", {"weight_decay": ""}),
    Panel("Teacher momentum", {"momentum": ""}),
    Panel("Images per second", {"images_per_second": ""}, noisy=True),
    TIMES,
    Panel("Context tokens", {"context_tokens": ""}, noisy=True),
)
HEALTH = {"std": "Relative std of features", "rank": "Effective rank of features", "cov": "Correlation of features"}
UNSEEN = ("step", "epoch", "bad_images", "skipped")  # and what is not a number
PERCENT = ("knn", "linear")  # logged as fractions


def panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The panels of a log: its loss and the terms of its method, the health of its method's features, and the rest."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    health = []
    for kind, title in HEALTH.items():
        names = [key.removesuffix(f"_{kind}") for key in keys if key.endswith(f"_{kind}")]
        health.append(Panel(title, {f"{name}_{kind}": name for name in names}))
    known = {*UNSEEN, *(key for panel in (LOSS, *health, *OTHERS) for key in panel.lines)}
    terms = [key for key in keys if key not in known and _adds(rows, key)]
    return [LOSS, *(Panel(f"Loss term {key!r}", {key: ""}, noisy=True) for key in terms), *health, *OTHERS]


def _adds(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether a term is neither always zero nor the loss itself."""
    values = [(row[key], row.get("loss")) for row in rows if row.get(key) is not None]
    same = all(value == loss or (value != value and loss != loss) for value, loss in values)
    return not same and any(value for value, _ in values)


def training_curves(log_path: str | Path, out_path: str | Path) -> Figure:
    """Plots a run's JSONL log over the steps, one panel for each quantity that it holds.

    Raises ValueError for a log without numbers and, naming the line, for one that is not JSONL; a truncated last line
    is still being written and is left out; and for a file that cannot be read.
    """
    rows = _read_log(Path(log_path))
    drawn = []
    for panel in panels(rows):
        series = {key: values for key in panel.lines if (values := _series(rows, key)) is not None}
        if series:
            drawn.append((panel, series))
    if not drawn:
        raise ValueError(f"log: {log_path} holds no logged step; wanted a run's .jsonl after at least one step")

    columns = min(4, len(drawn) if len(drawn) < 4 else math.ceil(len(drawn) / math.ceil(len(drawn) / 4)))
    lines = math.ceil(len(drawn) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * columns, 1.9 * lines + 0.2), dpi=UNIT * SCALE)
        figure.set_layout_engine("constrained", hspace=0.06, wspace=0.04)
        first, last = rows[0]["step"], rows[-1]["step"]
        side = 0.02 * (last - first) or 1  # so that the first and last markers are not cut in half
        for place, (panel, series) in enumerate(drawn):
            axes = figure.add_subplot(lines, columns, place + 1)
            _draw_panel(axes, panel, series)
            axes.set_xlim(first - side, last + side)
            if place + columns >= len(drawn):
                axes.set_xlabel("step")
        return write(figure, out_path)


def _read_log(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--log: {path} cannot be read ({error}); wanted the .jsonl in a run's folder") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with a step")
            rows.append(row)
        except ValueError as error:
            if number < len(lines) or not rows:
                raise ValueError(f"log: line {number} of {path} is not a logged step ({error})") from error
    return rows


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps, values) of the rows that have `key`, NaN if not finite; None if there is nothing to plot."""
    pairs = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    values = np.array([value for _, value in pairs], float) * (100 if key in PERCENT else 1)
    values[~np.isfinite(values)] = np.nan
    return None if np.isnan(values).all() else (np.array([step for step, _ in pairs]), values)


def _draw_panel(axes: Any, panel: Panel, series: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for color, (key, name) in zip(PALETTE, panel.lines.items(), strict=False):
        if key not in series:
            continue
        steps, values = series[key]
        reach = min(len(values) // 80, 50) if panel.noisy else 0
        if reach:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            steps, values = _running_mean(steps, values, reach)
        marker = "o" if len(values) < 30 else None
        axes.plot(steps, values, color=color, label=name, marker=marker, markersize=3)
    axes.set_title(panel.title)
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.locator_params(axis="y", nbins=5)
    if panel is TIMES:  # a first step that compiles would dwarf all others
        highest = max(min(3 * np.nanmedian(values), 1.08 * np.nanmax(values)) for _, values in series.values())
        axes.set_ylim(0, highest or 1)
    if len(series) > 1:
        axes.legend(loc="best", handlelength=1.2, borderaxespad=0.2)


def _running_mean(steps: np.ndarray, values: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """The interquartile mean of each finite value and its `reach` neighbours on either side; and the steps.

    So a single stall or spike does not spread. The series is mirrored at its ends.
    """
    good = np.isfinite(values)
    padded = np.pad(values[good], reach, mode="symmetric")
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)
    outer = (reach + 1) // 2
    return steps[good], windows[:, outer:-outer].mean(axis=1)
