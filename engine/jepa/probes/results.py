"""The results of an evaluation: a table to read, and one JSON file with all that it depends on."""

import json
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .job import Job, Result
from .papers import reported

FORMS = ("form", "head", "labels", "thousand", "preset")  # of a protocol, named whatever they are
# Options that make no other figure, or are told elsewhere.
ASIDE = {
    *("config", "out", "only", "device", "store", "encoder_batch", "workers", "save_every", "max_minutes"),
    *("checkpointing", "suffixes", "data", "images", "train", "val", "part", "precision", "label", "k"),
}
PARTS = ("train", "val", "valid", "validation", "test", "images")
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "jepa-kernels", "torchmetrics", "pycocotools")


def record(
    protocol: str, job: Job, result: Result, settings: dict[str, Any], defaults: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What is written: rows, the paper's figures, the model, the settings, versions, commit and date (UTC).
    `defaults`: of the settings; what differs from them is told in the form."""
    config, size = job.config, job.config.vit
    rows = list(result.rows)
    if paper := reported(protocol, result.task, config, job.epochs):
        rows.append({"features": "paper", **paper})
    return {
        "protocol": protocol,
        "task": result.task,
        "data": data_of(settings),
        "form": form_of(settings, settings if defaults is None else defaults),
        "rows": rows,
        "weights": job.weights,
        "model": {
            "objective": config.loss.objective,
            "name": config.meta.model_name,
            "width": size.embed_dim,
            "depth": size.depth,
            "patch_size": config.mask.patch_size,
            "crop_size": config.data.crop_size,
            "epochs": job.epochs,
            "digest": job.subjects[0].key.partition("-")[0],
        },
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "ranks": job.ranks.world_size,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def file_name(content: dict[str, Any]) -> str:
    """PROTOCOL-FORM-DATA.json: results of other data, in another form or of another encoder of the same weights do not
    replace one another."""
    parts = [content[key] for key in ("protocol", "form", "data") if content[key]]
    for name in ("label", "k"):  # their figures have names of their own
        if given := content["settings"].get(name):
            parts += [name, *map(str, given)]
    parts += unusual(content)
    return re.sub(r"[^\w.%]+", "-", "-".join(parts)) + ".json"


def unusual(content: dict[str, Any]) -> list[str]:
    """What tells encoders with the same weights apart: --part and --precision, where they are not the usual ones."""
    given = content["settings"].get("part"), content["settings"].get("precision")
    return [value for value, usual in zip(given, ("target_encoder", "fp32"), strict=True) if value not in (None, usual)]


def form_of(settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    """What tells figures of one protocol and data set apart; a preset only where something is fine-tuned."""
    tuned = settings.get("form") in (None, "finetune")
    given = {name: settings[name] for name in FORMS if settings.get(name) and (tuned or name != "preset")}
    words = [name if value is True else str(value) for name, value in given.items()]
    for name, value in settings.items():
        if name not in (*FORMS, *ASIDE) and value != defaults.get(name):
            words.append(f"{name} " + (" ".join(map(_short, value)) if isinstance(value, list) else _short(value)))
    return "-".join(words)


def _short(value: object) -> str:
    return Path(value).name if isinstance(value, Path) else f"{value:g}" if isinstance(value, float) else str(value)


def data_of(settings: dict[str, Any]) -> str:
    """A data set's name: that of its folder, without what only names a part of it."""
    path = Path(str(settings.get("val") or settings.get("data") or settings.get("images", [""])[0])).absolute()
    names = [part for part in path.parts if part not in PARTS]
    return Path(names[-1]).stem if path.suffix in (".txt", ".tar") else names[-1]


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
