"""The loop that trains for a task: what it refuses, when it stops, and what it takes for finished."""

import argparse
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.probes import fit
from jepa.probes.drawing import draw
from jepa.probes.fingerprint import fingerprint
from jepa.probes.job import Job
from jepa.ranks.distributed import Ranks
from jepa.ranks.stop import StopRequest
from small import run_ranks, small_config


def job_in(folder: Path) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.HashStore(), dist.group.WORLD)
    return Job("weights", [], small_config(), ranks, folder)


def parsed(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    fit.arguments(parser, weight_decay=0.05, warmup=1500)
    for name, kind in (("steps", int), ("size", int), ("lr", float), ("epochs", float)):
        parser.add_argument(f"--{name}", type=kind, default=1)
    parser.add_argument("--scale", type=float, nargs=2, default=[0.1, 2.0])
    return parser.parse_args(["--workers", "0", *map(str, words)])


class Noise:
    """Sample i: a row of numbers and their sum."""

    def __init__(self, seed: int) -> None:
        self.rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return self.rows[i]


def loss_of(model: nn.Module, samples: list[Tensor]) -> Tensor:
    x = torch.stack(samples)
    return F.mse_loss(model(x)[:, 0], x.sum(1))


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1))


def train(job: Job, args: argparse.Namespace, files: str = "files", stop: StopRequest | None = None) -> nn.Module:
    model = model_of()
    fit.fit(job, job.out / "state.pt", "noise", model, Noise(3), loss_of, lambda done: 1 - done, args, files, stop)
    return model


@pytest.mark.parametrize(
    "words",
    ["--batch 0", "--save-every 0", "--size 0", "--steps -3", "--steps 0", "--workers -1", "--lr 0", "--lr nan",
     "--epochs 0", "--scale 0 2", "--warmup -1", "--drop-path 1", "--weight-decay inf", "--seed -1"],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_named(words: str) -> None:
    flag, value = words.split()[:2]
    with pytest.raises(ValueError, match=rf"^{flag} {value}: wanted") as caught:
        fit.check(parsed(*words.split()))
    assert "\n" not in str(caught.value)
    fit.check(parsed())


def test_a_short_training_warms_up_for_a_tenth_of_it() -> None:
    steps = random.randint(20, 14_000)
    assert fit.warmup(None, 1500, steps) == steps // 10 and fit.warmup(None, 1500, 160_000) == 1500
    assert fit.warmup(steps - 1, 1500, steps) == steps - 1 and fit.warmup(0, 1500, 1) == 0
    with pytest.raises(ValueError, match=rf"--warmup {steps}: wanted fewer than the {steps} steps"):
        fit.warmup(steps, 1500, steps)


def test_training_on_other_files_is_not_taken_for_this_one(one_rank: None, tmp_path: Path) -> None:
    job, args = job_in(tmp_path), parsed("--steps", 4, "--batch", 8, "--warmup", 1)
    done = train(job, args)
    torch.testing.assert_close(train(job, args).state_dict(), done.state_dict())
    with pytest.raises(ValueError, match=r"state.pt is of other settings \(files files, now others\); delete it"):
        train(job, args, "others")


def test_a_fingerprint_is_of_names_sizes_and_times_wherever_the_files_lie(one_rank: None, tmp_path: Path) -> None:
    job = job_in(tmp_path / "out")
    names = [f"{folder}/{i}.png" for folder in ("a", "b") for i in range(3)]
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(random.randbytes(20))

    def found(root: str) -> str:
        return fingerprint(job, [tmp_path / root / name for name in random.sample(names, len(names))])

    first = found("set")
    shutil.copytree(tmp_path / "set", tmp_path / "moved" / "to")  # with its times
    assert found("set") == found("moved/to") == first
    file = tmp_path / "set" / random.choice(names)
    content, status = file.read_bytes(), file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert found("set") != first
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert found("set") == first
    file.write_bytes(content + b"!")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert found("set") != first
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert found("set") == first
    file.rename(file.with_name("other.png"))
    assert found("set") != first  # missing


def test_a_signal_saves_and_the_same_command_goes_on(one_rank: None, tmp_path: Path, capsys) -> None:
    args = parsed("--steps", 9, "--batch", 8, "--warmup", 2)
    whole = train(job_in(tmp_path / "whole"), args)
    job, calls, number = job_in(tmp_path / "parts"), [], random.choice((signal.SIGTERM, signal.SIGUSR1))

    def signalled(model: nn.Module, samples: list[Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
            while not stop.reason:
                pass
        return loss_of(model, samples)

    model = model_of()
    with StopRequest(job.ranks) as stop, pytest.raises(SystemExit) as stopped:
        fit.fit(job, job.out / "state.pt", "noise", model, Noise(3), signalled, lambda t: 1 - t, args, "files", stop)
    assert stopped.value.code == 75 and len(calls) == 5  # asked for at the beginning of the next step
    assert torch.load(job.out / "state.pt", weights_only=True)["step"] == 5
    assert "noise: stopped after step 5 of 9; the same command goes on" in capsys.readouterr().err
    for name, value in train(job, args).state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_the_time_limit_stops_training_and_validation(one_rank: None, tmp_path: Path, capsys) -> None:
    job, args = job_in(tmp_path), parsed("--steps", 3, "--batch", 8, "--warmup", 0)
    with StopRequest(job.ranks, 1e-9) as stop:
        for step in (1, 2):
            with pytest.raises(SystemExit):
                train(job, args, stop=stop)
            assert torch.load(job.out / "state.pt", weights_only=True)["step"] == step
        train(job, args, stop=stop)  # the last step is the last
        seen = []
        with pytest.raises(SystemExit) as stopped:
            for key, _ in fit.shared_out(job, "noise", Noise(1), range(5), 0, stop):
                seen.append(key)
    assert stopped.value.code == 75 and seen == [0]
    assert "stopped in validation" in capsys.readouterr().err


def on_ranks(folder: Path) -> tuple[dict, dict, list]:
    job, args = job_in(folder), parsed("--steps", 5, "--batch", 8, "--warmup", 0, "--lr", 0.01)
    model = train(job, args)
    shares = list(fit.shared_out(job, "noise", Noise(3), range(7), 0))
    return model.state_dict(), torch.load(folder / "state.pt", weights_only=True)["model"], shares


@pytest.mark.ranks
def test_all_ranks_judge_what_is_saved(tmp_path: Path, capfd) -> None:
    """Batch norm's statistics, too, which on CPUs are of a rank's own images."""
    first, second = run_ranks(2, on_ranks, tmp_path / "two")
    assert "0.num_batches_tracked" in first[1] and first[1]["0.num_batches_tracked"] == 5
    for found in (first, second):
        for name, value in first[1].items():
            assert torch.equal(found[0][name], value), name
    assert capfd.readouterr().err.count("batch norm is of each rank's images") == 1
    assert [key for key, _ in first[2]] == [0, 2, 4, 6] and [key for key, _ in second[2]] == [1, 3, 5]
    assert all(torch.equal(sample, Noise(3)[key]) for key, sample in first[2] + second[2])


def test_a_picture_that_cannot_be_drawn_is_a_line(one_rank: None, tmp_path: Path, capsys) -> None:
    job, drawn = job_in(tmp_path), []
    draw(job, tmp_path / "a.png", lambda: drawn.append(1))
    assert drawn == [1] and capsys.readouterr().err == ""
    draw(job, tmp_path / "a.png", lambda: (tmp_path / "nowhere" / "b.png").read_bytes())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'a.png'} could not be drawn (FileNotFoundError: ") and "nowhere/b.png" in line
