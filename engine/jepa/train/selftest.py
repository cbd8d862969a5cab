"""Whether what is installed computes the right thing: the kernels, attention, one training step, one JPEG. In seconds.

Each part is a generator of findings, run by the doctor in a process of its own. The kernels are compared with their
plain PyTorch references where they are called: every op, on the inputs that its public function gives it.
"""

import io
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import jepa_kernels
from jepa.ranks.device import choose
from jepa.ranks.machine import Finding

NAMESPACE = "jepa_kernels"
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # largest difference, relative to the size of the reference
KEY = {"cpu": "CPU", "cuda": "CUDA"}
SERVED = {"cpu": "C++", "cuda": "Triton"}
CURE = {
    "cpu": "python setup.py build_ext --inplace; if that does not help, make test says more",
    "cuda": "rm -r ~/.triton/cache; pip install -c constraints.txt triton; else pytest -m gpu says more",
}


class Compare(TorchDispatchMode):
    """Runs the reference of every op of the kernels beside it. `error`: by op, the largest relative difference."""

    def __init__(self) -> None:
        super().__init__()
        self.error: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        copies = tree_map_only(Tensor, torch.clone, args)  # ops write into some of them
        result = func(*args, **(kwargs or {}))
        wanted = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *copies, **(kwargs or {}))
        name = func._opname
        pairs = zip(tree_flatten((args, result))[0], tree_flatten((copies, wanted))[0], strict=True)
        for got, want in pairs:
            if isinstance(got, Tensor) and got.is_floating_point():
                self.error[name] = max(self.error[name], difference(got, want))
        return result


def difference(got: Tensor, want: Tensor) -> float:
    """The largest, relative to the largest value of `want`; infinite where either is not finite."""
    if got.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    size = float(want.abs().max())
    found = float((got - want).abs().max()) / (size or 1.0)
    return found if math.isfinite(found) else math.inf


def call_every_op(device: torch.device, dtype: torch.dtype) -> None:
    """Every public function of the kernels, forward and backward, on small random inputs."""
    B, N, D, M, Kc, Kt = 4, 16, 32, 2, 9, 5
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    context_index = torch.rand(B, N, device=device).argsort(1)[:, :Kc]
    target_index = torch.rand(M, B, N, device=device).argsort(2)[:, :, :Kt]
    images = torch.randint(256, (B, 3, 32, 32), dtype=torch.uint8, device=device)
    jepa_kernels.patchify(
        images, context_index, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), patch_size=8, dtype=dtype
    )
    tokens = torch.randn(B, N, D, **like).requires_grad_()
    jepa_kernels.gather_tokens(tokens, context_index).square().sum().backward()
    context, mask = torch.randn(B, Kc, D, **like).requires_grad_(), torch.randn(D, **like).requires_grad_()
    position = torch.randn(N, D, **like)
    jepa_kernels.predictor_tokens(context, context_index, target_index, position, mask).square().sum().backward()
    predicted = torch.randn(M * B, Kt, D, **like).requires_grad_()
    (3 * jepa_kernels.prediction_loss(predicted, torch.randn(B, N, D, **like), target_index)).backward()
    for rows in (D // 2, 2 * D):  # fewer than columns, and more: two ways to compute it
        blocks = torch.randn(rows, M, D, **like).requires_grad_()
        torch.stack(jepa_kernels.vicreg(blocks)).sum().backward()
    views = torch.randn(2, 16, D, **like).requires_grad_()
    jepa_kernels.sigreg(views, jepa_kernels.sigreg_slices(D, 8, seed=1, step=2, device=device)).backward()
    teacher, student = torch.randn(100, device=device), torch.randn(100, **like)
    jepa_kernels.ema_([teacher], [student], 0.9)
    weight = torch.nn.Parameter(torch.randn(10, 10, device=device))
    optimizer = jepa_kernels.AdamWEMA([weight], lr=1e-3, momentum=0.9)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        optimizer.step()


def kernels(device: str) -> Iterator[Finding]:
    """Which kernel serves each op on the device, and whether each agrees with its reference."""
    place = choose(device)
    torch.manual_seed(0)
    worst: dict[str, float] = defaultdict(float)
    for dtype, close in CLOSE.items():
        with Compare() as compare:
            call_every_op(place, dtype)
        for op, error in compare.error.items():
            worst[op] = max(worst[op], error / close)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    plain = [op for op in jepa_kernels.OPS if not has(f"{NAMESPACE}::{op}", KEY[place.type])]
    served = [op for op in jepa_kernels.OPS if op not in plain]
    untried = [op for op in jepa_kernels.OPS if op not in worst]
    off = [op for op, error in worst.items() if error > 1]
    if served:
        yield Finding("ok", "ops", f"on {place.type}, {SERVED[place.type]}: {', '.join(served)}")
    if plain:
        yield Finding(
            "note", "ops", f"on {place.type}, plain PyTorch: {', '.join(plain)}", "python setup.py build_ext --inplace"
        )
    if off or untried:
        said = [f"differ from their references: {', '.join(off)}"] if off else []
        said += [f"not compared: {', '.join(untried)}"] if untried else []
        yield Finding("wrong", "self-test", "; ".join(said), CURE[place.type])
    else:
        yield Finding("ok", "self-test", f"{len(worst)} ops agree with their references, in fp32 and bf16")
    yield from attention(place)
    yield from optimizers(place)


def attention(place: torch.device) -> Iterator[Finding]:
    """What `engine.attention: sdpa` runs in, and the backends that could be asked for."""
    from jepa.model.attention import HOW_TO_GET, attend, require

    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    q, k, v = torch.randn(3, 2, 17, 2, 64, device=place, dtype=dtype).unbind()
    exact = attend(q.float(), k.float(), v.float(), "math")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused = attend(q, k, v)
    names = {
        event.name.removeprefix("aten::_scaled_dot_product_")
        for event in profile.events() or ()
        if "::_scaled_dot" in event.name
    }
    names = {name for name in names if "backward" not in name} or {"scaled_dot_product_attention"}
    also, off = [], ["sdpa"] if difference(fused, exact) > CLOSE[torch.bfloat16] else []
    for backend in HOW_TO_GET if place.type == "cuda" else ():
        try:
            require(backend)
            also.append(backend)
            if difference(attend(q, k, v, backend), exact) > CLOSE[torch.bfloat16]:
                off.append(backend)
        except ValueError:
            continue  # not installed
    said = f"sdpa, by {' and '.join(sorted(names))}" + (f"; also here: {', '.join(also)}" if also else "")
    if off:
        yield Finding(
            "wrong", "attention", f"{said}; wrong results: {', '.join(off)}", "give another: engine.attention=math"
        )
    else:
        yield Finding("ok", "attention", said)


def optimizers(place: torch.device) -> Iterator[Finding]:
    from jepa.train.optimizer import foreign

    here = ["torch"]
    for name in ("deepspeed", "apex"):
        try:
            foreign(name, place)
            here.append(name)
        except (ValueError, ImportError):
            continue
    yield Finding("ok", "optimizer", f"adamw_ema, in one pass; also here: {', '.join(here)}")


STEP: dict[str, dict[str, Any]] = {
    "meta": {
        "model_name": "vit_tiny", "embed_dim": 64, "depth": 2, "num_heads": 2,
        "pred_depth": 1, "pred_emb_dim": 32, "pred_num_heads": 2,
    },
    "data": {"synthetic": 64, "batch_size": 8, "crop_size": 64, "num_workers": 1},
    "mask": {"patch_size": 8},
    "optimization": {"epochs": 1, "warmup": 0},
    "engine": {"compile": False},
    "logging": {"folder": "unused"},
}  # fmt: skip


def step(device: str) -> Iterator[Finding]:
    """Two training steps of a small model on noise, by DeepSpeed, as a run takes them."""
    import torch.distributed as dist

    from jepa.config.file import parse_config
    from jepa.data.loader import Loader
    from jepa.data.synthetic import SyntheticImages
    from jepa.ranks import distributed
    from jepa.train import zero
    from jepa.train.schedules import Schedules, ScheduleTable
    from jepa.train.step import start_model, take_step

    place = choose(device)
    precision = "fp32" if place.type == "cpu" else "bf16"
    config = parse_config(STEP, [f"engine.device={place.type}", f"engine.precision={precision}"])
    warnings.filterwarnings("ignore")
    ranks = distributed.start(place.type, timeout_minutes=1)
    try:
        images = SyntheticImages(64, config.data.crop_size, seed=1)
        loader = Loader(images, config.method.views(config), batch_size=8, device=place, num_workers=1)
        model_engine, teacher = start_model(config, place)
        before = [p.detach().float().clone() for p in model_engine.module.parameters()]
        table = ScheduleTable(Schedules(config, loader.steps_per_epoch), 0, 2, zero.schedule_device(model_engine))
        batches, losses, applied = loader.batches(0, 2), [], []
        for number in range(2):
            zero.schedule(model_engine, table.next())
            done = take_step(config, ranks, model_engine, teacher, batches, number)
            table.count(done.applied)
            losses.append(float(done.losses[0][0]))
            applied.append(bool(done.applied))
        moved = any(
            bool((p.float() != old).any()) for p, old in zip(model_engine.module.parameters(), before, strict=True)
        )
    finally:
        dist.destroy_process_group()
    said = (
        f"loss {losses[0]:.4f}, then {losses[1]:.4f}, in {precision} on {place.type}, ZeRO {config.engine.zero_stage}"
    )
    if all(map(math.isfinite, losses)) and all(applied) and moved:
        yield Finding("ok", "training", said)
    else:
        why = "the weights did not move" if all(applied) else "a step was skipped: its gradient is not finite"
        yield Finding("wrong", "training", f"{said}; {why}", "make test, and report what fails")


def jpeg(device: str) -> Iterator[Finding]:
    """A JPEG by DALI, on the device a run would use, against Pillow's decoder."""
    from PIL import Image

    from jepa.data.decode import Decoder
    from jepa.data.synthetic import noise

    place = choose(device)
    encoded = io.BytesIO()
    Image.fromarray(noise(1, 96, seed=3)[0]).save(encoded, "JPEG", quality=95, subsampling=0)
    wanted = np.asarray(Image.open(encoded).convert("RGB"))

    def whole(sizes_B2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        box_B4 = np.concatenate([np.zeros_like(sizes_B2), sizes_B2], axis=1)
        return box_B4.astype(np.int32), box_B4.astype(np.float32)

    try:
        decoder = Decoder("auto", place, 1)
    except ValueError as error:
        yield Finding("note", "JPEG", "not tried: DALI cannot be imported", str(error).partition("Get it by ")[2])
        return
    pixels = decoder([np.frombuffer(encoded.getvalue(), np.uint8)], 96, whole)[0]
    apart = np.abs(pixels.cpu().numpy().astype(int) - wanted).max()
    where = "the GPU" if decoder.on_gpu else "the CPU"
    said = f"decoded on {where} by DALI, at most {apart} of 255 levels from Pillow {metadata.version('pillow')}"
    if apart <= 4:
        yield Finding("ok", "JPEG", said)
    else:
        yield Finding("wrong", "JPEG", said, "data.decoder=cpu; reinstall DALI")


PARTS = {"kernels": kernels, "step": step, "jpeg": jpeg}
