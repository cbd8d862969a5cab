"""Label propagation through the videos of DAVIS 2017's validation set, by frozen features.

    python engine/evaluate.py davis WEIGHTS --data DAVIS

DAVIS holds ImageSets/2017/val.txt, JPEGImages/480p/SEQ/00000.jpg and Annotations/480p/SEQ/00000.png. The first frame's
masks are carried to the others (jepa.probes.propagation, with DINO's settings), and J and F (jepa.probes.regions)
averaged over the frames between the first and the last, then over objects, as in the semi-supervised track.

Each rank takes the next sequence when it is free, the longest first. A finished one lies in davis/KEY/SEQ.json below
--out, and its masks in davis/KEY/SEQ, one folder KEY for each encoder; these folders can be given to the official
evaluation. davis-masks.png shows some of them.
"""

import argparse
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jepa.model.vit import VisionTransformer
from jepa.pictures.video import Clip, masks_on_frames

from .drawing import draw
from .fingerprint import fingerprint
from .job import Job, Result, Row, Subject
from .picture_files import open_picture
from .propagation import Propagation, track
from .regions import contour_accuracy, region_similarity
from .results import write

VOID = 255
OFFICIAL = (
    "bike-packing blackswan bmx-trees breakdance camel car-roundabout car-shadow cows dance-twirl dog dogs-jump "
    "drift-chicane drift-straight goat gold-fish horsejump-high india judo kite-surf lab-coat libby loading "
    "mbike-trick motocross-jump paragliding-launch parkour pigs scooter-black shooting soapbox"
)  # the sequences of the validation set
SHOWN = 3  # sequences in the picture
MOMENTS = 5  # frames of each


@dataclass(frozen=True)
class Video:
    """A sequence: its frames and, of the same names, their annotations."""

    name: str
    frames: list[Path]
    truths: list[Path]


def arguments(parser: argparse.ArgumentParser) -> None:
    default = Propagation()
    parser.add_argument("--data", type=Path, required=True, metavar="DAVIS", help="the folder of DAVIS 2017, 480p")
    parser.add_argument("--size", type=int, default=480, help="pixels of a frame's shorter side (default: 480)")
    parser.add_argument(
        "--frames", type=int, default=default.frames, help="earlier frames besides the first (default: %(default)s)"
    )
    parser.add_argument(
        "--top", type=int, default=default.top, help="patches that vote on a patch's label (default: %(default)s)"
    )
    parser.add_argument(
        "--radius", type=int, default=default.radius, help="patches that they may be off (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=default.temperature, help="(default: %(default)s)")


def run(job: Job, args: argparse.Namespace) -> Result:
    """Rows of J&F, J and F in percent. Raises ValueError for another layout or a setting out of range."""
    how = Propagation(args.frames, args.top, args.radius, args.temperature)
    if args.size < (patch := job.config.mask.patch_size):
        raise ValueError(f"--size: given {args.size}, wanted at least a patch, {patch} pixels")
    videos = open_videos(args.data)
    by_length = sorted(videos, key=lambda video: len(video.frames), reverse=True)
    files = {video.name: fingerprint(job, video.frames + video.truths) for video in videos}
    rows: list[Row] = []
    for subject in job.subjects:
        folder, scores = job.out / "davis" / subject.key, {}
        for number, video in handed_out(job, by_length):
            scores[video.name] = judge(video, files[video.name], subject, folder, how, args.size)
            place = f"sequence {number + 1} of {len(videos)}"
            job.say(f"{subject.name}: {video.name}: {summary(scores[video.name])} ({place})")
        everyone = {name: score for part in job.gather(scores) for name, score in part.items()}
        objects = [everyone[video.name] for video in videos]
        J, F_ = (100 * float(np.mean([value for score in objects for value in score[name]])) for name in ("J", "F"))
        rows.append({"features": subject.name, "J&F": (J + F_) / 2, "J": J, "F": F_})
    draw(job, job.out / "davis-masks.png", lambda: picture(job, videos))
    return Result(rows, "DAVIS 2017" if sorted(video.name for video in videos) == OFFICIAL.split() else None)


def handed_out(job: Job, videos: Sequence[Video]) -> Iterator[tuple[int, Video]]:
    """The videos with their places, each to one rank, the next to whichever is free: they finish at about one time."""
    counter = f"davis/{job.gather(secrets.token_hex(8))[0]}"
    while (place := job.ranks.store.add(counter, 1) - 1) < len(videos):
        yield place, videos[place]


def open_videos(root: Path) -> list[Video]:
    """The sequences that ImageSets/2017/val.txt names. Raises ValueError that says what was looked for."""

    def wanted(what: str) -> ValueError:
        return ValueError(
            f"--data {root}: {what}; wanted DAVIS 2017 at 480p: ImageSets/2017/val.txt, and for each name SEQ in it "
            "JPEGImages/480p/SEQ/00000.jpg and Annotations/480p/SEQ/00000.png, one of each for every frame"
        )

    table = root / "ImageSets/2017/val.txt"
    if not table.is_file():
        raise wanted(f"there is no {table}")
    videos = []
    for name in table.read_text().split():
        frames = sorted((root / "JPEGImages/480p" / name).glob("*.jpg"))
        truths = [root / "Annotations/480p" / name / f"{frame.stem}.png" for frame in frames]
        if len(frames) < 3:
            raise wanted(f"{root / 'JPEGImages/480p' / name} has {len(frames)} .jpg; at least 3 can be judged")
        if missing := [truth for truth in truths if not truth.is_file()]:
            raise wanted(f"{len(missing)} of {len(truths)} annotations are missing, for example {missing[0]}")
        videos.append(Video(name, frames, truths))
    if not videos:
        raise wanted(f"{table} names no sequence")
    return videos


def judge(
    video: Video, files: str, subject: Subject, folder: Path, how: Propagation, size: int
) -> dict[str, list[float]]:
    """J and F of each object, 0 to 1, means over frames; read from `folder` if it has them of the same files (their
    fingerprint), or else written there."""
    settings = asdict(how) | {"size": size, "files": files}
    path = folder / f"{video.name}.json"
    if path.is_file() and (known := json.loads(path.read_text()))["settings"] == settings:
        return known["scores"]
    path.unlink(missing_ok=True)  # of other settings, whose masks are about to be replaced
    scores = measure(video, subject, folder / video.name, how, size)
    write(path, {"scores": scores, "settings": settings})
    return scores


def measure(video: Video, subject: Subject, masks: Path, how: Propagation, size: int) -> dict[str, list[float]]:
    """J and F of each object. Writes the masks of all frames, as the first annotation is written, to `masks`."""
    masks.mkdir(parents=True, exist_ok=True)
    device = subject.encoder.pos_embed.device
    first, colours = indices(video.truths[0])
    start = torch.from_numpy(first).to(device).long()
    start[start == VOID] = 0
    number = torch.arange(1, int(start.max()) + 1, device=device)[:, None, None]
    if not len(number):
        raise ValueError(f"{video.truths[0]} shows no object; wanted one at least in the first frame")
    save(start, colours, masks / video.truths[0].name)
    frames = (frame.to(device) for frame in read_frames(video.frames, size, subject.encoder.patch_embed.patch_size))
    J, F_ = [], []
    found = track(partial(patches, subject.encoder), frames, start, how)
    for truth, labels in zip(video.truths[1:], found, strict=True):
        save(labels, colours, masks / truth.name)
        if truth == video.truths[-1]:
            break
        actual = torch.from_numpy(indices(truth)[0]).to(device)
        if actual.shape != labels.shape:
            raise ValueError(f"{truth} is {list(actual.shape)}, the first annotation {list(labels.shape)}")
        compared = labels == number, actual == number, actual == VOID
        J.append(region_similarity(*compared))
        F_.append(contour_accuracy(*compared))
    return {name: torch.stack(values).mean(0).tolist() for name, values in (("J", J), ("F", F_))}


def patches(encoder: VisionTransformer, frame: Tensor) -> Tensor:
    """The features [h, w, D] of a frame uint8 [H, W, 3] of any multiples of the patch."""
    H, W, _ = frame.shape
    P = encoder.patch_embed.patch_size
    encoder.allow((H, W))
    return encoder(frame[None])[0].unflatten(0, (H // P, W // P))


def read_frames(paths: list[Path], size: int, patch: int) -> Iterator[Tensor]:
    """Frames, uint8 [H, W, 3], resized: the shorter side to about `size` pixels, both to multiples of `patch`.

    DINO rounds the longer side to a multiple of 64: 480 x 832 where patches of 16 give 480 x 848.
    """
    for path in paths:
        image = open_picture(path)
        scale = size // patch / min(image.size)
        width, height = (max(1, round(side * scale)) * patch for side in image.size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        yield torch.from_numpy(np.array(resized))


def indices(path: Path) -> tuple[np.ndarray, list[int] | None]:
    """The objects of an annotation, uint8 [H, W], and its palette."""
    image = open_picture(path)
    if image.mode not in ("P", "L"):
        raise ValueError(f"{path}: a picture of mode {image.mode}; wanted indices of objects (P: with a palette)")
    return np.array(image), image.getpalette()


def save(labels: Tensor, colours: list[int] | None, path: Path) -> None:
    image = Image.fromarray(labels.byte().cpu().numpy())
    if colours:
        image.putpalette(colours)
    image.save(path)


def summary(scores: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {100 * float(np.mean(values)):.1f}" for name, values in scores.items())


def picture(job: Job, videos: list[Video]) -> None:
    """davis-masks.png: the truth and every encoder's masks, of sequences spread evenly over the set."""
    clips = []
    for i in np.unique(np.linspace(0, len(videos) - 1, SHOWN).round().astype(int)):
        video = videos[i]
        chosen = np.unique(np.linspace(0, len(video.frames) - 2, MOMENTS).round().astype(int)).tolist()
        images = [np.asarray(open_picture(video.frames[t]).convert("RGB")) for t in chosen]
        masks: dict[str, list[Any]] = {"truth": [indices(video.truths[t])[0] for t in chosen]}
        for subject in job.subjects:
            folder = job.out / "davis" / subject.key
            scores = json.loads((folder / f"{video.name}.json").read_text())["scores"]
            title = f"{subject.name}\n{summary(scores)}"
            masks[title] = [indices(folder / video.name / video.truths[t].name)[0] for t in chosen]
        clips.append(Clip(video.name, chosen, images, masks))
    masks_on_frames(clips, job.out / "davis-masks.png")
