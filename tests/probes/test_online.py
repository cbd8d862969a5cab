"""The probes of a run under way: the same on any ranks, and those of the probes by themselves."""

from pathlib import Path

import pytest
import torch

from jepa.data.sources import open_images
from jepa.probes import linear, online
from jepa.probes.knn import knn
from jepa.probes.linear import linear_probe
from jepa.probes.online import OnlineProbe, evenly
from probing import alone, config_of, pixels_of, ranks_up, write_shades
from small import run_ranks

Found = tuple[dict[str, float], int, list[torch.Tensor]]


def probed(train: Path, val: Path, *words: str) -> Found:
    """A rank's accuracies with every fourth pixel as features, how many images it saw, and what was classified."""
    overrides = "eval.every=1", f"eval.train_path={train}", f"eval.val_path={val}", "eval.knn_k=3", *words
    probe, seen = OnlineProbe(config_of(*overrides), ranks_up()), []
    given: list[torch.Tensor] = []

    def pixels(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images[:, ::4, ::4].flatten(1)[:, None].double()

    def classified(*sets: torch.Tensor) -> float:
        given.extend(sets)
        return linear_probe(*sets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "STEPS", 50)
        patch.setattr(online, "linear_probe", classified)
        return probe(pixels), sum(seen), given


def swap(root: Path, *numbers: int) -> None:
    """Puts some images into the wrong class, so that an accuracy depends on which images and in which order."""
    for split in ("train", "val"):
        for i in numbers:
            (root / split / f"dark/{i}.png").rename(root / split / f"light/{90 + i}.png")


def both(root: Path) -> list[Found]:
    return [probed(root / name / "train", root / name / "val") for name in ("many", "few")]


@pytest.mark.ranks
def test_ranks_share_a_probe_however_few_its_images(tmp_path: Path) -> None:
    """The same result as on one rank; of the second set one image of two can be read, so that one rank has none."""
    write_shades(tmp_path / "many", {"train": 12, "val": 8})
    swap(tmp_path / "many", 1, 2, 4, 5, 7)
    write_shades(tmp_path / "few", {"train": 3, "val": 1})
    for split in ("train", "val"):
        (tmp_path / "few" / split / "dark/0.png").write_bytes(b"not an image")
    with alone():
        found = both(tmp_path)
    assert [images for _, images, _ in found] == [40, 5 + 1] and found[0][0].keys() == {"knn", "linear"}
    for (accuracies, images, sets), together in zip(
        found, zip(*run_ranks(2, both, tmp_path), strict=True), strict=True
    ):
        assert sum(seen for _, seen, _ in together) == images
        for other, _, others in together:
            assert other == accuracies and all(torch.equal(x, y) for x, y in zip(others, sets, strict=True))


def test_it_is_the_probes_on_the_features_of_the_images_chosen(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shades(tmp_path, {"train": 10, "val": 9})
    swap(tmp_path, 1, 2, 5)
    sets = []
    for split in ("train", "val"):
        source = open_images(tmp_path / split)
        chosen = evenly(len(source), 15)
        x = pixels_of([source.files[i] for i in chosen])[:, ::4, ::4].reshape(15, -1)
        sets += [torch.from_numpy(x).float(), torch.from_numpy(source.labels[chosen])]
    found, seen, _ = probed(tmp_path / "train", tmp_path / "val", "eval.max_images=15")
    monkeypatch.setattr(linear, "STEPS", 50)
    assert seen == 30 and found == {"knn": knn(*sets, k=3), "linear": linear_probe(*sets)}
    assert found["knn"] < 1


def test_mistakes_are_found_before_the_run(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shades(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "val/light").rename(tmp_path / "val/bright")
    config = config_of("eval.every=1", f"eval.train_path={tmp_path / 'train'}", f"eval.val_path={tmp_path / 'val'}")
    with pytest.raises(ValueError, match=r"'class': 1 of 3 classes are in .*train and not in"):
        OnlineProbe(config, ranks_up())

    def missing() -> None:
        raise ValueError("no DALI here")

    monkeypatch.setattr(online, "dali", missing)
    with pytest.raises(ValueError, match="no DALI here"):
        OnlineProbe(config, ranks_up())


def test_evenly_spreads_without_repeats() -> None:
    for total in (1, 7, 100, 101):
        for wanted in (None, 1, 7, 100, 500):
            chosen = evenly(total, wanted)
            assert len(set(chosen.tolist())) == len(chosen) == min(total, wanted or total)
            assert chosen.min() >= 0 and chosen.max() < total
            if len(chosen) > 1:
                assert chosen[0] == 0 and chosen[-1] == total - 1
                assert max(abs(chosen[1:] - chosen[:-1] - (total - 1) / (len(chosen) - 1))) <= 1
