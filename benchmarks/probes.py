"""Probes of a million features: time and memory of knn and linear, beside scikit-learn on a tenth of them.

    python benchmarks/probes.py --folder /tmp/features --out benchmarks/results/probes-cpu.json

The features are drawn: classes whose means differ in random directions, width 1280. They are stored as evaluate.py
stores an encoder's (5 GB) and read as its probes read them, each in a process of its own whose peak of resident memory
is taken. Times are printed after the neighbours have been found equal to scikit-learn's, and the linear classifier as
accurate.
"""

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("engine", "kernels")]

from machine import provenance

from jepa.probes.features import DONE, Store
from jepa.probes.knn import nearest
from jepa.probes.linear import STRENGTHS, Axes, accuracy, fit
from jepa.ranks.program import Parser, run_program

CPU = torch.device("cpu")
CHUNK = 8192
CLASSES = 100
NEIGHBOURS = 20
LIMIT_GIB = 4.0


def labels(number: int) -> torch.Tensor:
    return torch.arange(number) % CLASSES


def draw(store: Store) -> None:
    """Rows are their class's mean plus noise, so that a linear classifier is right about nine times in ten."""
    store.create({"images": "drawn"})
    if (store.state() == DONE).all():
        return
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, store.width, generator=generator)
    for first in range(0, store.images, CHUNK):
        numbers = range(first, min(first + CHUNK, store.images))
        noise = torch.randn(len(numbers), store.width, generator=generator)
        store.write(numbers, [0.1 * means[torch.tensor(numbers) % CLASSES] + noise])


def find_neighbours(folder: Path, images: int, width: int, queries: int) -> dict[str, Any]:
    x = Store(folder, [0], images, width).read()
    begin = time.perf_counter()
    _, index = nearest(x, x, np.arange(queries), NEIGHBOURS, CPU)
    return {"queries": queries, "queries_per_second": queries / (time.perf_counter() - begin), "index": index.numpy()}


def classify(folder: Path, images: int, width: int, _: int) -> dict[str, Any]:
    """One epoch of all strengths at once, on nine tenths; accuracy on the rest."""
    x = Store(folder, [0], images, width).read()
    order = torch.randperm(images, generator=torch.Generator().manual_seed(1))
    held, fitted = order[: images // 10], order[images // 10 :]
    begin = time.perf_counter()
    axes = Axes(x, CPU)
    found = time.perf_counter()
    rows, y = axes.rotated(x), labels(images)
    solved = fit(rows, y, fitted, axes, STRENGTHS, CLASSES, epochs=1)
    end = time.perf_counter()
    return {
        "heads": len(STRENGTHS),
        "axes_s": found - begin,
        "epoch_s": end - found,
        "accuracy": 100 * max(accuracy(solved, rows, y, held)),
    }


def scikit(folder: Path, images: int, width: int, queries: int) -> dict[str, Any]:
    """The same of a tenth of the features, in memory, as scikit-learn holds them; one strength."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestNeighbors

    x, tenth = Store(folder, [0], images, width).read(), images // 10
    rows, y = x[:tenth].numpy(), labels(tenth).numpy()
    begin = time.perf_counter()
    index = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine", algorithm="brute").fit(rows)
    found = index.kneighbors(rows[:queries], return_distance=False)
    neighbours = time.perf_counter()
    scaled = (rows - rows.mean(0)) / rows.std(0)
    kept = tenth - tenth // 10
    solved = LogisticRegression(C=1 / (1e-3 * kept), max_iter=100).fit(scaled[:kept], y[:kept])
    end = time.perf_counter()
    return {
        "queries_per_second": queries / (neighbours - begin),
        "fit_s": end - neighbours,
        "iterations": int(solved.n_iter_[0]),
        "accuracy": 100 * float(solved.score(scaled[kept:], y[kept:])),
        "index": found,
    }


def alone(work: Callable[..., dict[str, Any]], *args: object) -> dict[str, Any]:
    """The result of `work`, and its peak of resident memory in GiB, in a new process."""
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_alone, args=(send, work, args))
    process.start()
    send.close()
    result = receive.recv()
    process.join()
    return result


def _alone(send: Any, work: Callable[..., dict[str, Any]], args: tuple) -> None:
    result = work(*args)
    send.send(result | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the features; kept, and read by the next run")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--out", type=Path, metavar="JSON")
    args = parser.parse_args()
    places = args.folder / f"{args.images}x{args.width}", args.images, args.width, args.queries
    draw(Store(places[0], [0], args.images, args.width))
    small = places[0].with_name(f"{args.images // 10}x{args.width}"), args.images // 10, args.width, args.queries
    draw(Store(small[0], [0], args.images // 10, args.width))
    theirs, same = alone(scikit, *places), alone(find_neighbours, *small)
    agreeing = float((theirs["index"] == same["index"]).mean())
    if agreeing < 0.999:  # a tie or two may differ
        raise RuntimeError(f"only {agreeing:.2%} of the neighbours are scikit-learn's")
    ours = {"knn": alone(find_neighbours, *places), "linear": alone(classify, *places)}
    if ours["linear"]["accuracy"] < theirs["accuracy"] - 0.5:
        raise RuntimeError(f"accuracy {ours['linear']['accuracy']:.1f} %, scikit-learn's {theirs['accuracy']:.1f} %")
    if (most := max(part["peak_gib"] for part in ours.values())) > LIMIT_GIB:
        raise RuntimeError(f"{most:.2f} GiB of memory; wanted at most {LIMIT_GIB}")
    for part in (theirs, *ours.values()):
        part.pop("index", None)
    result = provenance(CPU) | {"images": args.images, "width": args.width, "classes": CLASSES}
    result |= {"ours": ours, "scikit-learn on a tenth": theirs}
    knn, linear = ours["knn"], ours["linear"]
    print(f"{result['hardware']}; torch {result['versions']['torch']}, commit {result['commit']}")
    print(f"{args.images} features of width {args.width}, {CLASSES} classes")
    print(f"knn     {knn['queries_per_second']:8.1f} queries/s            peak {knn['peak_gib']:.2f} GiB")
    print(
        f"linear  {linear['epoch_s']:8.1f} s an epoch, {linear['heads']} heads   peak {linear['peak_gib']:.2f} GiB   ",
        end="",
    )
    print(f"{linear['accuracy']:.1f} % after one epoch; principal axes {linear['axes_s']:.1f} s")
    print(f"scikit-learn on {args.images // 10}: {theirs['queries_per_second']:.1f} queries/s; one classifier ", end="")
    print(f"{theirs['fit_s']:.1f} s in {theirs['iterations']} iterations, {theirs['accuracy']:.1f} %; ", end="")
    print(f"peak {theirs['peak_gib']:.2f} GiB")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, ValueError, OSError))
