"""How fast images are prepared (read, decode, random resized crop to uint8, colours) with nothing else running.

    python benchmarks/data.py --images PATH [--crop 224] [--batch 64] [--threads 1 2 4] [--model-rate R] [--out X.json]

All rows crop the same images, interleaved; figures are medians over several rounds. The pixels are first compared with
Pillow's. "imperative" is the DALI mode that the loader uses, "pipeline" the other one, both fed from memory with the
same boxes; "Pillow" is what torchvision does, on one core; "loader" is the engine's loader, reading files: one crop of
an image, two views as VICReg makes them (and the same without flip and colours), or two global and six local ones. On a
GPU its decoder is measured too, with none, DALI's default share and all of the JPEGs on the hardware JPEG engine.
`--model-rate` (the images/s that the model consumes, or the JSON of benchmarks/throughput.py) adds which of the two is
the bottleneck, and how many cores a GPU needs.
"""

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("kernels", "engine")]

from machine import provenance
from PIL import Image

from jepa.data.augment import View, random_boxes
from jepa.data.decode import Decoder
from jepa.data.loader import Loader
from jepa.data.sources import open_images
from jepa.ranks.device import choose
from jepa.ranks.program import Parser, run_program

SCALE = (0.3, 1.0)  # as in the published recipe
LARGEST_DIFFERENCE = 1.0  # mean grey levels of an image, against Pillow's (GPU: another IDCT)
COLOURS: dict[str, Any] = {"flip": 0.5, "jitter": (0.4, 0.4, 0.2, 0.1), "grey": 0.2}
SHARES = (0.0, 0.65, 1.0)  # of the JPEGs, on the GPU's hardware JPEG engine; DALI's default is 0.65


@dataclass
class Work:
    """One batch: encoded images, and the box to crop from each, (top, left, height, width)."""

    encoded: list[np.ndarray]
    boxes: np.ndarray


@dataclass
class Line:
    """One row of the table. `run` makes all batches once and returns the number of images."""

    name: str
    threads: int
    run: Callable[[], int]
    pixels: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None  # some images, and Pillow's, for the check
    drain: Callable[[], object] = lambda: None  # before timing: consumes prefetched batches


def main() -> int:
    cores = len(os.sched_getaffinity(0))
    parser = Parser(description=__doc__)
    parser.add_argument("--images", required=True, help="a folder, a .txt list or tars")
    parser.add_argument("--crop", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=4, help="batches per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="the median is reported (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}), help="default: %(default)s")
    parser.add_argument("--model-rate", type=model_rate, help="the model's images/s, or throughput.py's JSON")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()

    device = choose()
    source = open_images(args.images)
    rng = np.random.default_rng(0)
    indices = np.resize(rng.permutation(len(source)), (args.batches, args.batch))
    works = [work_of([source.read(i) for i in row], rng) for row in indices]
    kilobytes = np.mean([len(e) for work in works for e in work.encoded]) / 1024
    print(
        f"{args.images}: {indices.size} crops of {args.crop} px per round, batch {args.batch}, {kilobytes:.0f} KB files"
    )

    lines = [Line("Pillow", 1, lambda: sum(len(with_pillow(work, args.crop)) for work in works))]
    expected = with_pillow(works[0], args.crop)
    for threads in args.threads:
        lines += [imperative(works, expected, threads), pipeline(works, expected, threads)]
        if device.type == "cuda":
            for share in SHARES:
                lines += [imperative(works, expected, threads, share), pipeline(works, expected, threads, share)]
        lines += [through_loader(name, views, args, threads, device) for name, views in views_of(args.crop).items()]
    differences, right = check(lines)
    rows = measure(right, args.rounds)
    show(rows, args.model_rate)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = provenance(device) | {"cores": cores}
        args.out.write_text(json.dumps(about | {"difference": differences, "rows": rows}, indent=1) + "\n")
    return 0 if len(right) == len(lines) else 1


def model_rate(text: str) -> float:
    """A number, or the engine's rate in a JSON of benchmarks/throughput.py."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return float(json.loads(Path(text).read_text())["model"]["rows"][0]["images_per_second"])
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text}: neither a number nor a result of throughput.py ({error})") from error


def work_of(encoded: list[np.ndarray], rng: np.random.Generator) -> Work:
    return Work(encoded, random_boxes(sizes_of(encoded), rng.random((len(encoded), 24)), SCALE))


def sizes_of(encoded: list[np.ndarray]) -> np.ndarray:
    """Heights and widths, [B, 2]."""
    return np.array([Image.open(io.BytesIO(e.tobytes())).size[::-1] for e in encoded])


def with_pillow(work: Work, crop: int) -> np.ndarray:
    images = []
    for encoded, (top, left, height, width) in zip(work.encoded, work.boxes.tolist(), strict=True):
        image = Image.open(io.BytesIO(encoded.tobytes())).convert("RGB").crop((left, top, left + width, top + height))
        images.append(np.asarray(image.resize((crop, crop), Image.Resampling.BILINEAR)))
    return np.stack(images)


def views_of(crop: int) -> dict[str, list[View]]:
    """One crop, VICReg's two views (arXiv 2105.04906), and global and local views in LeJEPA's scales (2511.08544)."""
    two = [View(crop, (0.08, 1.0), blur=blur, solarize=solarize, **COLOURS) for blur, solarize in ((1, 0), (0.1, 0.2))]
    large = View(crop, SCALE, blur=0.5, solarize=0.2, **COLOURS)
    small = replace(large, size=crop * 3 // 7, scale=(0.05, 0.3))
    return {
        "loader": [View(crop, SCALE)],
        "loader, 2 views, no colours": [colourless(view) for view in two],
        "loader, 2 views": two,
        "loader, 2 + 6 views": [large] * 2 + [small] * 6,
    }


def colourless(view: View) -> View:
    return View(view.size, view.scale)


def imperative(works: list[Work], expected: np.ndarray, threads: int, share: float | None = None) -> Line:
    crop = expected.shape[1]
    decoder = Decoder("auto", "cpu" if share is None else "cuda", threads)
    if share is not None:
        decoder.options["hw_decoder_load"] = share

    def make(work: Work) -> torch.Tensor:
        whole = (work.boxes * [0, 0, 1, 1]).astype(np.float32)
        return decoder(work.encoded, crop, lambda sizes: (work.boxes, whole))

    name = "imperative" if share is None else f"imperative, GPU {share:.0%} engine"
    run = lambda: sum(len(make(work)) for work in works)  # noqa: E731
    return Line(name, threads, run, lambda: (make(works[0]).cpu().numpy(), expected))


def pipeline(works: list[Work], expected: np.ndarray, threads: int, share: float | None = None) -> Line:
    from nvidia.dali import fn, pipeline_def

    ahead, feed, crop = 2, cycle(works), expected.shape[1]
    options: dict[str, Any] = {"device": "cpu"}
    if share is not None:
        options = {"device": "mixed", "hw_decoder_load": share, "jpeg_fancy_upsampling": True}

    def next_work() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        work = next(feed)
        return work.encoded, work.boxes[:, :2].copy(), work.boxes[:, 2:].copy()

    @pipeline_def(batch_size=len(works[0].encoded), num_threads=threads, prefetch_queue_depth=ahead)
    def graph():  # type: ignore[no-untyped-def]
        encoded, start, shape = fn.external_source(source=next_work, num_outputs=3, batch=True)
        pixels = fn.decoders.image_slice(
            encoded, start=start, shape=shape, axes=[0, 1], adjust_orientation=False, **options
        )
        return fn.resize(pixels, size=[crop, crop], antialias=True)

    built = graph(device_id=None if share is None else torch.cuda.current_device())
    built.build()

    def first() -> np.ndarray:
        (pixels,) = built.run()
        return np.asarray((pixels if share is None else pixels.as_cpu()).as_tensor())

    def run() -> int:
        number = sum(len(built.run()[0]) for _ in works)
        if share is not None:
            torch.cuda.synchronize()
        return number

    name = "pipeline" if share is None else f"pipeline, GPU {share:.0%} engine"
    return Line(name, threads, run, lambda: (first(), expected), drain=lambda: [built.run() for _ in range(ahead)])


def through_loader(name: str, views: list[View], args: argparse.Namespace, threads: int, device: torch.device) -> Line:
    """The engine's loader: reads files and prefetches batches, on the device that trains."""
    source = open_images(args.images)
    options: dict[str, Any] = {"batch_size": args.batch, "num_workers": threads, "device": device}
    loader = Loader(source, views, **options)

    def pixels() -> tuple[np.ndarray, np.ndarray]:
        """All views of a batch, without flip and colours (tests/data/test_augment.py has those)."""
        plain = Loader(source, [colourless(view) for view in views], **options)
        batch, index = plain.batch(0), {source.name(i): i for i in range(len(source))}
        encoded = [source.read(index[file]) for file in batch.files]
        uniform_BVK = plain.uniform(0, 0)
        ours, theirs = [], []
        for v, view in enumerate(views):
            assert view.scale
            work = Work(encoded, random_boxes(sizes_of(encoded), uniform_BVK[:, v], view.scale))
            ours.append(batch.views[v].cpu().numpy().reshape(len(encoded), -1))
            theirs.append(with_pillow(work, view.size).reshape(len(encoded), -1))
        return np.concatenate(ours, axis=1), np.concatenate(theirs, axis=1)

    return Line(name, threads, lambda: sum(len(b.files) for _, _, b in loader.batches(0, args.batches)), pixels)


def check(lines: list[Line]) -> tuple[dict[str, float], list[Line]]:
    """Each line's largest mean difference from Pillow's crops, in grey levels, and the lines that pass."""
    differences, right = {}, []
    for line in lines:
        gap = 0.0
        if line.pixels is not None:
            ours, theirs = line.pixels()
            gaps = np.abs(ours.astype(np.int16) - theirs).reshape(len(ours), -1)
            gap = float(gaps.mean(axis=1).max())
            differences[f"{line.name}, {line.threads} threads"] = gap
        if gap <= LARGEST_DIFFERENCE:
            right.append(line)
        else:
            print(f"{line.name}: an image differs from Pillow's by {gap:.2f} grey levels on average: NOT TIMED")
    worst = max(gap for gap in differences.values() if gap <= LARGEST_DIFFERENCE)
    print(f"crops match Pillow's: no other image differs by more than {worst:.2f} grey levels on average")
    return differences, right


def settle() -> None:
    """Waits until nothing runs in the background: a pipeline keeps filling its queue."""
    busy = 1.0
    while busy > 0.005:
        before = time.process_time()
        time.sleep(0.05)
        busy = time.process_time() - before


def measure(lines: list[Line], rounds: int) -> list[dict[str, Any]]:
    seconds: list[list[float]] = [[] for _ in lines]
    work: list[list[float]] = [[] for _ in lines]
    number = [line.run() for line in lines]  # warm-up
    for _ in range(rounds):
        for line, elapsed, busy in zip(lines, seconds, work, strict=True):
            settle()
            line.drain()
            begin, begin_busy = time.perf_counter(), time.process_time()
            line.run()
            elapsed.append(time.perf_counter() - begin)
            busy.append(time.process_time() - begin_busy)
    return [
        {
            "name": line.name,
            "threads": line.threads,
            "images_per_second": n / statistics.median(elapsed),
            "images_per_core_second": n / statistics.median(busy),
        }
        for line, n, elapsed, busy in zip(lines, number, seconds, work, strict=True)
    ]


def show(rows: list[dict[str, Any]], model_rate: float | None) -> None:
    print(f"{'':32}{'threads':>8}{'images/s':>10}{'per core-second':>17}")
    for row in rows:
        rates = f"{row['images_per_second']:10.0f}{row['images_per_core_second']:17.0f}"
        print(f"{row['name']:32}{row['threads']:8}{rates}")
    if model_rate is not None:
        best = max((row for row in rows if row["name"] == "loader"), key=lambda row: row["images_per_second"])
        rate, per_core = best["images_per_second"], best["images_per_core_second"]
        limit = "the model" if rate >= model_rate else "the data"
        print(f"loader {rate:.0f} images/s, model {model_rate:.0f}: limited by {limit} ({rate / model_rate:.2f} x)")
        print(f"at that rate this loader needs {model_rate / per_core:.2g} core(s) per device")


if __name__ == "__main__":
    sys.exit(run_program(main, ValueError, OSError))
