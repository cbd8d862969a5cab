"""The results of an evaluation: a table to read, and one JSON file with all that it depends on."""

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .job import Job, Result
from .papers import reported

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "jepa-kernels", "torchmetrics", "pycocotools")


def record(protocol: str, job: Job, result: Result, settings: dict[str, Any]) -> dict[str, Any]:
    """What is written: rows, the paper's figures, the model, the settings, versions, commit and date (UTC)."""
    config, size = job.config, job.config.vit
    rows = list(result.rows)
    if paper := reported(protocol, result.task, config):
        rows.append({"features": "paper", **paper})
    return {
        "protocol": protocol,
        "task": result.task,
        "rows": rows,
        "weights": job.weights,
        "model": {
            "objective": config.loss.objective,
            "name": config.meta.model_name,
            "width": size.embed_dim,
            "depth": size.depth,
            "patch_size": config.mask.patch_size,
            "crop_size": config.data.crop_size,
            "epochs": config.optimization.epochs,
            "digest": job.subjects[0].key,
        },
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "ranks": job.ranks.world_size,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` whole: a reader never sees half of it."""
    part = path.with_name(f".{path.name}.partial")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text; figures in percent with one decimal, a dash where a row has none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = [columns] + [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    lines = (
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in text
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.1f} %" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    where = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(where), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
