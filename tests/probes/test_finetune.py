"""Fine-tuning: the parts by themselves, and whole runs in processes of their own against independent computations."""

from packages import need

need("torchvision", "timm")

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from jepa.config.schema import Config
from jepa.data.synthetic import draw, write
from jepa.model.vit import VisionTransformer, build_encoder
from jepa.probes import finetune
from jepa.probes.finetune import State, Tuning, build, fine_tune, layers
from jepa.probes.finetune_images import Order, Split, TrainImages, ValImages, transforms
from jepa.probes.finetune_settings import Settings, settings_arguments, settings_of
from jepa.probes.job import Job, Subject
from jepa.probes.labels import Labelled, open_labelled
from jepa.ranks.distributed import Ranks
from jepa.state.interop import Weights, save_safetensors
from small import run_ranks, small_config

ROOT = Path(__file__).resolve().parents[2]
SIZE, PATCH = 32, 8
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0, "randaugment": "none", "crop_scale": 0.5}
FEW = Settings(epochs=3, warmup=1, batch=16, micro_batch=4, lr=3e-3, layer_decay=0.6, workers=0, seed=7)


def config_of() -> Config:
    return small_config("meta.embed_dim=32", f"data.crop_size={SIZE}", f"mask.patch_size={PATCH}")


def drawn_encoder() -> VisionTransformer:
    """Weights of a size that makes every part of the output matter."""
    encoder = build_encoder(config_of()).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return encoder


# The parts


def test_the_model_has_the_encoders_features() -> None:
    encoder, config = drawn_encoder(), config_of()
    images = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (config.data.mean, config.data.std))
    model = build(encoder, config, classes=3, drop_path=0.5).eval()
    with torch.no_grad():
        found = model.forward_head(model.forward_features((images / 255 - mean) / std), pre_logits=True)
        torch.testing.assert_close(found, encoder(images).mean(1), rtol=1e-4, atol=1e-5)
    assert model.head.weight.shape == (3, 32) and 0 < model.head.weight.std() < 0.1


def test_learning_rates_fall_with_the_depth_below_the_classifier() -> None:
    depth, decay, weight_decay = 2, random.uniform(0.5, 0.9), random.uniform(0.01, 0.1)
    model = build(drawn_encoder(), config_of(), classes=3)
    settings = Settings(layer_decay=decay, weight_decay=weight_decay)
    group_of = {id(p): group for group in layers(model, settings) for p in group["params"]}
    for name, parameter in model.named_parameters():
        part, number = (*name.split("."), "")[:2]
        layer = {"pos_embed": 0, "patch_embed": 0, "blocks": 1 + int(number) if number.isdigit() else None}
        layer |= {"norm": depth, "head": depth + 1}
        group = group_of.pop(id(parameter))
        assert group["lr_scale"] == pytest.approx(decay ** (depth + 1 - layer[part])), name
        decays = parameter.ndim > 1 and part != "pos_embed"
        assert group["weight_decay"] == (weight_decay if decays else 0), name
    assert not group_of


def test_every_epoch_shows_each_image_once_in_an_order_of_its_own_whatever_the_split() -> None:
    """Of 23 images in steps of 8, seven are left out; the rest is the same on one rank, on two, and going on."""

    def steps(split: Split, first: int = 0) -> list[list[tuple[int, int]]]:
        """The images of each step, over all ranks."""
        orders = [Order(23, 3, split, rank, seed=5, first=first) for rank in range(split.ranks)]
        pieces = [list(order) for order in orders]
        assert [len(order) for order in orders] == [len(found) for found in pieces]
        number, batches = split.accumulation, []
        for step in range(len(pieces[0]) // number):
            batches.append(
                [key for rank in pieces for piece in rank[step * number : (step + 1) * number] for key in piece]
            )
        return [sorted(batch) for batch in batches]

    alone = steps(Split(8, 1, 1))
    for split in (Split(2, 4, 1), Split(4, 1, 2), Split(2, 2, 2), Split(1, 2, 4)):
        assert steps(split) == alone
        assert steps(split, first=3) == alone[3:]
    assert len(alone) == 3 * 2
    for epoch in range(3):
        keys = [key for batch in alone[2 * epoch : 2 * epoch + 2] for key in batch]
        assert len(set(keys)) == 16 and {e for e, _ in keys} == {epoch} and {place for _, place in keys} <= {*range(23)}
    assert len({str([place for _, place in batch]) for batch in alone}) == 6


@pytest.mark.parametrize(
    ("batch", "ranks", "largest", "even", "wanted"),
    [
        (528, 1, 64, True, (48, 11)),
        (528, 8, 64, True, (22, 3)),
        (528, 16, 64, False, (33, 1)),
        (6, 2, 2, False, (1, 3)),
    ],
)
def test_batches_are_shared_equally(batch: int, ranks: int, largest: int, even: bool, wanted: tuple[int, int]) -> None:
    split = Split.of(batch, ranks, largest, even)
    assert (split.micro, split.accumulation) == wanted and split.batch == batch
    for wrong in ((batch + 1, ranks + 1, largest, even), (3 * ranks, ranks, largest, True)):
        with pytest.raises(ValueError, match=r"--batch .*wanted a multiple of"):
            Split.of(*wrong)


def drawn(folder: Path, train: int, val: int) -> Labelled:
    """Scenes with their number of objects, 1 to 4, as labels."""
    while True:
        seed = random.getrandbits(30)
        counts = (draw(0, number, split=split, seed=seed).count for split, number in enumerate((train, val)))
        if all({*count.tolist()} == {1, 2, 3, 4} for count in counts):
            break
    write(folder, {"train": train, "val": val}, seed)
    return open_labelled(folder / "train", folder / "val", ["count"])


def damage(source: Any, i: int) -> str:
    Path(source.name(i)).write_bytes(Path(source.name(i)).read_bytes()[:150])
    return source.name(i)


def test_augmentation_depends_on_seed_epoch_and_image_alone(tmp_path: Path) -> None:
    sets, (augment, _) = drawn(tmp_path / "set", 12, 6), transforms(config_of(), Settings())
    one, two, other = (
        TrainImages(sets.train, sets.train_y["count"], np.array(indices), augment, seed)
        for indices, seed in (([3, 5, 8], 1), ([8, 5], 1), ([3, 5, 8], 2))
    )
    first = one[4, 1][0]
    for _ in range(3):
        random.random(), torch.rand(2), one[0, 2]
    torch.testing.assert_close(one[4, 1][0], first, rtol=0, atol=0)
    torch.testing.assert_close(two[4, 1][0], first, rtol=0, atol=0)
    for changed in (one[5, 1], one[4, 0], other[4, 1]):
        assert not torch.equal(changed[0], first)


def test_every_strength_of_randaugment_can_be_applied(tmp_path: Path) -> None:
    """timm asks Pillow to keep no bit at the strongest posterization."""
    image = Image.fromarray(np.random.default_rng(random.getrandbits(60)).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    for policy in ("rand-m9-mstd0.5-inc1", "rand-m10-inc1", "rand-m0", "rand-m15-mmax20-inc1"):
        augment, _ = transforms(config_of(), Settings(randaugment=policy, erasing=0))
        (ops,) = [part.ops for part in vars(augment)["transforms"] if hasattr(part, "ops")]
        assert any("Posterize" in op.name for op in ops)
        for op in ops:
            op.prob = 1.0
            for _ in range(5):
                assert op(image).size == image.size


def test_a_broken_image_is_replaced_by_the_next_good_one(tmp_path: Path) -> None:
    sets, (augment, _) = drawn(tmp_path / "set", 12, 6), transforms(config_of(), Settings())
    y, indices = sets.train_y["count"], np.array([2, 7, 9])
    images = TrainImages(sets.train, y, indices, augment, 0)
    good = images[0, 0][0]
    damage(sets.train, 9), Path(sets.train.name(7)).unlink()
    pixels, label, broken = images[0, 1]  # the next good one is the first
    assert broken == [7, 9] and label == y[2]
    torch.testing.assert_close(pixels, good)
    damage(sets.train, 2)
    with pytest.raises(ValueError, match="none of the 3 training images can be decoded"):
        images[0, 1]


def parsed(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    settings_arguments(parser)
    parser.add_argument("--precision", default="fp32")
    return settings_of(parser.parse_args(words), small_config("meta.embed_dim=1280", "meta.num_heads=16"))


def test_presets_are_the_papers_and_options_override_them() -> None:
    paper, lowshot = parsed(), parsed("--preset", "lowshot")
    assert (paper.epochs, paper.lr, paper.batch, paper.mixup, paper.cutmix) == (50, 1e-4, 528, 0.8, 1.0)
    assert (paper.drop_path, paper.weight_decay, paper.layer_decay) == (0.25, 0.04, 0.75)
    assert (lowshot.epochs, lowshot.lr, lowshot.batch, lowshot.weight_decay) == (50, 3e-5, 512, 0.4)
    assert (lowshot.smoothing, lowshot.layer_decay) == (0.1, 0.75) and lowshot.randaugment.startswith("rand-")
    assert lowshot.mixup == lowshot.cutmix == lowshot.erasing == lowshot.drop_path == 0
    given = parsed("--preset", "lowshot", "--lr", "0.5", "--mixup", "0.3", "--checkpointing")
    assert (given.lr, given.mixup, given.checkpointing, given.batch) == (0.5, 0.3, True, 512)


@pytest.mark.parametrize(
    "words",
    ["--smoothing 1", "--epochs 0", "--lr -1", "--lr nan", "--warmup 50", "--zero-stage 4", "--randaugment strong",
     "--randaugment rand-x3", "--crop-scale 0", "--drop-path 1"],
)  # fmt: skip
def test_settings_that_mean_nothing_are_named(words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("nan", "nan") + ".*: wanted"):
        parsed(*words.split())


def test_images_without_labels_and_too_few_get_one_line(tmp_path: Path) -> None:
    job = Job(
        "w",
        [Subject("encoder", drawn_encoder(), "k")],
        config_of(),
        Ranks(0, 1, torch.device("cpu"), None, None),
        tmp_path,
    )
    sets = drawn(tmp_path / "set", 12, 6)
    for split in ("train", "val"):
        (tmp_path / "plain" / split).mkdir(parents=True)
        for path in (tmp_path / "set" / split).glob("*/*.jpg"):
            shutil.copy(path, tmp_path / "plain" / split)
    parser = argparse.ArgumentParser()
    finetune.arguments(parser)
    parser.add_argument("--precision", default="fp32")
    folders = "--train", str(tmp_path / "plain/train"), "--val", str(tmp_path / "plain/val")
    with pytest.raises(ValueError, match="have no labels; wanted") as caught:
        finetune.run(job, parser.parse_args(folders))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="--batch 16: there are only 12 training images; give a smaller one"):
        fine_tune(job, job.subjects[0], sets, "count", None, FEW)


# Whole runs


def test_unfinished_work_of_other_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(vars(State({"lr": 0.1, "seed": 3}, 5, 0.0, [], []))))
    assert State.read(tmp_path, {"lr": 0.1, "seed": 3}).step == 5
    with pytest.raises(ValueError, match=r"began with lr 0\.1, now 0\.2; give the same"):
        State.read(tmp_path, {"lr": 0.2, "seed": 3})


def test_other_images_under_the_same_names_are_other_conditions(one_rank: None, tmp_path: Path) -> None:
    sets, (augment, crop) = drawn(tmp_path / "set", 12, 6), transforms(config_of(), FEW)
    ranks = Ranks(0, 1, torch.device("cpu"), dist.HashStore(), dist.group.WORLD)
    job = Job("w", [], config_of(), ranks, tmp_path)

    def conditions() -> dict[str, Any]:
        train = TrainImages(sets.train, sets.train_y["count"], np.array([1, 4, 6]), augment, 0)
        return finetune._conditions(job, train, ValImages(sets.val, sets.val_y["count"], crop, SIZE), FEW)

    first = conditions()
    for source, i, changed in (
        (sets.train, 4, {"training files"}),
        (sets.train, 5, set()),  # which is not trained on
        (sets.val, 2, {"validation files"}),
    ):
        path = Path(source.name(i))
        before, content = path.stat(), path.read_bytes()
        path.write_bytes(content + b" ")
        assert {name for name, value in conditions().items() if first[name] != value} == changed
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert conditions() == first


class StopAfter:
    """A StopRequest that is made after so many steps of this call."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def ask(self) -> None:
        self.left -= 1

    def agreed(self) -> bool:
        return self.left == 0


def job_in(folder: Path, weights: dict[str, Tensor]) -> Job:
    encoder = build_encoder(config_of()).eval().requires_grad_(False)
    encoder.load_state_dict(weights)
    group = dist.new_group(backend="gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), None, group)
    return Job("w", [Subject("encoder", encoder, "key")], config_of(), ranks, folder)


def tuned(
    job: Job, sets: Labelled, settings: Settings, stops: tuple[int, ...] = (), indices: Any = None
) -> dict[str, Any]:
    """A fine-tuning that is stopped and begun again: accuracy, metrics, weights and, of each step, learning rates."""
    rates: list[list[tuple[float, float]]] = []
    step = Tuning.micro_step

    def spy(self: Tuning, images: Tensor, y: Tensor, number: int) -> Tensor:
        if number == 0:
            rates.append([(group["lr"], group["lr_scale"]) for group in self.schedule.optimizer.param_groups])
        return step(self, images, y, number)

    Tuning.micro_step = spy
    try:
        for steps in stops:
            with pytest.raises(SystemExit) as stopped:
                fine_tune(job, job.subjects[0], sets, "count", indices, settings, StopAfter(steps))
            assert stopped.value.code == 75
        accuracy = fine_tune(job, job.subjects[0], sets, "count", indices, settings)
        again = len(rates)
        assert fine_tune(job, job.subjects[0], sets, "count", indices, settings) == accuracy and len(rates) == again
    finally:
        Tuning.micro_step = step
    (folder,) = (job.out / "finetune/key").iterdir()
    (saved,) = folder.glob("step*/mp_rank_00_model_states.pt")
    weights = torch.load(saved, weights_only=False)["module"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"accuracy": accuracy, "metrics": metrics, "weights": weights, "rates": rates, "folder": folder.name}


def recorded(kind: type[torch.nn.Module], targets: list[Tensor], *args: Any) -> torch.nn.Module:
    loss = kind(*args)
    loss.register_forward_pre_hook(lambda _, given: targets.append(given[1].clone()))
    return loss


def on_one_rank(folder: Path, weights: dict[str, Tensor], sets: Labelled, easy: Labelled) -> dict[str, Any]:
    soft: list[Tensor] = []
    hard: list[Tensor] = []
    for name, targets in (("SoftTargetCrossEntropy", soft), ("LabelSmoothingCrossEntropy", hard)):
        setattr(finetune, name, partial(recorded, getattr(finetune, name), targets))
    found = {"whole": tuned(job_in(folder / "whole", weights), sets, FEW), "soft": soft[:]}
    found["parts"] = tuned(job_in(folder / "parts", weights), sets, FEW, stops=(2, 1, 2))
    still = Settings(**vars(FEW) | PLAIN | {"epochs": 1, "warmup": 0, "lr": 0.0, "min_lr": 0.0})
    hard.clear()
    found |= {"still": tuned(job_in(folder / "still", weights), sets, still, indices=np.arange(2, 37)), "hard": hard[:]}
    learning = Settings(**vars(FEW) | PLAIN | {"epochs": 6, "micro_batch": 16, "layer_decay": 0.9})
    found["learned"] = tuned(job_in(folder / "learned", weights), easy, learning)
    return found


def on_two_ranks(folder: Path, weights: dict[str, Tensor], sets: Labelled) -> dict[str, Any]:
    return tuned(job_in(folder / "two", weights), sets, Settings(**vars(FEW) | {"zero_stage": 2}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(random.getrandbits(60))
    return build_encoder(config_of()).state_dict()


@pytest.fixture(scope="module")
def sets(folder: Path) -> Labelled:
    """37 scenes to fit on and 19 to judge by, of which one each is broken."""
    sets = drawn(folder / "set", 37, 19)
    damage(sets.train, 5), damage(sets.val, 8)
    return sets


@pytest.fixture(scope="module")
def alone(folder: Path, weights: dict[str, Tensor], sets: Labelled) -> dict[str, Any]:
    (found,) = run_ranks(1, on_one_rank, folder, weights, sets, drawn(folder / "easy", 240, 60))
    return found


@pytest.fixture(scope="module")
def together(folder: Path, weights: dict[str, Tensor], sets: Labelled) -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks, folder, weights, sets)


@pytest.mark.ranks
def test_interrupted_and_going_on_is_as_if_never_interrupted(alone: dict[str, Any]) -> None:
    """Stopped in the middle of an epoch, at the end of one, and again."""
    whole, parts = alone["whole"], alone["parts"]
    assert parts["metrics"] == whole["metrics"] and len(whole["metrics"]) == 3
    assert parts["rates"] == whole["rates"] and len(whole["rates"]) == 6
    assert parts["weights"].keys() == whole["weights"].keys()
    for name, value in whole["weights"].items():
        torch.testing.assert_close(parts["weights"][name], value, rtol=0, atol=0, msg=name)
    assert whole["accuracy"] == whole["metrics"][-1]["accuracy"]


@pytest.mark.ranks
def test_learning_rates_follow_the_schedule(alone: dict[str, Any]) -> None:
    """Two steps of warm-up, then half a cosine over four; each layer's is scaled."""
    for step, groups in enumerate(alone["whole"]["rates"], start=1):
        lr = FEW.lr * step / 2
        if step > 2:
            lr = FEW.min_lr + (FEW.lr - FEW.min_lr) * (1 + math.cos(math.pi * (step - 2) / 4)) / 2
        assert {scale for _, scale in groups} == {0.6**power for power in range(4)}
        assert [found for found, _ in groups] == pytest.approx([lr * scale for _, scale in groups])


def accuracy_of(weights: dict[str, Tensor], sets: Labelled) -> tuple[float, int]:
    """By hand: the middle 224 / 256 of each readable image."""
    config = config_of()
    model, right, counted = build(drawn_encoder(), config, classes=4).eval(), 0, 0
    model.load_state_dict(weights)
    for i, label in enumerate(sets.val_y["count"]):
        try:
            image = Image.open(sets.val.name(i)).convert("RGB")
        except OSError:
            continue
        side = int(SIZE * 256 / 224)
        start = round((side - SIZE) / 2)
        image = image.resize((side, side), Image.Resampling.BICUBIC).crop((start, start, start + SIZE, start + SIZE))
        pixels = (np.asarray(image) / 255 - config.data.mean) / config.data.std
        with torch.no_grad():
            right += int(model(torch.tensor(pixels).permute(2, 0, 1)[None].float()).argmax()) == label
        counted += 1
    return 100 * right / counted, counted


@pytest.mark.ranks
def test_every_readable_image_is_counted_once(
    alone: dict[str, Any], together: list[dict[str, Any]], sets: Labelled
) -> None:
    """18 of 19 images, on one rank and on two."""
    for found in (alone["whole"], alone["still"], *together):
        assert (found["accuracy"], found["metrics"][-1]["counted"]) == (*accuracy_of(found["weights"], sets)[:1], 18)


@pytest.mark.ranks
def test_two_ranks_compute_what_one_does(alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    """With the same micro-batches, twice as many on one rank as on each of two."""
    first, second = together
    assert first["accuracy"] == second["accuracy"] and first["metrics"] == second["metrics"]
    wanted = alone["whole"]["weights"]
    for name, value in first["weights"].items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
    for found, row in zip(first["metrics"], alone["whole"]["metrics"], strict=True):
        assert found["loss"] == pytest.approx(row["loss"], rel=1e-4)


@pytest.mark.ranks
def test_the_loss_is_the_mean_over_the_epochs_images(
    alone: dict[str, Any], sets: Labelled, weights: dict[str, Tensor]
) -> None:
    """Without learning and mixing: label-smoothed cross-entropy of two steps of 16 of 35 images; image 5 is broken."""
    still, config = alone["still"], config_of()
    settings, y, indices = Settings(**vars(FEW) | PLAIN), sets.train_y["count"], np.arange(2, 37)
    assert not torch.equal(alone["whole"]["weights"]["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"])
    for name, value in weights.items():
        torch.testing.assert_close(still["weights"][name], value, rtol=0, atol=0, msg=name)
    images = TrainImages(sets.train, y, indices, transforms(config, settings)[0], FEW.seed)
    keys = [key for batch in Order(35, 1, Split(16, 1, 1), 0, FEW.seed) for key in batch]
    pixels, labels = zip(*((pixels, label) for pixels, label, _ in map(images.__getitem__, keys)), strict=True)
    model = build(drawn_encoder(), config, classes=4).eval()
    model.load_state_dict(still["weights"])
    with torch.no_grad():
        wanted = F.cross_entropy(model(torch.stack(pixels)), torch.tensor(labels), label_smoothing=FEW.smoothing)
    assert still["metrics"][0]["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert torch.cat(alone["hard"]).tolist() == list(labels)
    assert still["folder"].startswith("count-") and alone["whole"]["folder"] == "count"


@pytest.mark.ranks
def test_mixing_makes_soft_targets(alone: dict[str, Any]) -> None:
    """Of two images' classes, smoothed: 0.1 is spread over the four classes."""
    targets = torch.cat(alone["soft"])
    assert targets.shape == (3 * 2 * 16, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
    raised = (targets - FEW.smoothing / 4 > 1e-6).sum(1)
    assert raised.min() >= 1 and raised.max() == 2
    assert len(targets.max(1).values.unique()) > 6  # a share of its own for each micro-batch


@pytest.mark.ranks
def test_it_learns(alone: dict[str, Any]) -> None:
    """Chance is 25 %, or a little more for the commonest number of objects."""
    assert alone["learned"]["accuracy"] > 45


def exported(path: Path, weights: dict[str, Tensor]) -> Path:
    shapes = {"encoder": {name: [*value.shape] for name, value in weights.items() if name != "pos_embed"}}
    shapes["target_encoder"] = shapes["encoder"]
    save_safetensors(
        Weights(config_of(), {}, shapes, lambda _, name: weights[name]), ["target_encoder"], torch.float32, path
    )
    return path


@pytest.mark.ranks
@pytest.mark.slow
def test_the_command_names_a_broken_image_once_and_goes_on(
    folder: Path, weights: dict[str, Tensor], sets: Labelled
) -> None:
    """In plain python, with processes that decode, in bf16 and ZeRO-3; stopped by the clock at first."""
    path, out = exported(folder / "weights.safetensors", weights), folder / "command"
    words = (
        "finetune", path, "--train", sets.train.path, "--val", sets.val.path, "--label", "count", "--only",
        "--out", out, "--epochs", "2", "--warmup", "0", "--batch", "16", "--workers", "1", "--precision", "bf16",
        "--zero-stage", "3",
    )  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "engine/evaluate.py", *words, *more]
        return subprocess.run([*map(str, command)], env=environment, text=True, capture_output=True, timeout=300)

    stopped = run("--max-minutes", "1e-6")
    assert stopped.returncode == 75 and "stopped after step 1 of 4; the same command goes on" in stopped.stderr
    assert not list(out.glob("finetune*.json"))
    done = run()
    assert done.returncode == 0, done.stderr
    assert "going on after step 1 of 4" in done.stderr
    (path,) = out.glob("finetune*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["features"] == "target encoder"
    assert 0 <= row["count"] <= 100 and f"{row['count']:.1f} %" in done.stdout
    said = stopped.stderr + done.stderr
    for source, i in ((sets.train, 5), (sets.val, 8)):
        assert said.count(f"{source.name(i)} cannot be decoded") == 1
