"""The config of a run: one validated YAML.

Sections and key names are those of the published I-JEPA configs (`meta data mask optimization logging`), so such a
file loads unchanged; `loss`, `engine` and `eval` are this engine's own. Keys with a default may be omitted; a file's
`base` holds what it does not say (jepa.config.read), and `section.key=value` on the command line overrides both
(jepa.config.file). All problems are reported at once, in one ConfigError.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    Strict,
    model_validator,
)

from jepa.data.augment import View
from jepa.data.masks import MaskSpec

from .conflicts import conflicts, show
from .words import expanded

if TYPE_CHECKING:
    from jepa.methods.base import Method


class ConfigError(ValueError):
    """All problems of a config: `problems`, one line each."""

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"{source} is invalid:", *problems]))


# --- types of values


def _number(value: object) -> object:
    """YAML 1.1 reads `1e-3` as a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _integer(value: object) -> object:
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _suffixes(value: object) -> object:
    """One or several, `jpg` or `.JPG`: as jepa.data.sources wants them."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return tuple("." + one.lower().removeprefix(".") for one in value)
    return value


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("must be [low, high] with low <= high")
    return pair


Number = Annotated[float, BeforeValidator(_number)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Scale = Annotated[Number, Field(gt=0, le=1)]
Strength = Annotated[Number, Field(ge=0, le=2.5)]  # a fifth of it is the largest shift of hue, at most half a turn
Momentum = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, BeforeValidator(_integer), Field(ge=0, lt=2**31)]
Natural = Annotated[int, BeforeValidator(_integer), Field(ge=1, lt=2**31)]
Pixels = Annotated[Natural, Field(le=2**14)]
Width = Annotated[Natural, Field(le=2**16)]
Depth = Annotated[Natural, Field(le=2**10)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(expanded)]
SharePair = Annotated[tuple[Share, Share], Strict(False)]
Range = Annotated[tuple[Positive, Positive], Strict(False), AfterValidator(_ordered)]
ScaleRange = Annotated[tuple[Scale, Scale], Strict(False), AfterValidator(_ordered)]
Means = Annotated[tuple[Share, Share, Share], Strict(False)]
Deviations = Annotated[tuple[Scale, Scale, Scale], Strict(False)]
Suffixes = Annotated[
    tuple[Annotated[str, Field(min_length=2)], ...], BeforeValidator(_suffixes), Strict(False), Field(min_length=1)
]
Widths = Annotated[tuple[Width, ...], Strict(False), Field(min_length=1)]


class Size(NamedTuple):
    """Dimensions of a vision transformer; `mlp_ratio` is the hidden width of the MLPs relative to `embed_dim`."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


MODELS = {
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
    "vit_huge": Size(1280, 32, 16),
    "vit_giant": Size(1408, 40, 16, 48 / 11),
}


class BatchSize(NamedTuple):
    """Images in a rank's micro-batch, micro-batches per step, and images per step over all ranks."""

    micro_batch: int
    accumulation: int
    global_batch: int


# --- sections


class _Section(BaseModel):
    # Strict: `true` is not a number and `1` is not a boolean.
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Meta(_Section):
    """The model."""

    model_name: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"]
    embed_dim: Width | None = None  # null, here and below: the default of model_name
    depth: Depth | None = None
    num_heads: Natural | None = None
    mlp_ratio: Annotated[Number, Field(ge=0.25, le=2**6)] | None = None
    pred_depth: Depth = 6
    pred_emb_dim: Width = 384
    pred_num_heads: Natural | None = None  # null: as many as the encoder
    use_bfloat16: bool = True  # the published key; engine.precision, if given, wins
    load_checkpoint: bool = False  # resume, like --resume
    read_checkpoint: PathText | None = None  # what to resume: a path, or a name in logging.folder; null: the newest
    init_from: PathText | None = (
        None  # weights to start a new run from: our checkpoint or export, a published .pth.tar, a
    )
    # Hugging Face folder or a timm state dict (jepa.state.foreign)
    copy_data: bool = False


class Data(_Section):
    """The images and how they are batched."""

    root_path: PathText | None = None  # a folder, a .txt list or .tar shards
    image_folder: Annotated[str, AfterValidator(expanded)] = ""
    suffixes: Suffixes | None = (
        None  # how the names of images end; null: .jpg .jpeg .png .webp .bmp .tif .tiff .ppm .pgm
    )
    # Of several images in a tar's sample the first of these that it has is taken (jepa.data.tars)
    synthetic: Natural | None = None  # train on so many images of noise instead, to time or test a run
    batch_size: Annotated[Natural, Field(le=2**16)]  # per rank and micro-batch
    crop_size: Pixels
    crop_scale: ScaleRange = (0.3, 1.0)  # area of the random crop, as a fraction of the image's
    mean: Means = (0.485, 0.456, 0.406)
    std: Deviations = (0.229, 0.224, 0.225)
    use_horizontal_flip: bool = False  # of half of the images
    use_color_distortion: bool = False  # jitter of 80 % of the images, greyscale of 20 %
    use_gaussian_blur: bool = False  # of half of the images
    color_jitter_strength: Strength = 0.0  # of the jitter; no effect unless use_color_distortion
    decoder: Literal["auto", "cpu", "gpu"] = "auto"  # auto: the GPU if there is one, unless engine.deterministic
    num_workers: Natural = 10  # decoding threads
    prefetch: Natural = 2  # micro-batches to prepare ahead
    pin_mem: bool = True  # no effect; in the published configs
    max_bad_fraction: Share = 0.01  # stop if more of the images seen, and at least 10, cannot be decoded

    @property
    def view(self) -> View:
        """The view of an image that these keys describe, with the published I-JEPA code's strengths and probabilities.

        Order and strengths are those of SimCLR (arXiv 2002.05709, appendix A).
        """
        strength = self.color_jitter_strength if self.use_color_distortion else 0.0
        return View(
            self.crop_size,
            self.crop_scale,
            flip=0.5 if self.use_horizontal_flip else 0.0,
            jitter=(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength),
            jitter_probability=0.8,
            grey=0.2 if self.use_color_distortion else 0.0,
            blur=0.5 if self.use_gaussian_blur else 0.0,
        )

    @property
    def folder(self) -> Path:
        """root_path/image_folder, or its sub-folder `train` if it also has `val` or `test` (else it is a class).

        Only for a run on image files, whose root_path is given.
        """
        folder = Path(self.root_path or "") / self.image_folder
        splits = [(folder / split).is_dir() for split in ("train", "val", "test")]
        return folder / "train" if splits[0] and any(splits[1:]) else folder


class Mask(_Section):
    """Which patches are visible and which are predicted; jepa.data.masks.MaskSpec defines how they are sampled."""

    patch_size: Pixels
    mode: Literal["reference", "unbiased", "packed"] = "reference"
    cut: Literal["rank", "global"] | None = None  # cut contexts to the shortest of the rank's micro-batch, or of the
    # step's global batch, which does not depend on the number of ranks; null: rank in mode reference, else global
    token_budget: Annotated[Share, Field(gt=0)] | None = None  # packed: pad or randomly thin the contexts of a
    # micro-batch to this fraction of its patches; null: keep as sampled
    num_enc_masks: Natural = 1
    num_pred_masks: Natural = 4
    enc_mask_scale: ScaleRange = (0.85, 1.0)  # area of a context block, as a fraction of the image's
    pred_mask_scale: ScaleRange = (0.15, 0.2)  # area of a target block
    aspect_ratio: Range = (0.75, 1.5)  # of a target block
    min_keep: Count = 10  # a context has more patches than this before the cut
    allow_overlap: bool = False  # between context and targets


class Optimization(_Section):
    """AdamW, the momentum of the EMA teacher, and their schedules (jepa.train.schedules)."""

    epochs: Natural
    lr: NonNegative = 1e-3
    start_lr: NonNegative = 2e-4
    final_lr: NonNegative = 1e-6
    warmup: NonNegative = 40.0  # epochs
    weight_decay: NonNegative = 0.04
    final_weight_decay: NonNegative = 0.4
    ema: SharePair = (0.996, 1.0)  # initial and final momentum of the target encoder
    ipe_scale: Positive = 1.0  # length of the schedules relative to the run's
    betas: Annotated[tuple[Momentum, Momentum], Strict(False)] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip_grad: Positive | None = None  # maximum gradient norm; null: no clipping


class Loss(_Section):
    """The pretraining method. Its other keys are its own: see its file in jepa.methods."""

    objective: Text = ""  # empty: the default of jepa.methods


class Engine(_Section):
    """How the run is executed."""

    seed: Annotated[int, BeforeValidator(_integer), Field(ge=0, lt=2**63)] = 0
    deterministic: bool = False  # bitwise reproducible, at some cost in speed; runs on CPUs always are
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "fp32"] | None = None  # null: as meta.use_bfloat16 says
    target_precision: Literal["bf16", "fp8"] = "bf16"  # of the target encoder's matrix products in training; bf16: as
    # precision says; fp8 (jepa.model.fp8): on Hopper or newer, emulated on a CPU; not yet measured on a GPU
    zero_stage: Annotated[Count, Field(le=3)] = 1
    optimizer: Literal["adamw_ema", "torch", "deepspeed", "apex"] = "adamw_ema"  # jepa.train.optimizer
    global_batch_size: Natural | None = None  # data.batch_size x accumulation x ranks; null: whatever that gives
    gradient_accumulation_steps: Natural | None = None  # null: as global_batch_size requires, else 1
    max_steps: Natural | None = None  # stop early; the schedules do not change
    max_skipped: Natural = 10  # stop after so many non-finite steps in a row, checked every logging.log_freq steps
    timeout_minutes: Positive = 30.0  # stop if a rank is silent, or no rank makes progress, for this long
    attention: Literal["sdpa", "math", "flash_attn", "xformers"] = "sdpa"
    overlap_comm: bool = False  # ZeRO 1 and 2: reduce gradients during the backward, at one host sync per step
    compile: bool | None = None  # torch.compile the blocks; null: on a GPU below ZeRO stage 3
    activation_checkpointing: bool = False  # recompute blocks in the backward: less memory, one more forward
    skip_unread: bool = True  # do not compute outputs that no loss reads; results do not change


class Logging(_Section):
    """What is logged and saved, where and how often."""

    folder: PathText
    write_tag: Text = "jepa"
    log_freq: Natural = 10  # steps
    health_freq: Natural = 100  # steps
    checkpoint_freq: Natural = 50  # epochs between permanent checkpoints, {tag}-ep{N}
    save_every: Natural | None = None  # steps between rolling checkpoints, {tag}-step{N}; null: an epoch
    keep_last: Natural = 3  # rolling checkpoints to keep, never fewer than 2
    tensorboard: bool = False
    wandb: Text | None = None  # project name; null: off


class Eval(_Section):
    """Probing of the encoder, or of its average where there is one, during training."""

    every: Count = 0  # steps between probes; 0: never
    train_path: PathText | None = None  # images labelled by folder name, like val_path
    val_path: PathText | None = None
    max_images: Natural | None = 5000  # of each set; null: all
    knn_k: Natural = 20


def _methods() -> Any:
    """jepa.methods, which stands on this room; by name, so that a new method needs no word here."""
    return importlib.import_module("jepa.methods")


def objectives() -> list[str]:
    """The methods there are."""
    return _methods().names()


def settings_of(objective: object) -> type[Loss]:
    """The section `loss` of a method. Raises ValueError if there is no such method."""
    return _methods().find(objective or _methods().DEFAULT).Settings


def _loss(given: object) -> object:
    """The section as its method understands it."""
    if isinstance(given, Loss):
        given = given.model_dump()
    if not isinstance(given, Mapping):
        return given
    objective = given.get("objective") or _methods().DEFAULT
    try:
        section = settings_of(objective)
    except ValueError as error:
        raise ConfigError([f"loss.objective = {show(objective)}: {error}"]) from error
    return section.model_validate({**given, "objective": objective})


class Config(_Section):
    """The config of a run, made by `load_config` or `parse_config`. Immutable."""

    meta: Meta
    data: Data
    mask: Mask
    optimization: Optimization
    loss: Annotated[SerializeAsAny[Loss], BeforeValidator(_loss)] = Field(Loss(), validate_default=True)
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
        named, meta = MODELS[self.meta.model_name], self.meta
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
    def resumed(self) -> str:
        """The checkpoint that meta.load_checkpoint resumes from."""
        return self.checkpoint(self.meta.read_checkpoint or "latest")

    def checkpoint(self, name: str) -> str:
        """What `name`, given to --resume or meta.read_checkpoint, means: "latest" and "auto" themselves, or a path. As
        in the published code it may be within logging.folder, where a bare name is looked for first."""
        if name in ("latest", "auto"):
            return name
        here, within = Path(name), Path(self.logging.folder, name)
        first, second = (here, within) if "/" in name.rstrip("/") else (within, here)
        return str(second if second.exists() and not first.exists() else first)

    @property
    def grid(self) -> int:
        """Patches along a side of the crop."""
        return self.data.crop_size // self.mask.patch_size

    @property
    def mask_spec(self) -> MaskSpec:
        return MaskSpec(self.grid, self.grid, **self.mask.model_dump(exclude={"patch_size", "cut", "token_budget"}))

    @property
    def cut(self) -> Literal["rank", "global"]:
        """The scope over which contexts are cut to the shortest; see `Mask.cut`."""
        return self.mask.cut or ("rank" if self.mask.mode == "reference" else "global")

    @property
    def token_budget(self) -> int | None:
        """Rows of a micro-batch's packed contexts; see `Mask.token_budget`."""
        share = self.mask.token_budget
        return None if share is None else round(share * self.data.batch_size * self.grid**2)

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """Of weights and activations; master weights, moments, EMA and statistics are always fp32."""
        return self.engine.precision or ("bf16" if self.meta.use_bfloat16 else "fp32")

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of `precision`."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def method(self) -> "type[Method]":
        """The class of the method."""
        return _methods().find(self.loss.objective)

    @property
    def gated(self) -> bool:
        """Whether this engine computes the gradient norm, clips and decides to skip a step, all on the device.

        DeepSpeed's own implementation reads several values back to the host per step, each of which drains the GPU's
        queue. It can be disabled at stages 1 and 2, and does not exist at stage 0 in fp32. It is used at stage 3, at
        stage 0 in bf16, and with an optimizer that cannot be gated.
        """
        stage = self.engine.zero_stage
        here = stage in (1, 2) or (stage == 0 and self.precision == "fp32")
        return here and self.engine.optimizer in ("adamw_ema", "torch")

    @property
    def decoder(self) -> Literal["auto", "cpu", "gpu"]:
        """Where images are decoded; deterministically: where pixels cannot depend on the batch (jepa.data.decode)."""
        return "cpu" if self.engine.deterministic else self.data.decoder

    def compiles(self, device_type: str) -> bool:
        default = device_type == "cuda" and self.engine.zero_stage < 3
        return default if self.engine.compile is None else self.engine.compile

    def batch(self, world_size: int) -> BatchSize:
        """Batch sizes on `world_size` ranks. Raises ConfigError if engine.global_batch_size is not their product."""
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}; it must be at least 1")
        micro, steps = self.data.batch_size, self.engine.gradient_accumulation_steps
        wanted = self.engine.global_batch_size
        steps = steps or max(1, (wanted or 0) // (micro * world_size))
        total = micro * steps * world_size
        if wanted and wanted != total:
            raise ConfigError([self._batch_problem(wanted, world_size)])
        if micro * world_size < 2 and self.method.couples_images(self):
            problem = f"data.batch_size = {micro}: must be at least 2 on one rank, for the loss's variance over images"
            raise ConfigError([problem])
        return BatchSize(micro, steps, total)

    def fingerprint(self, world_size: int) -> dict[str, int | str]:
        """What determines the steps of a run besides model, data and loss: runs that agree in it compute the same steps
        on any number of ranks. Accumulation matters where the loss has statistics over a micro-batch of all ranks;
        masks that are cut, or have a token budget, per micro-batch of a rank depend on its size.
        """
        micro, accumulation, total = self.batch(world_size)
        found: dict[str, int | str] = {"engine.seed": self.engine.seed, "global batch": total}
        if self.method.masked:
            found["mask.cut"] = self.cut
            if self.cut == "rank" or self.token_budget:
                found["data.batch_size"] = micro
        if self.method.couples_images(self):
            found["accumulation"] = accumulation
        return found

    def recipe(self) -> dict[str, Any]:
        """What else determines what a step computes, defaults resolved, except for the optimizer's settings."""
        colour = ("use_color_distortion", "use_gaussian_blur", "color_jitter_strength")
        data = ("crop_size", "crop_scale", "mean", "std", "use_horizontal_flip", *colour)
        masked = self.method.masked
        sections = {
            "data": {key: self[f"data.{key}"] for key in data},
            "mask": self.mask.model_dump(exclude={"cut"}) if masked else {"patch_size": self.mask.patch_size},
            "loss": self.loss.model_dump(),
        }
        networks = {"encoder": self.vit} | ({"predictor": self.predictor} if masked else {})
        recipe = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        recipe |= {"engine.precision": self.precision, "engine.target_precision": self.engine.target_precision}
        return networks | recipe

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
