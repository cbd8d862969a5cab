"""Label propagation on DAVIS: its measures, its propagation, and the command on drawn videos."""

import argparse
import gc
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from jepa.data.drawn.davis import draw, palette
from jepa.data.drawn.davis import write as write_drawn
from jepa.model.vit import VisionTransformer
from jepa.probes import davis
from jepa.probes.job import Job, Subject, digest
from jepa.probes.propagation import Propagation, propagate, track
from jepa.probes.regions import contour_accuracy, region_similarity, within
from jepa.ranks.distributed import Ranks
from jepa.state.interop import Weights, save_safetensors
from small import run_ranks, small_config

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def block(rows: slice, columns: slice, size: tuple[int, int] = (100, 120)) -> Tensor:
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, rows, columns] = True
    return mask


def test_measures_of_cases_computed_by_hand() -> None:
    """100 x 120 pixels: the tolerance is ceil(0.008 * 156.2) = 2. The boundary of an a x b block has 2 (a + b)."""
    a, b = block(slice(10, 30), slice(10, 40)), block(slice(20, 40), slice(10, 40))
    assert region_similarity(a, b).tolist() == [10 * 30 / (30 * 30)]
    far = block(slice(60, 90), slice(80, 100))
    precision = (20 + 30) / (20 + 30 + 30 + 20)
    assert contour_accuracy(a | far, a).item() == pytest.approx(2 * precision / (precision + 1))
    assert contour_accuracy(a, a | far).item() == pytest.approx(2 * precision / (precision + 1))
    assert contour_accuracy(a, far).item() == region_similarity(a, far).item() == 0
    for shift, expected in ((0, 1), (2, 1), (3, 0)):  # a straight edge
        left, right = block(slice(0, 100), slice(0, 50)), block(slice(0, 100), slice(0, 50 + shift))
        assert contour_accuracy(left, right).item() == expected
    none = torch.zeros_like(a)
    for measure in (region_similarity, contour_accuracy):
        assert measure(none, none).item() == 1 and measure(none, a).item() == measure(a, none).item() == 0
        assert measure(a | far, a, far[0]).item() == 1, "void pixels do not count"
        assert measure(torch.cat([a, far]), torch.cat([a, a])).tolist() == [1, 0]
        with pytest.raises(ValueError, match=r"bool \[K, H, W\]"):
            measure(a, far.int())


def plain_boundary(mask: np.ndarray) -> np.ndarray:
    """(row, column) of the boundary's pixels."""
    H, W = mask.shape
    steps = (0, 1), (1, 0), (1, 1)
    return np.array(
        [
            (y, x)
            for y in range(H)
            for x in range(W)
            if any(y + dy < H and x + dx < W and mask[y + dy, x + dx] != mask[y, x] for dy, dx in steps)
        ]
    ).reshape(-1, 2)


def plain_f(mask: np.ndarray, truth: np.ndarray) -> float:
    """By the distances between all pixels of both boundaries."""
    a, b = plain_boundary(mask), plain_boundary(truth)
    if not len(a) or not len(b):
        return float(len(a) == len(b))
    near = ((a[:, None] - b[None]) ** 2).sum(-1) <= math.ceil(0.008 * math.hypot(*mask.shape)) ** 2
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blobs(K: int, H: int, W: int) -> Tensor:
    """Random regions with smooth boundaries, bool [K, H, W]."""
    return F.interpolate(torch.randn(1, K, 5, 5), (H, W), mode="bicubic")[0] > 0.3


@pytest.mark.parametrize("size", [(150, 140), (37, 300), (3, 1)])
def test_measures_are_those_of_the_definition(size: tuple[int, int]) -> None:
    masks, truths = blobs(4, *size), blobs(4, *size)
    masks[1] = truths[1].roll(2, 1)  # much is within the tolerance
    masks[2] ^= torch.rand(size) < 0.01
    void = blobs(1, *size)[0] & (torch.rand(size) < 0.5)
    known = ~void.numpy()
    J, F_ = region_similarity(masks, truths, void), contour_accuracy(masks, truths, void)
    for k in range(4):
        mask, truth = masks[k].numpy() & known, truths[k].numpy() & known
        union = (mask | truth).sum()
        assert J[k].item() == pytest.approx((mask & truth).sum() / union if union else 1)
        assert F_[k].item() == pytest.approx(plain_f(mask, truth))


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 8])
def test_within_is_a_disk(radius: int) -> None:
    mask = torch.rand(2, 15, 23) < 0.02
    found = within(mask, radius)
    y, x = np.mgrid[:15, :23]
    for k in range(2):
        near = [(y - row) ** 2 + (x - column) ** 2 <= radius**2 for row, column in np.argwhere(mask[k].numpy())]
        np.testing.assert_array_equal(found[k], np.any([np.zeros((15, 23), bool), *near], axis=0))


def plain_propagation(query: np.ndarray, keys: np.ndarray, labels: np.ndarray, how: Propagation) -> np.ndarray:
    """As `propagate`, of features of any length, one patch after the other."""
    h, w, _ = query.shape
    found = np.zeros((h, w, labels.shape[-1]))
    for y in range(h):
        for x in range(w):
            seen = []
            for t in range(len(keys)):
                for v in range(h):
                    for u in range(w):
                        if abs(v - y) <= how.radius and abs(u - x) <= how.radius:
                            a, b = query[y, x], keys[t, v, u]
                            seen.append((a @ b / np.linalg.norm(a) / np.linalg.norm(b), labels[t, v, u]))
            seen.sort(key=lambda pair: -pair[0])
            weights = [math.exp(cosine / how.temperature) for cosine, _ in seen[: how.top]]
            for weight, (_, label) in zip(weights, seen[: how.top], strict=False):
                found[y, x] += weight * label / sum(weights)
    return found


@pytest.mark.parametrize("how", [Propagation(), Propagation(top=3, radius=1, temperature=0.3), Propagation(radius=0)])
def test_propagation_is_that_of_the_definition(how: Propagation) -> None:
    query, keys = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    labels = torch.rand(3, 4, 5, 2, dtype=torch.float64)
    found = propagate(F.normalize(query, dim=2), F.normalize(keys, dim=3), labels, how)
    np.testing.assert_allclose(found, plain_propagation(query.numpy(), keys.numpy(), labels.numpy(), how), rtol=1e-10)


def plain_resized(values: np.ndarray, size: int) -> np.ndarray:
    """The first axis interpolated linearly to `size` places, whose first and last cells end where the values' do."""
    places = ((np.arange(size) + 0.5) * len(values) / size - 0.5).clip(0, len(values) - 1)
    low = np.floor(places).astype(int)
    high, part = np.minimum(low + 1, len(values) - 1), (places - low).reshape(-1, *[1] * (values.ndim - 1))
    return (1 - part) * values[low] + part * values[high]


def test_tracking_uses_the_first_frame_and_those_before_and_keeps_labels_soft() -> None:
    how, h, w, (H, W) = Propagation(frames=2, top=4, radius=2), 4, 5, (14, 17)
    features = [torch.randn(h, w, 7) for _ in range(7)]
    first = torch.randint(0, 3, (H, W))
    found = list(track(lambda t: features[int(t)], torch.arange(7), first, how))

    nearest = [[first[int((y + 0.5) * H / h), int((x + 0.5) * W / w)] for x in range(w)] for y in range(h)]
    labels = [np.eye(3)[np.array(nearest)]]
    x = [value.double().numpy() for value in features]
    for t in range(1, 7):
        context = [0, *range(max(1, t - 2), t)]
        keys, values = np.stack([x[i] for i in context]), np.stack([labels[i] for i in context])
        labels.append(plain_propagation(x[t], keys, values, how))
        maps = plain_resized(plain_resized(labels[t], H).swapaxes(0, 1), W).swapaxes(0, 1)
        low, high = maps.min((0, 1)), maps.max((0, 1))
        stretched = (maps - low) / np.where(high > low, high - low, 1)
        np.testing.assert_array_equal(found[t - 1], stretched.argmax(-1))


def test_tracking_holds_the_context_and_no_more() -> None:
    def features(frame: Tensor) -> Tensor:
        return torch.rand(6, 9, 11)

    def alive() -> int:
        return sum(type(x) is Tensor and x.shape == (6, 9, 11) for x in gc.get_objects())

    frames = (torch.zeros(1) for _ in range(20))
    counts = [
        alive()
        for t, _ in enumerate(track(features, frames, torch.ones(12, 18).long(), Propagation(frames=3)), 1)
        if t in (1, 6, 19)
    ]
    assert counts[0] < counts[1] == counts[2] <= 1 + 3 + 1, "the first frame, three more, and the one at hand"


def test_settings_out_of_range_are_refused() -> None:
    for name, value in (("frames", -1), ("top", 0), ("radius", -1), ("temperature", 0.0), ("temperature", math.nan)):
        with pytest.raises(ValueError, match=f"--{name}: given {value}"):
            Propagation(**{name: value})


# --- runs


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A process group of this process; the command's test also draws the picture."""
    monkeypatch.setattr(davis, "picture", lambda job, videos: None)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Ranks(0, 1, CPU, store, dist.group.WORLD)
    dist.destroy_process_group()


def tiny() -> VisionTransformer:
    return VisionTransformer(32, 4, 24, 2, 2).eval().requires_grad_(False)


def job_of(encoder: nn.Module, ranks: Ranks, out: Path) -> Job:
    out.mkdir(exist_ok=True)
    subject = Subject("encoder", encoder, digest(encoder))
    return Job("weights", [subject], small_config(), ranks, out)


def settings(root: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    davis.arguments(parser)
    return parser.parse_args(["--data", str(root), *words])


class Stub(nn.Module):
    """What a frame's patches of 4 x 4 pixels get for features, in an encoder's place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pos_embed", torch.zeros(1))
        self.patch_embed = argparse.Namespace(patch_size=4)

    def allow(self, size: tuple[int, int]) -> None:
        pass

    def forward(self, images: Tensor) -> Tensor:
        patches = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), 4)
        return self.of(patches.flatten(2).mT)

    def of(self, colours: Tensor) -> Tensor:
        raise NotImplementedError


class Colours(Stub):
    def of(self, colours: Tensor) -> Tensor:
        return colours / 255 - 0.3


class Noise(Stub):
    def of(self, colours: Tensor) -> Tensor:
        return torch.randn_like(colours)


STRIPES = torch.tensor([[20, 20, 20], [240, 30, 30], [30, 240, 30]])


class Objects(Stub):
    """Which stripe a patch shows."""

    def of(self, colours: Tensor) -> Tensor:
        return F.one_hot(torch.cdist(colours, STRIPES.float()).argmin(-1), 3).float()


def write_video(root: Path, name: str, frames: list[np.ndarray], masks: list[np.ndarray]) -> None:
    for folder, suffix, pictures in (("JPEGImages", "jpg", frames), ("Annotations", "png", masks)):
        (root / folder / "480p" / name).mkdir(parents=True)
        for t, pixels in enumerate(pictures):
            image = Image.fromarray(pixels.astype(np.uint8))
            if suffix == "png":
                image.putpalette(palette())
            image.save(root / folder / "480p" / name / f"{t:05d}.{suffix}", quality=95)
    (root / "ImageSets/2017").mkdir(parents=True, exist_ok=True)
    with (root / "ImageSets/2017/val.txt").open("a") as table:
        table.write(f"{name}\n")


def test_features_that_tell_the_objects_apart_score_everything(alone: Ranks, tmp_path: Path) -> None:
    """Two stripes as high as the frame move by whole patches, the last frame aside, which is not scored."""
    masks = [np.zeros((32, 48), np.uint8) for _ in range(10)]
    for t, mask in enumerate(masks):
        mask[:, 4 * (1 + t % 3) : 4 * (3 + t % 3)] = 1
        mask[:, 4 * (8 - t % 3) : 4 * (10 - t % 3)] = 2
    frames = [STRIPES.numpy()[mask] for mask in masks]
    masks[-1] = np.ones_like(masks[-1])
    write_video(tmp_path / "set", "stripes", frames, masks)
    result = davis.run(job_of(Objects(), alone, tmp_path / "out"), settings(tmp_path / "set", "--size", "32"))
    assert result.rows == [{"features": "encoder", "J&F": 100.0, "J": 100.0, "F": 100.0}] and result.task is None


def test_nothing_moves_where_nothing_moves(alone: Ranks, tmp_path: Path) -> None:
    """With one neighbour a patch keeps its own label, so every mask is that of the second frame."""
    _, images, masks = draw(random.getrandbits(31), 2, 1, (64, 96))
    write_video(tmp_path / "set", "still", [images[0]] * 5, [masks[0]] * 5)
    job = job_of(tiny(), alone, tmp_path / "out")
    (row,) = davis.run(job, settings(tmp_path / "set", "--size", "64", "--top", "1")).rows
    folder = tmp_path / "out/davis" / job.subjects[0].key / "still"
    written = [np.asarray(Image.open(folder / f"{t:05d}.png")) for t in range(5)]
    np.testing.assert_array_equal(written[0], masks[0])
    assert all(np.array_equal(mask, written[1]) for mask in written[2:])
    objects = [written[1] == k for k in (1, 2, 3)], [masks[0] == k for k in (1, 2, 3)]
    J = [(a & b).sum() / (a | b).sum() for a, b in zip(*objects, strict=True)]
    f = [plain_f(a, b) for a, b in zip(*objects, strict=True)]
    assert row["J"] == pytest.approx(100 * np.mean(J)) and row["F"] == pytest.approx(100 * np.mean(f))
    assert row["J&F"] == pytest.approx((row["J"] + row["F"]) / 2) and row["J"] > 60


def test_colours_find_drawn_objects_and_noise_does_not(alone: Ranks, tmp_path: Path) -> None:
    write_drawn(tmp_path / "set", random.getrandbits(31), frames=6)
    rows = [
        davis.run(job_of(encoder, alone, tmp_path / name), settings(tmp_path / "set", "--size", "64")).rows[0]
        for name, encoder in (("colours", Colours()), ("noise", Noise()))
    ]
    assert rows[0]["J&F"] > rows[1]["J&F"] + 30 and rows[0]["J"] > 50


def test_scores_are_averaged_over_objects_and_void_is_left_out(alone: Ranks, tmp_path: Path) -> None:
    """Of the written masks, by another way; sequences have one, two and three objects."""
    root = tmp_path / "set"
    write_drawn(root, random.getrandbits(31), sequences=3, frames=5)
    for path in (root / "Annotations").rglob("*.png"):
        with Image.open(path) as image:
            labels = np.array(image)
        labels[np.random.default_rng(random.getrandbits(32)).random(labels.shape) < 0.05] = 255
        image = Image.fromarray(labels)
        image.putpalette(palette())
        image.save(path)
    job = job_of(tiny(), alone, tmp_path / "out")
    (row,) = davis.run(job, settings(root, "--size", "32", "--frames", "2", "--radius", "3")).rows
    J, f = [], []
    for video in sorted((root / "Annotations/480p").iterdir()):
        for k in range(1, 2 + int(video.name[:2])):
            frames = []
            for t in (1, 2, 3):
                truth = np.asarray(Image.open(video / f"{t:05d}.png"))
                mask = np.asarray(Image.open(job.out / "davis" / job.subjects[0].key / video.name / f"{t:05d}.png"))
                a, b = (mask == k) & (truth != 255), truth == k
                frames.append(((a & b).sum() / (a | b).sum(), plain_f(a, b)))
            J.append(np.mean([j for j, _ in frames]))
            f.append(np.mean([value for _, value in frames]))
    assert len(J) == 6
    assert row["J"] == pytest.approx(100 * np.mean(J)) and row["F"] == pytest.approx(100 * np.mean(f))


class Stopped(Exception):
    pass


def test_an_interrupted_run_goes_on(alone: Ranks, tmp_path: Path) -> None:
    write_drawn(tmp_path / "set", random.getrandbits(31), sequences=3, frames=5)
    args, encoder = settings(tmp_path / "set", "--size", "32"), tiny()
    seen: list[int] = []

    def count(*_: object) -> None:
        seen.append(1)
        if len(seen) == 8:
            raise Stopped

    whole = davis.run(job_of(encoder, alone, tmp_path / "whole"), args)
    hook = encoder.register_forward_pre_hook(count)
    job = job_of(encoder, alone, tmp_path / "out")
    with pytest.raises(Stopped):
        davis.run(job, args)
    assert davis.run(job, args) == whole and len(seen) == 8 + 2 * 5  # the frames of two sequences, the second anew
    assert davis.run(job, args) == whole and len(seen) == 18
    hook.remove()
    written = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.png"))
    assert len(written) == 3 * 5
    for path in written:
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "out" / path).read_bytes()
    other = settings(tmp_path / "set", "--size", "32", "--top", "1")
    anew = davis.run(job_of(encoder, alone, tmp_path / "anew"), other)
    assert davis.run(job, other) == anew != whole, "scores of other settings are not taken"


def test_scores_of_other_frames_are_not_taken(alone: Ranks, tmp_path: Path) -> None:
    """Of the same names; a set that was moved with its times is the same."""
    root, out = tmp_path / "set", tmp_path / "out"
    write_drawn(root, random.getrandbits(31), frames=4)
    first = davis.run(job_of(Colours(), alone, out), settings(root, "--size", "64"))
    root.rename(tmp_path / "moved")
    assert davis.run(job_of(Noise(), alone, out), settings(tmp_path / "moved", "--size", "64")) == first
    for path in (tmp_path / "moved/JPEGImages").rglob("*.jpg"):
        Image.new("RGB", Image.open(path).size, "grey").save(path)
    (grey,) = davis.run(job_of(Colours(), alone, out), settings(tmp_path / "moved", "--size", "64")).rows
    assert grey["J&F"] < first.rows[0]["J&F"] - 20


def test_results_do_not_depend_on_the_picture(
    alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_drawn(tmp_path / "set", random.getrandbits(31), sequences=2, frames=4)
    args, job = settings(tmp_path / "set", "--size", "32"), job_of(tiny(), alone, tmp_path / "out")
    first = davis.run(job, args)
    monkeypatch.undo()  # of `alone`: draw
    for folder in (job.out / "davis" / job.subjects[0].key).glob("*/"):
        shutil.rmtree(folder)
    assert davis.run(job, args) == first
    assert "davis-masks.png could not be drawn (ValueError" in capsys.readouterr().err


def taken(folder: Path) -> list[str]:
    """The sequences that come to this rank, the first of which takes as long as all others together."""
    store = dist.distributed_c10d._get_default_store()
    job = Job("w", [], small_config(), Ranks(dist.get_rank(), 2, CPU, store, dist.group.WORLD), folder)
    names = []
    for place, video in davis.handed_out(job, [davis.Video(str(i), [], []) for i in range(9)]):
        names.append(video.name)
        if place == 0:
            store.wait([f"done/{i}" for i in range(1, 9)])
        store.set(f"done/{place}", "")
    return names


@pytest.mark.ranks
def test_a_long_sequence_keeps_no_other_waiting(tmp_path: Path) -> None:
    shares = run_ranks(2, taken, tmp_path)
    assert sorted(shares) == [["0"], [str(i) for i in range(1, 9)]]


def test_frames_keep_their_shape_in_whole_patches(tmp_path: Path) -> None:
    Image.new("RGB", (854, 480)).save(tmp_path / "wide.jpg")
    Image.new("RGB", (90, 160)).save(tmp_path / "tall.jpg")
    paths = [tmp_path / "wide.jpg", tmp_path / "tall.jpg"]
    assert [tuple(x.shape) for x in davis.read_frames(paths, 480, 16)] == [(480, 848, 3), (848, 480, 3)]
    assert [tuple(x.shape) for x in davis.read_frames(paths, 480, 14)] == [(476, 840, 3), (840, 476, 3)]


def test_another_layout_is_one_line_that_says_what_was_looked_for(alone: Ranks, tmp_path: Path) -> None:
    root, args = tmp_path / "set", settings(tmp_path / "set", "--size", "32")

    def refused(pattern: str) -> None:
        with pytest.raises(ValueError, match=pattern) as caught:
            davis.run(job_of(tiny(), alone, tmp_path / "out"), args)
        assert "\n" not in str(caught.value)

    refused(r"there is no .*ImageSets/2017/val.txt; wanted DAVIS 2017 at 480p")
    write_drawn(root, sequences=2, frames=4)
    first, second = (root / "ImageSets/2017/val.txt").read_text().split()
    annotation = root / "Annotations/480p" / first / "00001.png"
    mask = Image.open(annotation)
    mask.load()
    annotation.unlink()
    refused(f"1 of 4 annotations are missing, for example .*{first}/00001.png")
    mask.convert("RGB").save(annotation)
    refused(rf"{first}/00001.png: a picture of mode RGB; wanted indices")
    mask.resize((30, 20)).save(annotation)
    refused(rf"{first}/00001.png is \[20, 30\], the first annotation \[64, 96\]")
    mask.save(annotation)
    Image.new("L", mask.size).save(annotation.with_name("00000.png"))
    refused(f"{first}/00000.png shows no object")
    shutil.rmtree(root / "JPEGImages/480p" / second)
    refused(f"JPEGImages/480p/{second} has 0 .jpg")
    (root / "ImageSets/2017/val.txt").write_text("\n")
    refused("names no sequence")
    args = settings(root, "--size", "3")
    refused("--size: given 3, wanted at least a patch, 4 pixels")


def test_the_drawn_set_is_what_was_drawn(tmp_path: Path) -> None:
    seed = random.getrandbits(31)
    assert write_drawn(tmp_path / "set", seed, sequences=3, frames=4, size=(48, 80))
    assert not write_drawn(tmp_path / "set", seed, sequences=3, frames=4, size=(48, 80))
    with pytest.raises(ValueError, match="is not this data set"):
        write_drawn(tmp_path / "set", seed)
    for i, video in enumerate(davis.open_videos(tmp_path / "set")):
        name, images, masks = draw(seed, i, 4, (48, 80))
        assert video.name == name and len(video.frames) == 4 and np.unique(masks[0]).tolist() == list(range(2 + i % 3))
        for t in range(4):
            stored, colours = davis.indices(video.truths[t])
            np.testing.assert_array_equal(stored, masks[t])
            assert colours[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] and colours[-3:] == [224, 224, 192]
            assert np.abs(np.asarray(Image.open(video.frames[t]), float) - images[t]).mean() < 4
        assert not np.array_equal(masks[0], masks[-1])


@pytest.mark.ranks
@pytest.mark.slow
def test_the_command_on_two_ranks_is_one_rank(alone: Ranks, tmp_path: Path) -> None:
    """Of weights in a file and videos that synthetic.py draws."""
    config, encoder = small_config(), tiny()
    tensors = dict(encoder.named_parameters())
    shapes = {"target_encoder": {name: list(value.shape) for name, value in tensors.items()}}
    weights = Weights(config, {"epoch": 0, "step": 0, "samples": 0}, shapes, lambda _, name: tensors[name])
    save_safetensors(weights, ["target_encoder"], torch.float32, tmp_path / "model.safetensors")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "layout of davis drawn" in run(str(ROOT / "engine/jepa/data/synthetic.py"), "set", "--layout", "davis")
    table = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "engine/evaluate.py"), "davis",
        "model.safetensors", "--data", "set", "--size", "32", "--out", "two", "--only", "--device", "cpu",
    )  # fmt: skip
    (path,) = (tmp_path / "two").glob("davis-*set.json")
    written = json.loads(path.read_text())
    (one,) = davis.run(job_of(encoder, alone, tmp_path / "one"), settings(tmp_path / "set", "--size", "32")).rows
    assert written["rows"] == [one | {"features": "target encoder"}] and written["ranks"] == 2
    assert f"{one['J&F']:.1f} %" in table and Image.open(tmp_path / "two/davis-masks.png").width > 1000
