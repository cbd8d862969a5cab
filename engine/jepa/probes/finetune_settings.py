"""The settings of a fine-tuning, their presets, and their options on the command line."""

import argparse
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from jepa.config.schema import Config


def _option(default: Any, help: str, low: float = 0, high: float = math.inf) -> Any:
    return field(default=default, metadata={"help": help, "range": (low, high)})


@dataclass(frozen=True)
class Settings:
    """What a fine-tuning depends on besides weights, images and ranks. Raises ValueError for what means nothing.

    The defaults are I-JEPA's full fine-tuning (arXiv 2301.08243, appendix A.1) and, where it is silent, MAE's (arXiv
    2111.06377): warm-up, smoothing, erasing, smallest learning rate.
    """

    epochs: int = _option(50, "passes over the training images", 1)
    batch: int = _option(528, "images a step, on all ranks together", 1)
    micro_batch: int = _option(64, "most images a rank holds at once; gradients of several are added up", 1)
    lr: float = _option(1e-4, "peak learning rate, of the classifier")
    min_lr: float = _option(1e-6, "learning rate at the end of the cosine")
    warmup: int = _option(5, "epochs in which the learning rate rises from 0")
    layer_decay: float = _option(0.75, "factor on the learning rate for each layer below the classifier", high=1)
    weight_decay: float = _option(0.04, "AdamW's; not on biases, norms and positions")
    clip: float = _option(0.0, "largest gradient norm; 0: any")
    drop_path: float = _option(0.25, "probability of dropping the last block; rises from 0 at the first", high=0.99)
    smoothing: float = _option(0.1, "label smoothing", high=0.99)
    mixup: float = _option(0.8, "alpha of mixup; 0: none")
    cutmix: float = _option(1.0, "alpha of cutmix; 0: none")
    randaugment: str = _option("rand-m9-mstd0.5-inc1", "timm's name of a RandAugment policy, or none")
    erasing: float = _option(0.25, "probability of erasing a rectangle", high=1)
    crop_scale: float = _option(0.08, "smallest area of a random crop, as a fraction of the image's", 0.001, 1)
    zero_stage: int = _option(1, "ZeRO stage", 0, 3)
    checkpointing: bool = _option(False, "recompute blocks in the backward: less memory, one more forward")
    workers: int = _option(10, "processes of each rank that decode images")
    seed: int = _option(0, "of order, augmentation and the classifier's first weights")
    precision: str = "fp32"  # or bf16: of weights and activations; AdamW's are fp32

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int | float):
                low, high = one.metadata["range"]
                if not low <= value <= high or not math.isfinite(value):
                    top = f" to {high:g}" if math.isfinite(high) else " or more"
                    raise ValueError(f"{flag(one.name)} {value}: wanted {low:g}{top}")
        if self.warmup >= self.epochs:
            raise ValueError(f"--warmup {self.warmup}: wanted fewer epochs than --epochs {self.epochs}")
        if not re.fullmatch(r"none|rand(-([mnp]|mstd|mmax)\d+(\.\d+)?|-inc[01])*", self.randaugment):
            raise ValueError(f"--randaugment {self.randaugment}: wanted none, or a policy such as rand-m9-mstd0.5-inc1")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def preset_of(name: str, config: Config) -> dict[str, Any]:
    """What differs from the defaults. "lowshot" is I-JEPA's fine-tuning on 1 % of ImageNet's labels."""
    if name == "paper":
        return {}
    decay = 0.4 if config.vit.embed_dim >= 1280 else 0.05  # ViT-H; ViT-L
    mixing = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0}
    return {"batch": 512, "lr": 3e-5, "weight_decay": decay} | mixing


def settings_arguments(parser: argparse.ArgumentParser, preset: str = "paper") -> None:
    """Adds an option for each of the settings, and `--preset`, whose default is `preset`."""
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--preset", choices=("paper", "lowshot"), default=preset, help="of what is not given (default: %(default)s)"
    )
    for one in fields(Settings):
        if text := one.metadata.get("help"):
            kind: dict[str, Any] = {"type": type(one.default)}
            if isinstance(one.default, bool):
                kind = {"action": "store_true"}
            group.add_argument(flag(one.name), default=None, help=f"{text} (paper: {one.default})", **kind)


def settings_of(args: argparse.Namespace, config: Config) -> Settings:
    """The settings of a command line with `settings_arguments` and `--precision`: a preset's, unless they are given."""
    given = {one.name: getattr(args, one.name) for one in fields(Settings)}
    return Settings(
        **preset_of(args.preset, config) | {key: value for key, value in given.items() if value is not None}
    )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
