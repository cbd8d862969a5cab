"""Killed, damaged and moved runs, as a short form of tests/support/soak.py; and disks that fail to write."""

import errno
import os
import random
import re
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from jepa.state import lock
from jepa.state.checkpoint import tidy
from jepa.state.restore import candidates, read_state, verify
from processes import start, write_images
from small import run_ranks
from soak import campaign, killed, moved, resume_damaged, soak_config

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return soak_config(tmp_path_factory.mktemp("crash"))


def seed() -> int:
    return int(torch.randint(2**31, ()))


def test_a_run_that_is_killed_and_whose_files_are_damaged_ends_as_if_nothing_had_been(
    config: Path, tmp_path: Path
) -> None:
    rng = random.Random(seed())
    words = campaign(rng)
    counts = killed(tmp_path, config, 3, words, rng)
    assert counts.pop("kills") == 3 and counts.pop("writing") <= 3 and set(counts.values()) == {0}, (words, counts)
    counts = run_ranks(1, resume_damaged, tmp_path, config, words, 25, seed())[0]
    assert counts.pop("damaged") >= 25 and set(counts.values()) == {0}, (words, counts)


@pytest.mark.parametrize(
    ("source", "target", "precision"),
    [((2, 1), (1, 3), "fp32"), ((1, 3), (2, 0), "fp32"), ((2, 2), (1, 1), "bf16")],
)
def test_the_next_ten_losses_do_not_depend_on_the_ranks(
    source: tuple[int, int], target: tuple[int, int], precision: str, config: Path, tmp_path: Path
) -> None:
    counts = moved(tmp_path, config, precision, (source,), (target,))
    assert counts["pairs"] == 1 and counts["beyond"] == 0, counts


def files_stay_small(rank: int) -> None:
    """The second rank cannot write a file of more than 30 kB: a real error of a real write."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_disk_that_is_full_on_one_rank_stops_all_and_harms_nothing(config: Path, tmp_path: Path) -> None:
    words = ("--config", config, "logging.save_every=2")
    assert start(2, tmp_path / "run", *words, "engine.max_steps=4").wait() == [0, 0]
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    run = start(2, tmp_path / "run", *words, "engine.max_steps=8", "--resume", fault=files_stay_small)
    assert run.wait() == [1, 1]
    for rank in (0, 1):
        assert re.search(r"the checkpoint \S+step00000006 could not be written \(rank 1: .*\)", run.text(rank))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    run = start(2, tmp_path / "run", *words, "engine.max_steps=8", "--resume")
    assert run.wait() == [0, 0] and "at step 4\n" in run.text()


def test_a_folder_that_cannot_be_written_is_said_before_the_first_step(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = start(2, tmp_path / "unused", "--config", config, f"logging.folder={tmp_path / 'file' / 'run'}")
    assert run.wait() == [1, 1]
    assert all(re.search(r"rank \d: logging.folder \S+ cannot be used", run.text(r)) for r in (0, 1))


def listing_fails(rank: int) -> None:
    """The run's folder exists, but cannot be listed."""
    scandir = os.scandir

    def bad_scandir(path: object = ".") -> object:
        if str(path).endswith("/run"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    os.scandir = bad_scandir


def test_auto_does_not_begin_anew_where_it_cannot_see_what_there_is(config: Path, tmp_path: Path) -> None:
    folder, words = tmp_path / "run", ("--config", config, "logging.save_every=2", "--resume", "auto")
    assert start(1, folder, *words, "engine.max_steps=2").wait() == [0]
    run = start(1, folder, *words, "engine.max_steps=4", fault=listing_fails)
    assert run.wait() == [1] and re.search(r"/run cannot be used: .*Input/output error", run.text())
    run = start(1, folder, *words, "engine.max_steps=4")
    assert run.wait() == [0] and "at step 2\n" in run.text()
    run = start(1, tmp_path / "unmounted", *words, f"logging.folder={tmp_path}/unmounted/deep/run")
    assert run.wait() == [1] and "unmounted/deep does not exist: mount it" in run.text()
    assert not (tmp_path / "unmounted").exists()


def test_a_second_run_in_the_same_folder_is_refused_and_harms_nothing(config: Path, tmp_path: Path) -> None:
    folder, words = tmp_path / "run", ("--config", config, "logging.save_every=1", "optimization.epochs=400")
    first = start(1, folder, *words)
    first.wait_for("saved ")
    (tmp_path / "second").mkdir()
    second = start(1, tmp_path / "second", *words, f"logging.folder={folder}", "--resume", "auto")
    assert second.wait() == [1]
    assert re.search(
        rf"another run is using the folder: process {first.ranks[0].pid} on \S+, lock renewed \d+ s ago", second.text()
    )
    first.signal(signal.SIGTERM)
    assert first.wait() == [75]
    third = start(1, folder, *words, "engine.max_steps=1", "--resume")
    assert third.wait() == [0] and "took over" not in third.text()


def folders_of_their_own(rank: int) -> None:
    lock.NETWORK_DELAYS = (0,)
    folder = Path(tempfile.mkdtemp())
    (folder / "run").mkdir()
    os.chdir(folder)


def test_ranks_that_share_no_folder_say_so_before_they_train(config: Path, tmp_path: Path) -> None:
    run = start(2, tmp_path / "run", "--config", config, "logging.folder=run", fault=folders_of_their_own)
    assert run.wait() == [1, 1]
    for rank in (0, 1):
        assert re.search(r"rank 1: on \S+ run/.jepa.lock, .* all machines must share logging.folder", run.text(rank))
        assert "step" not in run.text(rank)


def images_of_their_own(rank: int) -> None:
    """In the second rank's copy one file has a different name."""
    os.chdir(write_images(Path(tempfile.mkdtemp()), 12))
    if rank == 1:
        os.rename("class0/02.jpg", "class0/02b.jpg")


def test_ranks_that_find_other_images_and_runs_that_go_on_with_others_are_stopped(config: Path, tmp_path: Path) -> None:
    words = ("--config", config, "data.root_path=.", "engine.max_steps=1")
    run = start(2, tmp_path / "run", *words, fault=images_of_their_own)
    assert run.wait() == [1, 1]
    for rank in (0, 1):
        assert re.search(r"ranks differ: rank 1 on \S+ has images 12, list of images \w+; most have", run.text(rank))
    images = write_images(tmp_path / "images", 12)
    words = ("--config", config, "--resume", "auto", f"data.root_path={images}")
    assert start(1, tmp_path / "run", *words, "engine.max_steps=1").wait() == [0]
    images = images.rename(tmp_path / "moved")  # the same images elsewhere
    words = (*words[:-1], f"data.root_path={images}")
    assert start(1, tmp_path / "run", *words, "engine.max_steps=2").wait() == [0]
    (images / "class0/00.jpg").unlink()
    run = start(1, tmp_path / "run", *words, "engine.max_steps=3")
    assert run.wait() == [1] and "images 12, this run has 11, list of images" in run.text()
    run = start(1, tmp_path / "run", *words, "engine.max_steps=3", "--accept-changes")
    assert run.wait() == [0] and "at step 2\n" in run.text()


def a_killed_compiler_left_its_lock(rank: int) -> None:
    folder = Path(tempfile.mkdtemp()) / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / "lock").touch()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder.parent)


def test_a_lock_of_a_killed_process_holds_up_no_run(config: Path, tmp_path: Path) -> None:
    run = start(1, tmp_path / "run", "--config", config, "engine.max_steps=1", fault=a_killed_compiler_left_its_lock)
    assert run.wait(seconds=60) == [0]


def make_checkpoint(path: Path, content: str) -> None:
    path.mkdir()
    (path / "content").write_text(content)


def test_what_a_kill_leaves_is_cleared_up(tmp_path: Path) -> None:
    """Between the two renames of a replacement, no checkpoint has the final name, but the old one is still there."""
    make_checkpoint(tmp_path / ".jepa-step00000007.old", "the old one")
    make_checkpoint(tmp_path / ".jepa-step00000007.partial", "the new one")
    make_checkpoint(tmp_path / ".jepa-ep3.old", "replaced")
    make_checkpoint(tmp_path / "jepa-ep3", "whole")
    make_checkpoint(tmp_path / ".jepa-step00000002.deleted", "half deleted")
    make_checkpoint(tmp_path / ".jepa-step00000002.deleted-2", "half deleted, too")
    make_checkpoint(tmp_path / ".jepa-big-step00000002.partial", "another run's")
    (tmp_path / ".jepa-latest.partial").symlink_to("nowhere")
    tidy(tmp_path, "jepa")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".jepa-big-step00000002.partial", "jepa-ep3", "jepa-step00000007",
    ]  # fmt: skip
    assert (tmp_path / "jepa-step00000007/content").read_text() == "the old one"
    assert (tmp_path / "jepa-ep3/content").read_text() == "whole"


def test_steps_taken_again_are_not_mixed_with_those_given_up(config: Path, tmp_path: Path) -> None:
    """Resumed from an older checkpoint, a run keeps its own newest ones; the later ones are set aside, intact."""
    folder, words = tmp_path / "run", ("--config", config, "logging.save_every=1", "logging.keep_last=2")
    assert start(2, folder, *words, "engine.max_steps=6", "logging.keep_last=9").wait() == [0, 0]
    run = start(2, folder, *words, "engine.max_steps=3", "--resume", folder / "jepa-step00000002")
    assert run.wait() == [0, 0]
    assert [path.name for _, path in candidates(folder, "jepa", 5)] == ["jepa-step00000003", "jepa-step00000002"]
    for step in (3, 4, 5, 6):
        aside = folder / f"jepa-step0000000{step}.aside"
        state = read_state(aside)
        verify(aside, state["files"])
        assert state["step"] == step
