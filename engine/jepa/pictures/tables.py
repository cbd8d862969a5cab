"""A table as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from .style import FAINT, INK, STYLE, write

HEIGHT, LETTER, SPACE = 0.28, 0.085, 0.3  # inches: of a line, a letter, and between columns
WRAP = 14  # letters of a line of the header


def draw_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int, out_path: str | Path) -> Figure:
    """Writes header [C] and rows [R, C] as a PNG: columns of words, then of figures, the highest of each bold.

    A figure may be followed by another in brackets.
    """
    heads = [_wrapped(cell) for cell in header]
    columns = [[*head, *(row[c] for row in rows)] for c, head in enumerate(heads)]
    widths = [LETTER * max(map(len, column)) + SPACE for column in columns]
    tall = max(map(len, heads))
    width, height = sum(widths) + SPACE, HEIGHT * (len(rows) + tall + 0.8)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=200)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        x, line = SPACE, HEIGHT * (tall + 0.4)
        axes.plot([SPACE / 2, width - SPACE / 2], [line, line], color=INK, linewidth=0.8)
        for c, head in enumerate(heads):
            right = c >= words
            at = x + widths[c] - SPACE if right else x
            align: Any = {"ha": "right" if right else "left", "va": "center"}
            for i, text in enumerate(head, start=tall - len(head)):
                axes.text(at, HEIGHT * (i + 0.7), text, fontsize=9, **align)
            values = [_value(row[c]) if right else None for row in rows]
            best = max((value for value in values if value is not None), default=None)
            for r, row in enumerate(rows):
                bold = "bold" if values[r] is not None and values[r] == best and len(rows) > 1 else "normal"
                axes.text(at, line + HEIGHT * (r + 0.6), row[c], fontsize=10, fontweight=bold, **align)
            x += widths[c]
        for r in range(1, len(rows)):
            y = line + HEIGHT * (r + 0.1)
            axes.plot([SPACE / 2, width - SPACE / 2], [y, y], color=FAINT, linewidth=0.5)
        return write(figure, out_path)


def _wrapped(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= WRAP:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _value(cell: str) -> float | None:
    try:
        return float(cell.split()[0])
    except (ValueError, IndexError):
        return None
