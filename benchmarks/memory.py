"""Memory of one rank at each ZeRO stage: the formula of engine/jepa/train/memory.py and the tensors of real ranks.

    python benchmarks/memory.py               computed: ViT-H/14 and ViT-g/16 on 8, 16 and 64 GPUs
    python benchmarks/memory.py --measure     measured: a small model on 1, 2 and 4 CPU ranks, against the formula

The measurement adds up the distinct storages of the tensors that a rank has created, after the forward, during the
backward and in the optimizer step, and takes the maximum. The images are so small that activations, which the formula
only estimates, are negligible. If a figure is off by more than 5 %, the program exits with an error. (At ZeRO-2 both
ranks that share a parameter hold its whole gradient: negligible in a large model, 4 % of this one's memory on 4 ranks.)
"""

import gc
import itertools
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels")]

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from jepa.config.file import load_config, parse_config
from jepa.config.schema import Config
from jepa.data.masks import sample_masks
from jepa.model.layout import Layout
from jepa.ranks.distributed import leave
from jepa.ranks.program import Parser, run_program
from jepa.train import memory, zero
from jepa.train.budget import longest_tokens
from jepa.train.step import start_model

LARGE = {"ViT-H/14": "in1k_vith14_ep300_ijepa", "ViT-g/16": "in22k_vitg16_ep44_ijepa"}
CASES = [*itertools.product(range(4), ("fp32", "bf16"), (1, 2))]  # stage, precision, micro-batches accumulated
QUICK = [case for case in CASES if case[1:] == ("bf16", 2)]
TOKENS = 8, 3, 8  # approximate patches in a context, a target and all targets of the small model
TOLERANCE = 0.05


def computed() -> str:
    """The README's table. Raises ConfigError."""
    lines = ["GiB at the longest context | ZeRO | 8 GPUs | 16 GPUs | 64 GPUs | of which activations"]
    for (name, file), stage in itertools.product(LARGE.items(), (1, 2, 3)):
        path, change = ROOT / f"engine/configs/{file}.yaml", f"engine.zero_stage={stage}"
        config = load_config(path, [change, "engine.global_batch_size=null"])
        tokens = longest_tokens(config)
        found = [memory.memory_per_rank(config, ranks, tokens) for ranks in (8, 16, 64)]
        totals = " | ".join(f"{one.total / 2**30:{width}.1f}" for one, width in zip(found, (6, 7, 7), strict=True))
        what = f"{name}, {config.data.batch_size} images/GPU"
        lines.append(f"{what:<26} | {stage:>4} | {totals} | {found[0].activations / 2**30:.1f}")
    return "\n".join(lines)


def small(stage: int, precision: str, accumulation: int) -> Config:
    return parse_config(
        {
            "meta": {
                "model_name": "vit_small", "embed_dim": 320, "depth": 6, "num_heads": 4, "pred_depth": 1,
                "pred_emb_dim": 64, "pred_num_heads": 2, "use_bfloat16": precision == "bf16",
            },
            "data": {"root_path": "nowhere", "batch_size": 1, "crop_size": 32},
            "mask": {"patch_size": 8, "min_keep": 1},
            "optimization": {"epochs": 100},
            "engine": {"zero_stage": stage, "gradient_accumulation_steps": accumulation},
            "logging": {"folder": "nowhere"},
        }
    )  # fmt: skip


def storages() -> dict[int, int]:
    """Address and bytes of the storages of tensors created since the last `gc.freeze`."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor):
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def peak(config: Config) -> int:
    """Peak bytes of this rank's tensors in the second step of a run."""
    gc.collect()
    gc.freeze()
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        if sum(storages().values()) > most:
            time.sleep(0.2)  # gloo's threads release what they have sent a little later
            most = max(most, sum(storages().values()))

    model_engine, teacher = start_model(config, torch.device("cpu"))
    assert teacher is not None
    if config.engine.zero_stage in (1, 2):
        flatten = model_engine.optimizer.flatten_dense_tensors_aligned

        def flatten_and_look(*args: Any) -> Tensor:
            flat = flatten(*args)
            look()
            return flat

        model_engine.optimizer.flatten_dense_tensors_aligned = flatten_and_look
    for step in range(2):
        if step:
            for block in model_engine.module.encoder.blocks[::2]:
                block.register_full_backward_hook(look)
            model_engine.basic_optimizer.register_step_pre_hook(look)
        for _ in range(config.batch(dist.get_world_size()).accumulation):
            masks = sample_masks(config.mask_spec, seed=0, step=step, first=0, batch=config.data.batch_size)
            images = torch.randint(0, 256, (config.data.batch_size, 32, 32, 3), dtype=torch.uint8)
            zero.schedule(model_engine, torch.tensor([1e-3, 0.1, 0.9], dtype=torch.float64))
            loss = model_engine(
                [images], Layout(masks.context, masks.target, (), masks.target, (0, 0)), teacher(images)
            ).loss
            if step:
                look()
            model_engine.backward(loss)
            zero.step(model_engine)
        teacher.follow()
    return most


def rank(me: int, world_size: int, folder: str, cases: list[tuple[int, str, int]]) -> None:
    """Measures the cases; rank 0 writes the maximum over the ranks to `folder`."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    os.environ |= {"RANK": str(me), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(me), "DS_ACCELERATOR": "cpu"}
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=me, world_size=world_size)
    torch.set_num_threads(1)
    # Smaller than this model, as the buffers are for the large ones.
    zero.BUCKET = memory.BUCKET = 500_000
    zero.LIVE = memory.LIVE = 1_000_000
    memory.WORKSPACE = 0
    figures = []
    for case in cases:
        config = small(*case)
        found = torch.tensor(float(peak(config)))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        figures.append((float(found), memory.memory_per_rank(config, world_size, TOKENS).total))
    if me == 0:
        torch.save(figures, f"{folder}/figures")
    dist.destroy_process_group()
    leave(lambda: 0)


def measured(worlds: list[int], cases: list[tuple[int, str, int]]) -> int:
    """Prints the figures; returns how many are off the formula by more than TOLERANCE."""
    wrong = 0
    print("ranks | ZeRO | precision | accumulation | measured MiB | formula MiB | off by")
    for world_size in worlds:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank, (world_size, folder, cases), nprocs=world_size)
            figures = torch.load(f"{folder}/figures", weights_only=True)
        for (stage, precision, accumulation), (found, formula) in zip(cases, figures, strict=True):
            off = found / formula - 1
            wrong += not abs(off) <= TOLERANCE
            print(
                f"{world_size:5} | {stage:4} | {precision:9} | {accumulation:12} | {found / 2**20:12.2f} | "
                f"{formula / 2**20:11.2f} | {100 * off:+.1f} %"
            )
    return wrong


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure a small model on CPU ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="with --measure")
    parser.add_argument("--quick", action="store_true", help="with --measure: only bf16 and two micro-batches")
    args = parser.parse_args()
    if not args.measure:
        print(computed())
        return 0
    if wrong := measured(args.ranks, QUICK if args.quick else CASES):
        print(f"{wrong} figures are off the formula by more than {TOLERANCE:.0%}", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(run_program(main, ValueError, OSError))
