"""Swaps jepa_kernels into a plain PyTorch I-JEPA loop: the same losses, and the time saved.

    pip install . && python benchmarks/plain_ijepa.py       # --kernels on|off|both, --device, sizes: see --help

`Plain` and `Kernels` are the same model and training step, line by line. `Plain` uses what torch has: a convolution
that embeds every patch, indexing, fused AdamW, foreach lerp. Both start from the same weights and alternate on the same
images and masks, in float32. No time is printed unless all losses agree.
Shapes: B images, N patches, Kc/Kt kept in context/target, M target blocks, D width, Dp predictor width.
"""

import argparse
import statistics
import time
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kernels import AdamWEMA, gather_tokens, patchify, prediction_loss, predictor_tokens

MEAN, STD, PATCH, M = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 16, 4
ADAMW: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.05}
MOMENTUM, WARM_UP = 0.996, 3


def transformer(width: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)


class Model(nn.Module):
    teacher: nn.ModuleDict
    pos_ND: Tensor
    pos_NP: Tensor

    def __init__(self, N: int, D: int, depth: int) -> None:
        super().__init__()
        Dp = max(32, D // 64 * 32)
        self.student = nn.ModuleDict({"embed": nn.Conv2d(3, D, PATCH, PATCH), "blocks": transformer(D, depth)})
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.predictor = nn.ModuleDict({"in": nn.Linear(D, Dp), "blocks": transformer(Dp, 2), "out": nn.Linear(Dp, D)})
        self.mask_token = nn.Parameter(torch.zeros(Dp))
        self.register_buffer("pos_ND", 0.1 * torch.randn(N, D))
        self.register_buffer("pos_NP", 0.1 * torch.randn(N, Dp))
        self.only_student = [*self.predictor.parameters(), self.mask_token]


class Plain(Model):
    def start(self) -> None:
        self.optimizer = torch.optim.AdamW([*self.student.parameters(), *self.only_student], fused=True, **ADAMW)

    def loss(self, images: Tensor, context: Tensor, target: Tensor) -> Tensor:
        of = torch.arange(len(images), device=images.device)[:, None]  # the image of each index
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
        x = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        with torch.no_grad():
            tokens = self.teacher["embed"](x).flatten(2).mT + self.pos_ND
            goal = F.layer_norm(self.teacher["blocks"](tokens), tokens.shape[2:])[of, target]
        tokens = self.student["embed"](x).flatten(2).mT + self.pos_ND
        z = self.predictor["in"](self.student["blocks"](tokens[of, context])) + self.pos_NP[context]
        hidden = self.mask_token + self.pos_NP[target]
        tokens = torch.cat([z.expand(M, -1, -1, -1), hidden], 2).flatten(0, 1)
        pred = self.predictor["out"](self.predictor["blocks"](tokens)[:, context.shape[1] :])
        return F.smooth_l1_loss(pred, goal.flatten(0, 1))

    def update(self) -> None:
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.teacher.parameters()], [*self.student.parameters()], 1 - MOMENTUM)
        self.optimizer.zero_grad()


class Kernels(Model):
    def start(self) -> None:
        groups = [{"params": [*self.student.parameters()]}, {"params": self.only_student, "ema": False}]
        self.optimizer = AdamWEMA(groups, momentum=MOMENTUM, **ADAMW)
        for weight, average in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            self.optimizer.state[weight]["ema"] = average  # the teacher is the EMA itself: no copy

    def loss(self, images: Tensor, context: Tensor, target: Tensor) -> Tensor:
        def embed(encoder: nn.ModuleDict, index: Tensor | None) -> Tensor:
            rows = patchify(images, index, mean=MEAN, std=STD, patch_size=PATCH)
            weight, bias = encoder["embed"].parameters()
            return F.linear(rows, weight.flatten(1), bias)

        with torch.no_grad():
            goal = self.teacher["blocks"](embed(self.teacher, None) + self.pos_ND)
        pos = gather_tokens(self.pos_ND.expand(len(images), -1, -1), context)
        z = self.predictor["in"](self.student["blocks"](embed(self.student, context) + pos))
        tokens = predictor_tokens(z, context, target, self.pos_NP, self.mask_token)
        pred = self.predictor["out"](self.predictor["blocks"](tokens)[:, context.shape[1] :])
        return prediction_loss(pred, goal, target)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def draw(B: int, grid: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth random images [B, H, W, 3]; M random target blocks [M, B, Kt], and the context [B, Kc] that they leave."""
    images = F.interpolate(torch.rand(B, 3, grid // 2, grid // 2), [grid * PATCH] * 2, mode="bicubic").clamp(0, 1)
    side = torch.arange(max(2, round(0.4 * grid)))
    top, left = torch.randint(grid - len(side) + 1, (2, M, B, 1, 1))
    target = ((top + side[:, None]) * grid + left + side).flatten(2)
    hidden = torch.zeros(B, grid * grid, dtype=torch.uint8)
    hidden.scatter_(1, target.transpose(0, 1).flatten(1), 1)
    context = hidden.argsort(dim=1, stable=True)[:, : grid * grid - int(hidden.sum(1).max())]
    return (images * 255).byte().permute(0, 2, 3, 1).contiguous().to(device), context.to(device), target.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=("on", "off", "both"), default="both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in {"steps": 20, "batch": 32, "image": 128, "width": 192, "depth": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # only the plain loop's convolution would use it
    grid = args.image // PATCH
    kinds: list[type[Plain] | type[Kernels]] = [Plain, Kernels]
    kinds = {"off": kinds[:1], "on": kinds[1:], "both": kinds}[args.kernels]
    sides = [kind(grid * grid, args.width, args.depth).to(args.device) for kind in kinds]
    for side in sides:
        side.load_state_dict(sides[0].state_dict())
        side.start()
    losses: list[list[float]] = [[] for _ in sides]
    times: list[list[tuple[float, float, float]]] = [[] for _ in sides]
    for step in range(WARM_UP + args.steps):
        inputs = draw(args.batch, grid, args.device)
        for i, side in list(enumerate(sides))[:: 1 - step % 2 * 2]:  # alternating, for the same machine state
            start = now(args.device)
            loss = side.loss(*inputs)
            loss.backward()
            middle = now(args.device)
            side.update()
            end = now(args.device)
            losses[i].append(loss.item())
            times[i].append((middle - start, end - middle, end - start))
    print("plain: every patch embedded, indexing, AdamW(fused=True), torch._foreach_lerp_")
    sizes = f"{args.batch} images of {args.image} px, width {args.width}, depth {args.depth}, {args.steps} steps"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, {args.device}: {sizes}")
    if len(sides) == 2:
        worst = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
        print(f"loss {losses[0][0]:.6f} ... {losses[0][-1]:.6f}, largest relative difference in a step {worst:.1e}")
        assert worst <= 1e-5, "the losses differ: no time is printed"
    print(f"{'ms, medians':24}" + "".join(f"{kind.__name__.lower():>10}" for kind in kinds))
    for part, name in enumerate(("forward and backward", "optimizer and EMA", "whole step")):
        row = [1e3 * statistics.median(step[part] for step in steps[WARM_UP:]) for steps in times]
        print(f"{name:24}" + "".join(f"{ms:10.2f}" for ms in row) + (f"   {row[0] / row[1]:.2f}x" if row[1:] else ""))


def now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
