"""Bytes that a step sends at each ZeRO stage and number of GPUs, counted and modelled; where a step's time goes; and
the hours of a run.

    python benchmarks/scaling.py [--config engine/configs/in1k_vith14_ep300_ijepa.yaml] [--share 0.5] [--no-check]
                                 [--out benchmarks/results/step-model]

Times are a MODEL, not a measurement. The step of three models on two GPUs by category: see step_model.py. The hours:
compute at `--share` of the peak for any batch size, collectives by the bytes that a ring sends, without overlap, the
optimizer by the bytes that it moves. Only the bytes sent are checked: the engine runs on one and two CPU processes at
stages 0 to 3, every collective is counted, and the formulas below must give the same bytes (up to DeepSpeed's padding
and a few scalars), or the run fails.

S: bytes of the tensor that is reduced or gathered. In a ring each rank sends 2 (N - 1) / N S for an all-reduce and
(N - 1) / N S for an all-gather or reduce-scatter. Between machines, rings share a machine's adapters: the bandwidth per
GPU is min(NVLink, adapters x InfiniBand). Defaults: data sheets of NVIDIA A100 SXM 80 GB (312 TFLOP/s dense bf16,
2039 GB/s memory, NVLink 300 GB/s each way) and DGX A100 (8 GPUs, 8 x 200 Gbit/s InfiniBand); `--efficiency`, the
fraction of a link's rate that a collective reaches, is an assumption.
"""

import importlib
import itertools
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("kernels", "engine")]

import step_report
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import ROOT, provenance
from runners import Synthetic
from step_model import gradient_bytes, optimizer_bytes, predictive

from jepa.config.file import load_config, parse_config
from jepa.config.schema import Config
from jepa.methods import build
from jepa.ranks import distributed
from jepa.ranks.program import Parser, run_program
from jepa.train import zero
from jepa.train.budget import flops_per_image, parameters
from jepa.train.step import start_model, take_step
from jepa.train.zero import LIVE

IMAGENET, EPOCHS, PAPER_HOURS, PAPER_GPUS = 1_281_167, 300, 72, 16  # arXiv 2301.08243: "in under 72 hours"
GPUS, KINDS = (1, 8, 16, 64, 256), ("gradients", "weights", "teacher", "statistics")
PERSISTENT = 100_000  # elements: up to here a parameter stays whole on every rank (DeepSpeed's stage 3 default)
PADDING = 256  # bytes: DeepSpeed's group padding, the gradient norm, the gradients of three losses
# A run small enough for CPU ranks; C-JEPA, so that its statistics are counted too.
SMALL = {
    "meta": {"model_name": "vit_tiny", "embed_dim": 192, "depth": 2, "num_heads": 2, "pred_depth": 2,
             "pred_emb_dim": 32, "pred_num_heads": 2},
    "data": {"root_path": "-", "batch_size": 4, "crop_size": 32},
    "mask": {"patch_size": 4, "min_keep": 4},
    "optimization": {"epochs": 1, "warmup": 0},
    "loss": {"objective": "cjepa", "projector": [40, 24, 20]},
    "engine": {"gradient_accumulation_steps": 2},
    "logging": {"folder": "-"},
}  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """One kind of traffic in a step: the collective, and the total bytes S of its tensors."""

    what: str
    op: str
    size: float

    def on_wire(self, ranks: int) -> float:
        """Bytes that a rank sends."""
        return (2 if self.op == "all_reduce" else 1) * (ranks - 1) / ranks * self.size


def traffic(config: Config, ranks: int, accumulation: int, live: int = LIVE) -> list[Sent]:
    """The collectives of one of `ranks` ranks in a step of `accumulation` micro-batches; `live`: see zero.LIVE."""
    count, size, stage = parameters(config), 2 if config.precision == "bf16" else 4, config.engine.zero_stage
    whole = size * count.total
    if ranks == 1 and stage in (1, 2):
        return []
    if stage < 3:
        # At stages 1 and 2 too, DeepSpeed all-reduces buckets (use_multi_rank_bucket_allreduce) and each rank keeps its
        # shard; stage 2 does so after every micro-batch.
        sent = [Sent("gradients", "all_reduce", whole * (accumulation if stage == 2 else 1))]
    else:
        sent = [Sent("gradients", "reduce_scatter", whole * accumulation)]
    if ranks == 1:
        return sent  # stages 0 and 3 reduce even on one rank; nothing else is called
    if stage in (1, 2):
        sent.append(Sent("weights", "all_gather", whole))
    if stage == 3:
        # Small parameters are whole on every rank and gathered after the step. The others are gathered for each
        # forward, and again for the backward if they are too many to keep in between (upper bound: a few may be kept).
        with torch.device("meta"):
            sizes = [p.numel() for p in build(config).parameters()]
        small = sum(n for n in sizes if n <= PERSISTENT)
        times = accumulation * (1 if count.total <= live else 2)
        sent.append(Sent("weights", "all_gather", size * (small + times * (count.total - small))))
    if stage:
        sent.append(Sent("teacher", "all_gather", size * count.averaged))
    if config.method.couples_images(config):
        sent += [Sent("statistics", op, accumulation * n) for op, n in statistics_bytes(config, ranks, size).items()]
    return sent


def by_kind(sent: list[Sent], ranks: int) -> dict[str, float]:
    """Bytes that a rank sends."""
    return {kind: sum(s.on_wire(ranks) for s in sent if s.what == kind) for kind in KINDS}


def wire(config: Config, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends in a step of one micro-batch."""
    return by_kind(traffic(config, ranks, accumulation=1), ranks)


def statistics_bytes(config: Config, ranks: int, size: int) -> dict[str, float]:
    """Per micro-batch: the projector's batch norms (fp32 mean and variance, forward and backward) and VICReg."""
    widths = predictive(config).projector_widths(config)[1:]
    M, G, d = config.mask.num_pred_masks, config.data.batch_size * ranks, widths[-1]
    norms = sum(4 * 4 * width for width in widths[:-1])
    if d <= G and G * size > 2 * d * 4:  # as in jepa_kernels.vicreg: send matrices, otherwise rows
        return {"all_reduce": norms + 4 * (M * d + 1) + 4 * M * d * d}
    return {"all_reduce": norms, "all_gather": size * G * M * d}


# --- counting what the engine sends

OPS = {
    "all_reduce": ("all_reduce", "tensor", 0),
    "reduce": ("reduce", "tensor", 0),
    "all_gather_into_tensor": ("all_gather", "output_tensor", 0),
    "all_gather_single": ("all_gather", "output_tensor", 0),
    "reduce_scatter_tensor": ("reduce_scatter", "input", 1),
    "reduce_scatter_single": ("reduce_scatter", "input", 1),
}


def count_collectives(into: Counter[str]) -> None:
    """From now on, adds up the bytes S of every collective that this process calls, by kind, in `into`."""
    for name, (kind, key, place) in OPS.items():
        if (call := getattr(dist, name, None)) is not None:

            def counting(
                *args: Any,
                call: Callable[..., Any] = call,
                kind: str = kind,
                key: str = key,
                place: int = place,
                **kwargs: Any,
            ) -> Any:
                tensor = kwargs[key] if key in kwargs else args[place]
                into[kind] += tensor.numel() * tensor.element_size()
                return call(*args, **kwargs)

            setattr(dist, name, counting)
    # It bound its collective when it was imported.
    vicreg = importlib.import_module("jepa_kernels.vicreg")
    vicreg._all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # type: ignore[attr-defined]


def step_bytes(config: Config, ranks: distributed.Ranks, seen: Counter[str]) -> dict[str, int]:
    """Bytes S of the collectives of one engine step, after two steps of warm-up."""
    model_engine, teacher = start_model(config, ranks.device)
    images = Synthetic(config, ranks.device, config.batch(ranks.world_size).accumulation)
    for step in range(3):
        seen.clear()
        zero.schedule(model_engine, torch.tensor([1e-4, 0.04, 0.99], dtype=torch.float64))
        take_step(config, ranks, model_engine, teacher, images.batches(step), step)
    found = dict(seen)
    model_engine.destroy()
    return found


def one_rank(rank: int, world_size: int, folder: str, configs: list[Config]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    zero.LIVE = 1  # as for a large model: nothing stays gathered between forward and backward
    seen: Counter[str] = Counter()
    count_collectives(seen)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    world = dist.group.WORLD
    assert world is not None
    ranks = distributed.Ranks(rank, world_size, torch.device("cpu"), store, world)
    found = [step_bytes(config, ranks, seen) for config in configs]
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    distributed.leave(lambda: 0)


def check(stages: Sequence[int] = range(4), worlds: Sequence[int] = (1, 2)) -> list[dict[str, Any]]:
    """Bytes counted in real runs and those of `traffic`: one row per stage, precision, number of ranks and op."""
    cases = [*itertools.product(stages, (False, True))]
    overrides = [[f"engine.zero_stage={stage}", f"meta.use_bfloat16={bf16}"] for stage, bf16 in cases]
    configs = [parse_config(SMALL, words) for words in overrides]
    rows = []
    for world_size in worlds:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(one_rank, (world_size, folder, configs), nprocs=world_size)
            found = json.loads(Path(folder, "found.json").read_text())
        for (stage, _), config, counted in zip(cases, configs, found, strict=True):
            wanted: Counter[str] = Counter()
            for sent in traffic(config, world_size, config.batch(world_size).accumulation, live=1):
                wanted[sent.op] += int(sent.size)
            for op in sorted(wanted.keys() | counted.keys()):
                row = {"ranks": world_size, "stage": stage, "precision": config.precision, "op": op}
                rows.append(row | {"counted": counted.get(op, 0), "modelled": wanted[op]})
    return rows


def disagreeing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in rows if abs(r["counted"] - r["modelled"]) > PADDING + 0.001 * r["modelled"]]


# --- modelling a run


@dataclass(frozen=True)
class Cluster:
    """Rates of one GPU and its links in FLOP/s and bytes/s; `share`: the fraction of the peak that compute reaches."""

    peak: float
    share: float
    memory: float
    nvlink: float
    infiniband: float
    per_machine: int

    def bandwidth(self, ranks: int) -> float:
        return self.nvlink if ranks <= self.per_machine else min(self.nvlink, self.per_machine * self.infiniband)


def model(config: Config, cluster: Cluster, ranks: int, stage: int) -> dict[str, Any]:
    """A step of the recipe's global batch on `ranks` GPUs, nothing overlapped."""
    wanted = config.engine.global_batch_size or config.data.batch_size * PAPER_GPUS
    micro = max(1, min(config.data.batch_size, wanted // ranks))
    accumulation = max(1, wanted // (ranks * micro))
    overrides = [f"engine.zero_stage={stage}", f"data.batch_size={micro}", "engine.global_batch_size=null"]
    here = parse_config(config.model_dump(), [*overrides, f"engine.gradient_accumulation_steps={accumulation}"])
    images = micro * accumulation
    compute = images * sum(flops_per_image(here).values()) / (cluster.peak * cluster.share)
    optimizer = optimizer_bytes(here) / cluster.memory / (ranks if stage else 1)
    reduction = gradient_bytes(here, ranks) / cluster.memory
    sent = traffic(here, ranks, accumulation)
    on_wire = by_kind(sent, ranks)
    links = sum(on_wire.values()) / cluster.bandwidth(ranks)
    seconds = compute + optimizer + reduction + links
    return {
        "gpus": ranks, "stage": stage, "images_per_gpu": images, "micro_batch": micro, "wire_bytes": on_wire,
        "compute_ms": 1e3 * compute, "links_ms": 1e3 * links, "step_ms": 1e3 * seconds,
        "images_per_second_per_gpu": images / seconds,
        "hours": EPOCHS * IMAGENET / (images * ranks / seconds) / 3600,
    }  # fmt: skip


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default=str(ROOT / "engine/configs/in1k_vith14_ep300_ijepa.yaml"), metavar="YAML")
    parser.add_argument("--peak", type=float, default=312, help="TFLOP/s per GPU (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.5, help="fraction of the peak that compute reaches (assumed)")
    parser.add_argument("--memory", type=float, default=2039, help="GB/s of GPU memory (default: %(default)s)")
    parser.add_argument("--nvlink", type=float, default=300, help="GB/s each way (default: %(default)s)")
    parser.add_argument("--infiniband", type=float, default=25, help="GB/s per adapter (default: %(default)s)")
    parser.add_argument("--per-machine", type=int, default=8, help="GPUs, one adapter each (default: %(default)s)")
    parser.add_argument("--efficiency", type=float, default=0.7, help="of a link (assumed; default: %(default)s)")
    parser.add_argument("--no-check", action="store_true", help="skip counting bytes in real runs")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write PATH.json, and the step's PATH.md and PATH.png")
    args = parser.parse_args()
    config = load_config(args.config)
    rows = [] if args.no_check else check()
    wrong = disagreeing(rows)
    if rows:
        print("Bytes per step of a small C-JEPA, counted in real runs / modelled:")
        for key, group in itertools.groupby(rows, lambda r: (r["ranks"], r["stage"], r["precision"])):
            cells = [f"{r['op']} {r['counted']:,} / {r['modelled']:,}" for r in group]
            print(f"  {key[0]} rank(s), ZeRO-{key[1]}, {key[2]}: " + "; ".join(cells))
        print(f"{len(rows) - len(wrong)} of {len(rows)} agree\n")
    steps = step_report.markdown(wire)
    print(steps + "\n")
    links = args.efficiency * 1e9
    cluster = Cluster(
        args.peak * 1e12, args.share, args.memory * 1e9, args.nvlink * links, args.infiniband * links, args.per_machine
    )
    print(
        f"MODEL, not a measurement: {Path(args.config).stem}, {EPOCHS} epochs of {IMAGENET:,} images; "
        f"{args.share:.0%} of {args.peak:g} TFLOP/s (assumed), links at {args.efficiency:.0%} of "
        f"{args.nvlink:g} (NVLink) and {args.infiniband:g} GB/s (one adapter per GPU)\n"
        "| GPUs | ZeRO | images per GPU | " + " | ".join(f"{kind} MB" for kind in KINDS) + " | links ms | step ms | "
        "images/s per GPU | hours |\n" + "|---" * (7 + len(KINDS)) + "|"
    )
    runs = [model(config, cluster, gpus, stage) for gpus in GPUS for stage in range(4)]
    for r in runs:
        megabytes = " | ".join(f"{r['wire_bytes'][kind] / 1e6:.1f}" for kind in KINDS)
        print(
            f"| {r['gpus']} | {r['stage']} | {r['images_per_gpu']} | {megabytes} | {r['links_ms']:.1f} | "
            f"{r['step_ms']:.0f} | {r['images_per_second_per_gpu']:.0f} | {r['hours']:.1f} |"
        )
    flops = sum(flops_per_image(config).values())
    paper = EPOCHS * IMAGENET / (PAPER_HOURS * 3600 * PAPER_GPUS)
    mine = next(r for r in runs if (r["gpus"], r["stage"]) == (PAPER_GPUS, config.engine.zero_stage))
    print(
        f"\nThe paper: under {PAPER_HOURS} h on {PAPER_GPUS} A100, at least {paper:.1f} images/s per GPU, "
        f"{paper * flops / (args.peak * 1e12):.1%} of the peak. The model: {mine['hours']:.1f} h at "
        f"ZeRO-{mine['stage']} if compute reaches {args.share:.0%} of the peak; each further percentage point saves "
        f"{mine['hours'] * mine['compute_ms'] / mine['step_ms'] / (100 * args.share):.2f} h."
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        given = vars(args) | {"config": Path(args.config).name, "out": None}
        result = provenance(torch.device("cpu")) | {"parameters": given, "counted": rows}
        result |= {"steps": step_report.figures(wire), "modelled": runs}
        Path(f"{args.out}.json").write_text(json.dumps(result, indent=1) + "\n")
        Path(f"{args.out}.md").write_text(f"`{result['command']}`, commit {result['commit']}\n\n{steps}\n")
        step_report.picture(wire, Path(f"{args.out}.png"))
    if wrong:
        print(f"scaling.py: counted bytes differ from the model's: {wrong}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(run_program(main, ValueError, OSError))
