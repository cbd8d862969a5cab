"""The probes of a run under way: the same on any ranks, and those of the probes by themselves."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jepa.data.sources import open_images
from jepa.probes import linear, online
from jepa.probes.knn import knn
from jepa.probes.linear import linear_probe
from jepa.probes.online import OnlineProbe, evenly
from probing import alone, config_of, pixels_of, write_shades
from small import run_ranks

CPU = torch.device("cpu")


def probed(train: Path, val: Path, *words: str) -> tuple[dict[str, float], int]:
    """A rank's accuracies with mean colours of patches as features, and how many images it saw."""
    overrides = "eval.every=1", f"eval.train_path={train}", f"eval.val_path={val}", "eval.knn_k=3", *words
    probe, seen = OnlineProbe(config_of(*overrides), dist.get_rank(), dist.get_world_size(), CPU), []

    def colours(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images.flatten(1, 2).double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "STEPS", 50)
        return probe(colours), sum(seen)


@pytest.mark.ranks
def test_ranks_share_a_probe_however_few_its_images(tmp_path: Path) -> None:
    """Five readable images of six, and one of two, on two ranks: the same result as on one."""
    write_shades(tmp_path, {"train": 3, "val": 1})
    for split in ("train", "val"):
        (tmp_path / split / "dark/0.png").write_bytes(b"not an image")
    with alone():
        found, images = probed(tmp_path / "train", tmp_path / "val")
    assert images == 5 + 1 and found.keys() == {"knn", "linear"}
    together = run_ranks(2, probed, tmp_path / "train", tmp_path / "val")
    assert [accuracies for accuracies, _ in together] == [found] * 2 and sum(seen for _, seen in together) == images


def test_it_is_the_probes_on_the_features_of_the_images_chosen(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some images are in the wrong class, so that the accuracy depends on which are chosen."""
    write_shades(tmp_path, {"train": 10, "val": 9})
    for split in ("train", "val"):
        for i in (1, 2, 5):
            (tmp_path / split / f"dark/{i}.png").rename(tmp_path / split / f"light/{90 + i}.png")
    sets = []
    for split in ("train", "val"):
        source = open_images(tmp_path / split)
        chosen = evenly(len(source), 15)
        x = pixels_of([source.files[i] for i in chosen]).reshape(15, -1, 3).mean(1)
        sets += [torch.from_numpy(x).float(), torch.from_numpy(source.labels[chosen])]
    found, seen = probed(tmp_path / "train", tmp_path / "val", "eval.max_images=15")
    monkeypatch.setattr(linear, "STEPS", 50)
    assert seen == 30 and found == {"knn": knn(*sets, k=3), "linear": linear_probe(*sets)}
    assert 0.4 < found["knn"] < 1


def test_mistakes_are_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shades(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "val/light").rename(tmp_path / "val/bright")
    config = config_of("eval.every=1", f"eval.train_path={tmp_path / 'train'}", f"eval.val_path={tmp_path / 'val'}")
    with pytest.raises(ValueError, match=r"'class': 1 of 3 classes are in .*train and not in"):
        OnlineProbe(config, 0, 1, CPU)

    def missing() -> None:
        raise ValueError("no DALI here")

    monkeypatch.setattr(online, "dali", missing)
    with pytest.raises(ValueError, match="no DALI here"):
        OnlineProbe(config, 0, 1, CPU)


def test_evenly_spreads_without_repeats() -> None:
    for total in (1, 7, 100, 101):
        for wanted in (None, 1, 7, 100, 500):
            chosen = evenly(total, wanted)
            assert len(set(chosen.tolist())) == len(chosen) == min(total, wanted or total)
            assert chosen.min() >= 0 and chosen.max() < total
            if len(chosen) > 1:
                assert chosen[0] == 0 and chosen[-1] == total - 1
                assert max(abs(chosen[1:] - chosen[:-1] - (total - 1) / (len(chosen) - 1))) <= 1
