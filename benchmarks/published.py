"""The published I-JEPA code as a contender: its models, optimizer, losses and masks, imported from a checkout.

Its training loop is one function that cannot be called in parts, so the step here calls its pieces in its order, with
everything it does per step: schedules, autocast, gradient norms per layer, reading the loss back, the EMA as a loop
over parameters. Its data workers make masks and float images in advance; here both are made before the clock starts.
`sdpa` and `compiled` are what a user could add: SDPA in place of materialised attention, and torch.compile of each
block. SDPA is the engine's, which no length of the masks makes recompile and which goes without cuDNN
(`jepa/model/attention.py`).
"""

import copy
import importlib
import logging
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import Clock
from torch import Tensor, nn

from jepa.config.schema import MODELS, Config, ConfigError
from jepa.methods import DEFAULT, build
from jepa.model.attention import attend, require

MODULES = {
    "models": "src.models.vision_transformer",
    "helper": "src.helper",
    "collator": "src.masks.multiblock",
    "masks": "src.masks.utils",
    "tensors": "src.utils.tensors",
    "distributed": "src.utils.distributed",
    "logging": "src.utils.logging",
}


def checkout(path: Path) -> types.SimpleNamespace:
    """The modules of a checkout of facebookresearch/ijepa. Raises ConfigError if `path` is not one."""
    if not (path / "src/models/vision_transformer.py").is_file():
        raise ConfigError([f"reference={path}: not a checkout of the published code (no src/models)"])
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    found = types.SimpleNamespace(**{name: importlib.import_module(module) for name, module in MODULES.items()})
    logging.getLogger().setLevel(logging.WARNING)  # it logs its models
    return found


def as_floats(images: Tensor, config: Config) -> Tensor:
    """uint8 [B, H, W, 3] -> what its data loader delivers: normalised fp32 [B, 3, H, W]."""
    mean, std = (torch.tensor(x, device=images.device) for x in (config.data.mean, config.data.std))
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def sdpa_forward(attention: Any, x: Tensor) -> tuple[Tensor, None]:
    B, N, C = x.shape
    q, k, v = attention.qkv(x).view(B, N, 3, attention.num_heads, -1).unbind(2)
    return attention.proj(attend(q, k, v).reshape(B, N, C)), None


class Published:
    """Its model with our initial weights, its optimizer, and its step."""

    def __init__(self, path: Path, config: Config, device: torch.device, sdpa: bool, compiled: bool) -> None:
        if config.loss.objective != DEFAULT:
            raise ConfigError([f"loss.objective: the published code only has {DEFAULT}: set loss.objective={DEFAULT}"])
        if config.vit != MODELS[config.meta.model_name] or config.predictor.num_heads != config.vit.num_heads:
            raise ConfigError(["meta: the published code only has the named sizes, the predictor with as many heads"])
        if config.mask.mode == "packed":
            raise ConfigError(["mask.mode: the published code cuts contexts to one length: use reference or unbiased"])
        self.code, self.config, self.device = checkout(path), config, device
        with device:
            encoder, predictor = self.code.helper.init_model(
                device, config.mask.patch_size, config.meta.model_name, config.data.crop_size, config.meta.pred_depth,
                config.meta.pred_emb_dim,
            )  # fmt: skip
            torch.manual_seed(config.engine.seed)
            ours: Any = build(config)
        encoder.load_state_dict(ours.encoder.state_dict())
        predictor.load_state_dict(ours.predictor.state_dict())
        target = copy.deepcopy(encoder)
        if sdpa:
            require("sdpa")
        parts = [part for module in (encoder, predictor, target) for part in module.modules()]
        with_sdpa = type("Attention", (self.code.models.Attention,), {"forward": sdpa_forward})  # one graph for all
        for attention in (part for part in parts if sdpa and type(part) is self.code.models.Attention):
            attention.__class__ = with_sdpa
        for block in (part for part in parts if compiled and type(part) is self.code.models.Block):
            block.compile(dynamic=True)
        bf16 = config.precision == "bf16"
        self.autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
        self.optimizer, self.scaler, *schedules = self.code.helper.init_opt(
            encoder, predictor, iterations_per_epoch=1, start_lr=0, ref_lr=0, warmup=1, num_epochs=2, use_bfloat16=bf16
        )
        self.schedules = schedules
        self.trained: tuple[nn.Module, ...] = (encoder, predictor)
        self.encoder, self.predictor, self.target = map(self._wrapped, (encoder, predictor, target))
        self.averages = [*zip(encoder.parameters(), target.parameters(), strict=True)]
        for p in target.parameters():
            p.requires_grad = False

    def _wrapped(self, module: nn.Module) -> nn.Module:
        if dist.get_world_size() > 1:
            places = [self.device.index] if self.device.type == "cuda" else None
            module = nn.parallel.DistributedDataParallel(module, device_ids=places, static_graph=True)
        return module

    def step(
        self,
        pixels: Tensor,
        context: list[Tensor],
        target: list[Tensor],
        numbers: tuple[float, float, float],
        clock: Clock,
    ) -> tuple[float, Any]:
        """One step with (lr, weight decay, momentum): its loss, and the mark between backward and optimizer."""
        for schedule in self.schedules:
            schedule.step()
        lr, weight_decay, momentum = numbers
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = 0 if group.get("WD_exclude") else weight_decay
        with self.autocast:
            with torch.no_grad():
                h = self.target(pixels)
                h = self.code.masks.apply_masks(F.layer_norm(h, h.shape[-1:]), target)
                h = self.code.tensors.repeat_interleave_batch(h, len(pixels), repeat=len(context))
            z = self.predictor(self.encoder(pixels, context), context, target)
            loss = self.code.distributed.AllReduce.apply(F.smooth_l1_loss(z, h))
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        middle = clock.mark()
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.code.logging.grad_logger(self.trained[0].named_parameters())
        self.optimizer.zero_grad()
        with torch.no_grad():
            for source, average in self.averages:
                average.mul_(momentum)
                average.add_((1 - momentum) * source)
        return float(loss.detach()), middle
