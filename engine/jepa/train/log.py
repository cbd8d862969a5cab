"""The log of a run.

Files in `logging.folder`: `{tag}.jsonl`, one object per logged step; `{tag}_r0.csv`, one row per step with the
published code's columns. TensorBoard and Weights & Biases get the same numbers if enabled.
"""

import contextlib
import hashlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from jepa.config.schema import Config

from .rows import Rows

CSV_COLUMNS = ("epoch", "itr", "loss", "mask-A", "mask-B", "time (ms)")

SECONDS_BETWEEN_LINES = 30.0
SHOWN = ("knn", "linear", "images_per_second", "data_wait_ms", "lr")  # and the loss with its terms


def require_loggers(config: Config) -> None:
    """Raises ValueError if a program that the config logs to cannot be imported; the first rank calls it, early."""
    wanted = {
        "logging.tensorboard": ("torch.utils.tensorboard", "SummaryWriter", "tensorboard"),
        "logging.wandb": ("wandb", "init", "wandb"),
    }
    for key, (module, name, package) in wanted.items():
        try:
            if config[key]:
                getattr(importlib.import_module(module), name)
        # Also what a package that does not fit another one raises.
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{key} needs {package} ({reason}): pip install {package}, or leave it out") from error


class RunLog:
    """Every rank logs each step; the first rank writes.

    Losses and times stay on the device until `flush`, so a step waits for nothing. `first_step`: where the run begins;
    rows from there on, written before an interruption, are moved out of the files.
    """

    def __init__(
        self,
        config: Config,
        first_step: int,
        last_step: int,
        steps_per_epoch: int,
        global_batch: int,
        device: torch.device,
    ) -> None:
        self.steps_per_epoch, self.global_batch, self.last_step = steps_per_epoch, global_batch, last_step
        self.terms = ("loss", *config.method.terms)
        self.on_gpu = device.type == "cuda"
        self.pending: list[tuple[int, Tensor, int, int, Any, float, int]] = []
        self.writes = dist.get_rank() == 0
        self.last_line = 0.0
        if self.writes:
            folder, tag = Path(config.logging.folder), config.logging.write_tag
            folder.mkdir(parents=True, exist_ok=True)
            header = ",".join(CSV_COLUMNS) + "\n"
            _set_aside(folder / f"{tag}.jsonl", lambda line: json.loads(line)["step"], first_step)
            _set_aside(folder / f"{tag}_r0.csv", self._step_of, first_step, header)
            self.jsonl, self.csv = Rows(folder / f"{tag}.jsonl", self.say), Rows(folder / f"{tag}_r0.csv", self.say)
            self.closing = contextlib.ExitStack()
            self.writers = _optional_writers(config, folder, first_step, self.closing)
        quiet = not (self.writes and sys.stderr.isatty())
        self.bar = tqdm(initial=first_step, total=last_step, unit="step", disable=quiet, dynamic_ncols=True)
        self.restart_clock()

    def _step_of(self, row: str) -> int:
        epoch, iteration, *rest = row.split(",")
        if len(rest) != len(CSV_COLUMNS) - 2:
            raise ValueError(f"not a row of {len(CSV_COLUMNS)} columns: {row}")
        return (int(epoch) - 1) * self.steps_per_epoch + int(iteration)

    def restart_clock(self) -> None:
        """Excludes the time since the last step (a checkpoint, an evaluation) from the rates."""
        self.last_mark, self.last_processor = self._mark(), time.process_time()

    def step(
        self,
        step: int,
        losses: list[Tensor],
        context_tokens: int,
        target_tokens: int,
        data_wait: float,
        bad_images: int = 0,
    ) -> None:
        """Records a step: its micro-batches' losses and terms on the device, the kept tokens, the seconds spent waiting
        for images, and how many of this rank's images replace unusable ones."""
        terms = torch.stack(losses).mean(0)
        self.pending.append((step, terms, context_tokens, target_tokens, self._mark(), data_wait, bad_images))
        self.bar.update()

    def flush(self, skipped: Mapping[int, dict[str, Any]] | None = None, **more: Any) -> None:
        """Reads the recorded losses, averages them over the ranks and writes them: to the CSV a row per step, to the
        JSONL a row for the last step, with `more`, and one for each step in `skipped`, with its details."""
        if not self.pending:
            return
        steps, terms, contexts, targets, marks, waits, bad = zip(*self.pending, strict=True)
        self.pending, skipped = [], skipped or {}
        table = torch.stack(terms)
        table = torch.cat([table, table.new_tensor(bad)[:, None]], 1)
        dist.all_reduce(table)
        bad_images = round(sum(table[:, -1].tolist()))
        values = (table[:, :-1] / dist.get_world_size()).tolist()
        seconds = [self._seconds(*span) for span in pairwise((self.last_mark, *marks))]
        processor, now = self.last_processor, time.process_time()
        self.last_mark, self.last_processor = marks[-1], now
        if not self.writes:
            return
        rows = {}
        for step, value, context, target, second in zip(steps, values, contexts, targets, seconds, strict=True):
            epoch, iteration = divmod(step, self.steps_per_epoch)
            self.csv.write(f"{epoch + 1},{iteration},{value[0]:.5f},{context},{target},{1000 * second:.0f}\n")
            terms_of = dict(zip(self.terms, value, strict=True))
            rows[step] = {"step": step, "epoch": step / self.steps_per_epoch, **terms_of, **skipped.get(step, {})}
        rows[steps[-1]] |= {
            "images_per_second": self.global_batch * len(steps) / sum(seconds),
            "step_ms": 1000 * sum(seconds) / len(steps),
            "data_wait_ms": 1000 * sum(waits) / len(steps),
            "cpu_ms": 1000 * (now - processor) / len(steps),
            "context_tokens": contexts[-1] or None,
            "bad_images": bad_images,
            **more,
        }
        rows[steps[-1]] = {key: value for key, value in rows[steps[-1]].items() if value is not None}
        for step in steps:
            if step in skipped or step == steps[-1]:
                self._write(rows[step])

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def _seconds(self, start: Any, end: Any) -> float:
        """Between two marks that the device has passed."""
        return start.elapsed_time(end) / 1000 if self.on_gpu else end - start

    def _write(self, row: dict[str, Any]) -> None:
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.jsonl.write(json.dumps(row) + "\n")
        for write in [*self.writers]:
            try:
                write(row)
            except OSError as error:  # the JSONL has it all
                self.writers.remove(write)
                self.say(f"TensorBoard or Weights & Biases gets no more rows: {error}; training goes on")
        line = {k: f"{row[k]:.3g}" for k in (*self.terms, *SHOWN) if row.get(k) is not None}
        self.bar.set_postfix(line, refresh=False)
        now, done = time.monotonic(), row["step"] + 1
        if self.bar.disable and (now - self.last_line > SECONDS_BETWEEN_LINES or done == self.last_step):
            self.last_line = now
            print(f"step {done}/{self.last_step}  " + "  ".join(f"{k} {v}" for k, v in line.items()), flush=True)

    def say(self, message: str) -> None:
        """Prints a message on the first rank without breaking the progress bar."""
        if self.writes:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self.flush()
        self.bar.close()
        if self.writes:
            self.jsonl.close()
            self.csv.close()
            try:
                self.closing.close()
            except OSError as error:
                self.say(f"TensorBoard or Weights & Biases may lack the last rows: {error}")


def _set_aside(path: Path, step_of: Callable[[str], int], first_step: int, header: str = "") -> None:
    """Leaves a log its rows of the steps before `first_step`.

    Rows of later steps, which are repeated, are moved to the end of a file of the same name plus `.aside`, and so are
    unreadable ones, such as the last row if the run was killed while writing it.
    """

    def keep(line: str) -> bool:
        try:
            return line.endswith("\n") and step_of(line) < first_step
        except (ValueError, KeyError, TypeError):
            return False

    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    kept: list[str] = []
    later: list[str] = []
    for line in lines:
        (kept if keep(line) else later).append(line)
    if later := [line for line in later if line != header]:
        with path.with_name(f"{path.name}.aside").open("a") as aside:
            aside.writelines(later)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join([header, *kept]))
    os.replace(partial, path)


def _optional_writers(
    config: Config, folder: Path, first_step: int, closing: contextlib.ExitStack
) -> list[Callable[[dict[str, Any]], None]]:
    writers: list[Callable[[dict[str, Any]], None]] = []
    if config.logging.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        closing.callback(board.close)

        def to_board(row: dict[str, Any]) -> None:
            for key, value in row.items():
                if isinstance(value, int | float):
                    board.add_scalar(key, value, row["step"])

        writers.append(to_board)
    if config.logging.wandb:
        import wandb

        run = wandb.init(
            project=config.logging.wandb,
            name=config.logging.write_tag,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            id=hashlib.sha256(str(folder.resolve() / config.logging.write_tag).encode()).hexdigest()[:16],
            resume="allow",  # continue the run of this folder and tag
        )
        closing.callback(run.finish)
        writers.append(lambda row: run.log(row, step=row["step"]))
    return writers
