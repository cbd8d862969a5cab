"""What a run is: one YAML, validated.

Sections and key names are those of the published I-JEPA configs (`meta data mask optimization logging`), so such a
file loads as it is; `loss`, `engine` and `eval` are this engine's own. A key that has a default may be left out;
`section.key=value` on the command line overrides the file (jepa.config_file). All that is wrong is reported at once,
in a ConfigError.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from .conflicts import conflicts, show
from .masks import MaskSpec


class ConfigError(ValueError):
    """Everything that is wrong with a config: `problems`, one line each."""

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"{source} cannot be used:", *problems]))


# --- types of values


def _number(value: object) -> object:
    """YAML 1.1 takes `1e-3` for text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _integer(value: object) -> object:
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("must be [low, high] with low <= high")
    return pair


Number = Annotated[float, BeforeValidator(_number)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Scale = Annotated[Number, Field(gt=0, le=1)]
Momentum = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, BeforeValidator(_integer), Field(ge=0, lt=2**31)]
Natural = Annotated[int, BeforeValidator(_integer), Field(ge=1, lt=2**31)]
Pixels = Annotated[Natural, Field(le=2**14)]
Width = Annotated[Natural, Field(le=2**16)]
Depth = Annotated[Natural, Field(le=2**10)]
Text = Annotated[str, Field(min_length=1)]
SharePair = Annotated[tuple[Share, Share], Strict(False)]
Range = Annotated[tuple[Positive, Positive], Strict(False), AfterValidator(_ordered)]
ScaleRange = Annotated[tuple[Scale, Scale], Strict(False), AfterValidator(_ordered)]
Means = Annotated[tuple[Share, Share, Share], Strict(False)]
Deviations = Annotated[tuple[Scale, Scale, Scale], Strict(False)]
Widths = Annotated[tuple[Width, ...], Strict(False), Field(min_length=1)]


class Size(NamedTuple):
    """A vision transformer: width, blocks, attention heads, hidden width of its MLPs over its width."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


SIZES = {
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
    "vit_huge": Size(1280, 32, 16),
    "vit_giant": Size(1408, 40, 16, 48 / 11),
}


class Batch(NamedTuple):
    """Images: of a rank's micro-batch; micro-batches of a step; images of a step, over all ranks."""

    micro_batch: int
    accumulation: int
    global_batch: int


# --- sections


class _Section(BaseModel):
    # Strict: `true` is no number and `1` no switch.
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Meta(_Section):
    """The model."""

    model_name: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"]
    embed_dim: Width | None = None  # null, here and below: that of the named size
    depth: Depth | None = None
    num_heads: Natural | None = None
    mlp_ratio: Annotated[Number, Field(ge=0.25, le=2**6)] | None = None
    pred_depth: Depth = 6
    pred_emb_dim: Width = 384
    pred_num_heads: Natural | None = None  # null: the encoder's
    use_bfloat16: bool = True
    load_checkpoint: bool = False  # resume, as --resume does
    read_checkpoint: Text | None = None  # the file to resume from; null: the latest
    copy_data: bool = False


class Data(_Section):
    """The images and how they become batches."""

    root_path: Text
    image_folder: str = ""
    batch_size: Annotated[Natural, Field(le=2**16)]  # per rank and micro-batch
    crop_size: Pixels
    crop_scale: ScaleRange = (0.3, 1.0)  # area of the random crop, as a share of the image's
    mean: Means = (0.485, 0.456, 0.406)
    std: Deviations = (0.229, 0.224, 0.225)
    use_horizontal_flip: bool = False
    use_color_distortion: bool = False
    use_gaussian_blur: bool = False
    color_jitter_strength: NonNegative = 0.0
    decoder: Literal["auto", "cpu", "gpu"] = "auto"
    num_workers: Natural = 10  # decoding threads
    prefetch: Natural = 2  # batches made ready ahead of the step
    pin_mem: bool = True  # in the published files; it has no effect
    max_bad_fraction: Share = 0.01  # of images that do not decode; more stops the run

    @property
    def folder(self) -> Path:
        """root_path/image_folder; its sub-folder `train` where `val` or `test` lies beside it (else it is a class)."""
        folder = Path(self.root_path).expanduser() / self.image_folder
        splits = [(folder / split).is_dir() for split in ("train", "val", "test")]
        return folder / "train" if splits[0] and any(splits[1:]) else folder


class Mask(_Section):
    """Which patches are seen and which predicted; the law itself is jepa.masks.MaskSpec."""

    patch_size: Pixels
    mode: Literal["reference", "unbiased", "packed"] = "reference"
    cut: Literal["rank", "global"] | None = None  # contexts as long as the shortest of the rank's micro-batch, or of
    # the step's global batch: then no number of ranks changes them. null: rank in mode reference, else global
    token_budget: Annotated[Share, Field(gt=0)] | None = None  # packed: every micro-batch's contexts take up this
    # share of its patches, filled up with padding, and thinned at random where they are larger; null: as they come
    num_enc_masks: Natural = 1
    num_pred_masks: Natural = 4
    enc_mask_scale: ScaleRange = (0.85, 1.0)  # area of a context block, as a share of the image
    pred_mask_scale: ScaleRange = (0.15, 0.2)  # area of a target block
    aspect_ratio: Range = (0.75, 1.5)  # of a target block
    min_keep: Count = 10  # a context has more patches than this before the batch is cut to its shortest
    allow_overlap: bool = False  # of context and targets


class Optimization(_Section):
    """AdamW, the teacher's momentum, and their schedules (jepa.schedules)."""

    epochs: Natural
    lr: NonNegative = 1e-3
    start_lr: NonNegative = 2e-4
    final_lr: NonNegative = 1e-6
    warmup: NonNegative = 40.0  # epochs
    weight_decay: NonNegative = 0.04
    final_weight_decay: NonNegative = 0.4
    ema: SharePair = (0.996, 1.0)
    ipe_scale: Positive = 1.0  # the schedules' length over the run's
    betas: Annotated[tuple[Momentum, Momentum], Strict(False)] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip_grad: Positive | None = None  # largest norm of the gradient; null: no limit


class Loss(_Section):
    """I-JEPA's prediction loss, and C-JEPA's regulariser beside it."""

    objective: Literal["ijepa", "cjepa"] = "ijepa"
    regularizer: Literal["vicreg", "cosine"] = "vicreg"
    vicreg_on: Literal["predictions", "context"] = "predictions"
    beta_vicreg: NonNegative = 0.001
    beta_sim: NonNegative = 25.0
    beta_std: NonNegative = 25.0
    beta_cov: NonNegative = 1.0
    projector: Widths | None = None  # output widths of its layers; null: three of the encoder's width


class Engine(_Section):
    """How the run is carried out."""

    seed: Annotated[int, BeforeValidator(_integer), Field(ge=0, lt=2**63)] = 0
    deterministic: bool = False  # the same bits from every run, at some speed; on CPUs that holds anyway
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "fp32"] | None = None  # null: as meta.use_bfloat16 says
    zero_stage: Annotated[Count, Field(le=3)] = 1
    optimizer: Literal["adamw_ema", "torch", "deepspeed", "apex"] = "adamw_ema"  # jepa.optimizer
    global_batch_size: Natural | None = None  # null: data.batch_size x accumulation x ranks
    gradient_accumulation_steps: Natural | None = None  # null: what global_batch_size needs, else 1
    max_steps: Natural | None = None  # stop early; the schedules do not change
    max_skipped: Natural = 10  # steps skipped in a row (a gradient that is not finite) before the run stops; the host
    # looks at them every logging.log_freq steps
    timeout_minutes: Positive = 30.0  # without a sign of life of a rank, or a move of any, before the others stop
    attention: Literal["sdpa", "math", "flash_attn", "xformers"] = "sdpa"
    overlap_comm: bool = False  # ZeRO 1 and 2: gradients are reduced beside the backward, for one host wait a step
    compile: bool | None = None  # the blocks, by torch.compile; null: on a GPU, where ZeRO's stage is below 3
    activation_checkpointing: bool = False  # blocks are computed again in the backward instead of kept
    skip_unread: bool = True  # what no loss reads is not computed; no result changes


class Logging(_Section):
    """What is written, where and how often."""

    folder: Text
    write_tag: Text = "jepa"
    log_freq: Natural = 10  # steps
    health_freq: Natural = 100  # steps
    checkpoint_freq: Natural = 50  # epochs between the checkpoints {tag}-ep{N} that are kept
    save_every: Natural | None = None  # steps between {tag}-latest; null: every epoch
    keep_last: Natural = 3  # of the steps' checkpoints; at least two
    tensorboard: bool = False
    wandb: Text | None = None  # the project's name


class Eval(_Section):
    """Probes of the target encoder while it trains."""

    every: Count = 0  # steps; 0: never
    train_path: Text | None = None  # labelled by folder names, as val_path
    val_path: Text | None = None
    max_images: Natural | None = 5000  # of each; null: all
    knn_k: Natural = 20


class Config(_Section):
    """A run. Made by `load_config` or `parse_config`; it does not change afterwards."""

    meta: Meta
    data: Data
    mask: Mask
    optimization: Optimization
    loss: Loss = Loss()
    engine: Engine = Engine()
    logging: Logging
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        problems = [f"{key} = {show(self[key])}: {reason}" for key, reason in conflicts(self)]
        if problems:
            raise ConfigError(problems)
        return self

    def __getitem__(self, key: str) -> Any:
        """The value of a dotted key."""
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)

    @property
    def vit(self) -> Size:
        """The encoder: the named size with its overrides."""
        named, meta = SIZES[self.meta.model_name], self.meta
        return Size(
            meta.embed_dim or named.embed_dim,
            meta.depth or named.depth,
            meta.num_heads or named.num_heads,
            meta.mlp_ratio or named.mlp_ratio,
        )

    @property
    def predictor(self) -> Size:
        return Size(self.meta.pred_emb_dim, self.meta.pred_depth, self.meta.pred_num_heads or self.vit.num_heads)

    @property
    def grid(self) -> int:
        """Patches along a side of the crop."""
        return self.data.crop_size // self.mask.patch_size

    @property
    def mask_spec(self) -> MaskSpec:
        return MaskSpec(self.grid, self.grid, **self.mask.model_dump(exclude={"patch_size", "cut", "token_budget"}))

    @property
    def cut(self) -> Literal["rank", "global"]:
        """Whose shortest context all are cut to; see `Mask.cut`."""
        return self.mask.cut or ("rank" if self.mask.mode == "reference" else "global")

    @property
    def token_budget(self) -> int | None:
        """Rows of a micro-batch's packed contexts; see `Mask.token_budget`."""
        share = self.mask.token_budget
        return None if share is None else round(share * self.data.batch_size * self.grid**2)

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """Of weights and activations; master weights, moments, EMA and statistics are fp32 in either case."""
        return self.engine.precision or ("bf16" if self.meta.use_bfloat16 else "fp32")

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations, as `precision` says."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def has_projector(self) -> bool:
        return self.loss.objective == "cjepa" and self.loss.regularizer == "vicreg"

    @property
    def projector_widths(self) -> tuple[int, ...]:
        """Output widths of the projector's layers; empty if the loss has none."""
        return (self.loss.projector or (self.vit.embed_dim,) * 3) if self.has_projector else ()

    @property
    def needs_all_targets(self) -> bool:
        """Whether a loss reads the target encoder's output at patches that are in no target."""
        return self.has_projector and self.loss.vicreg_on == "context"

    @property
    def gated(self) -> bool:
        """Whether the gradient's norm, clipping and the decision to skip a step are taken here, on the device.

        DeepSpeed's own way reads several numbers back to the host in a step, each of which empties the GPU's queue. It
        can be told not to at stages 1 and 2, and at stage 0 in fp32 it has none. At stage 3, at stage 0 in bf16, and
        with an optimizer that cannot be gated, its way stands.
        """
        stage = self.engine.zero_stage
        here = stage in (1, 2) or (stage == 0 and self.precision == "fp32")
        return here and self.engine.optimizer in ("adamw_ema", "torch")

    def compiles(self, device_type: str) -> bool:
        default = device_type == "cuda" and self.engine.zero_stage < 3
        return default if self.engine.compile is None else self.engine.compile

    def batch(self, world_size: int) -> Batch:
        """The batch triple on `world_size` ranks. Raises ConfigError if it does not multiply out."""
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}; it must be a number of ranks, at least 1")
        micro, steps = self.data.batch_size, self.engine.gradient_accumulation_steps
        wanted = self.engine.global_batch_size
        steps = steps or max(1, (wanted or 0) // (micro * world_size))
        total = micro * steps * world_size
        if wanted and wanted != total:
            raise ConfigError([self._batch_problem(wanted, world_size)])
        if self.has_projector and micro * world_size < 2:
            problem = f"data.batch_size = {micro}: VICReg's variance over the ranks' micro-batches needs 2 images"
            raise ConfigError([problem])
        return Batch(micro, steps, total)

    def fingerprint(self, world_size: int) -> dict[str, int | str]:
        """What decides, beside model, data and loss, what the steps of a run compute: two runs alike in this take the
        same steps, on whatever number of ranks. VICReg's statistics are those of a micro-batch of all ranks, so there
        the accumulation counts; a mask that is cut to the shortest of a rank's micro-batch depends on its size.
        """
        micro, accumulation, total = self.batch(world_size)
        found: dict[str, int | str] = {"engine.seed": self.engine.seed, "global batch": total, "mask.cut": self.cut}
        if self.cut == "rank" or self.token_budget:
            found["data.batch_size"] = micro
        if self.has_projector:
            found["accumulation"] = accumulation
        return found

    def recipe(self) -> dict[str, Any]:
        """What else decides what a step computes, with defaults resolved; without the optimizer's numbers."""
        data = ("crop_size", "crop_scale", "mean", "std", "use_horizontal_flip")
        sections = {
            "data": {key: self[f"data.{key}"] for key in data},
            "mask": self.mask.model_dump(exclude={"cut"}),
            "loss": self.loss.model_dump(),
        }
        recipe = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        return {"encoder": self.vit, "predictor": self.predictor, "engine.precision": self.precision, **recipe}

    def _batch_problem(self, wanted: int, world_size: int) -> str:
        micro, steps = self.data.batch_size, self.engine.gradient_accumulation_steps
        unit = micro * (steps or 1) * world_size
        ways = [f"engine.global_batch_size={unit if steps else max(1, round(wanted / unit)) * unit}"]
        share, rest = divmod(wanted, world_size * (steps or 1))
        if share and not rest:
            size = share if steps else next(n for n in range(min(micro, share), 0, -1) if share % n == 0)
            ways.append(f"data.batch_size={size}")
        return (
            f"engine.global_batch_size = {wanted}: must equal data.batch_size {micro} x accumulation "
            f"{steps or '(1, 2, ...)'} x ranks {world_size}; give {' or '.join(ways)}"
        )
