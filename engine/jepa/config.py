"""What a run is: one YAML, validated.

Sections and key names are those of the published I-JEPA configs (`meta data mask optimization logging`), so such a
file loads as it is; `loss`, `engine` and `eval` are this engine's own. A key that has a default may be left out;
`section.key=value` on the command line overrides the file. All that is wrong is reported at once, in a ConfigError.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, NamedTuple, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from .masks import MAX_SIDE, MaskSpec


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
        problems = [f"{key} = {_show(self[key])}: {reason}" for key, reason in _conflicts(self)]
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
    def has_projector(self) -> bool:
        return self.loss.objective == "cjepa" and self.loss.regularizer == "vicreg"

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

    def law(self, world_size: int) -> dict[str, int | str]:
        """What decides, beside model, data and loss, what the steps of a run compute: two runs alike in this take the
        same steps, on whatever number of ranks. VICReg's statistics are those of a micro-batch of all ranks, so there
        the accumulation counts; a mask that is cut to the shortest of a rank's micro-batch depends on its size.
        """
        micro, accumulation, total = self.batch(world_size)
        law: dict[str, int | str] = {"engine.seed": self.engine.seed, "global batch": total, "mask.cut": self.cut}
        if self.cut == "rank" or self.token_budget:
            law["data.batch_size"] = micro
        if self.has_projector:
            law["accumulation"] = accumulation
        return law

    def recipe(self) -> dict[str, Any]:
        """What decides beside `law` what a step computes, as it was resolved; the optimizer's numbers apart."""
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

    def to_yaml(self) -> str:
        """Every key with its value; `load_config` reads it back."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


SECTIONS = cast(dict[str, type[_Section]], {name: field.annotation for name, field in Config.model_fields.items()})
MAX_CHARACTERS = 2**18  # of a config's file; a complete one has about 3000
KEYS = [f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields]


# --- loading


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with overrides `section.key=value`, values in YAML. Raises ConfigError."""
    source = str(path)
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS)
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror or error}"], source) from error
    except ValueError as error:
        raise ConfigError([f"is not a text file: {error}"], source) from error
    try:
        if len(text) == MAX_CHARACTERS:
            raise ValueError(f"it has {MAX_CHARACTERS} characters or more")
        mapping = _parse_yaml(text)
    except ValueError as error:
        raise ConfigError([f"is not YAML: {error}"], source) from error
    return parse_config(mapping, overrides, source)


def parse_config(mapping: object, overrides: Sequence[str] = (), source: str = "config") -> Config:
    """The config in nested mappings, as YAML gives them; `source` names it in errors. Raises ConfigError."""
    if not isinstance(mapping, Mapping):
        raise ConfigError([f"must map the sections {', '.join(SECTIONS)}; got {_show(mapping)}"], source)
    # A section without keys is null in YAML.
    given = {name: {} for name in SECTIONS} | {name: {} if body is None else body for name, body in mapping.items()}
    problems = [*_override(given, overrides), *_drop_unknown(given)]
    try:
        config = Config.model_validate(given)
    except ValidationError as error:
        problems += [line for detail in error.errors() for line in _explain(detail)]
    if problems:
        raise ConfigError(problems, source)
    return config


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, and so is a merge (`<<`): a few nested ones fill the memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem="merge keys (<<) are not read", problem_mark=key.start_mark)
        super().flatten_mapping(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    problem = f"the key {key} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Block style, but lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def _parse_yaml(text: str) -> object:
    """Raises ValueError, on one line, for all that is no YAML."""
    try:
        return yaml.load(text, _Loader)
    # PyYAML lets errors of its constructors escape, for example from `!!bool x` or a date in month 13.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _override(given: dict, overrides: Sequence[str]) -> Iterator[str]:
    """Writes the overrides into `given`, copying the sections it changes, and yields what is wrong with them."""
    for override in overrides:
        name, equals, text = override.partition("=")
        section, _, key = name.strip().partition(".")
        if not (equals and section and key):
            yield f"{_show(override)}: an override is written section.key=value"
            continue
        try:
            value = _parse_yaml(text) if text.strip() else ""
        except ValueError as error:
            yield f"{_show(override)}: the value is not YAML: {error}"
            continue
        body = given.get(section, {})
        if isinstance(body, Mapping):
            given[section] = {**body, key: value}


def _drop_unknown(given: dict) -> Iterator[str]:
    """Takes unknown keys out of `given`, so that the rest can be checked, and yields a line for each."""
    for section, body in list(given.items()):
        known = SECTIONS[section].model_fields if section in SECTIONS else {}
        names = [f"{section}.{key}" for key in body if key not in known] if isinstance(body, Mapping) else []
        if section not in SECTIONS:
            del given[section]
            names = names or [str(section)]
        elif names:
            given[section] = {key: value for key, value in body.items() if key in known}
        yield from (f"{name}: unknown key; the nearest known key is {_nearest(name)}" for name in _few(names))


def _few(names: list[str]) -> Iterator[str]:
    """Enough of them to see what is wrong: a foreign file may have any number of keys of any length."""
    for name in names[:20]:
        yield name if len(name) <= 80 else f"{name[:40]}...{name[-36:]}"


def _nearest(name: str) -> str:
    """The known key most like `name`. What follows the dot counts most: it may stand in another section."""
    section, _, key = name.rpartition(".")

    def likeness(known: str) -> float:
        known_section, _, known_key = known.partition(".")
        same = SequenceMatcher(None, key.lower(), known_key).ratio() + (key == known_key)
        return same + 0.25 * SequenceMatcher(None, section.lower(), known_section).ratio()

    return max(KEYS, key=likeness)


def _explain(detail: Any) -> Iterator[str]:
    """The lines of a ConfigError for one of pydantic's errors."""
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        yield from cause.problems
        return
    section, *rest = detail["loc"]
    name = ".".join([section, *(str(part) for part in rest[:1])]) + "".join(f"[{i}]" for i in rest[1:])
    if detail["type"] == "missing":
        yield f"{name}: is missing, and it has no default"
        return
    reason = str(cause) if cause else detail["msg"].replace("Input should be", "must be")
    kinds = {
        "model_type": "must be a mapping of keys to values",
        "string_type": "must be text; quote what would be something else in YAML",
        "tuple_type": "must be a list",
    }
    yield f"{name} = {_show(detail['input'])}: {kinds.get(detail['type'], reason)}"


# --- what single values allow, but not together


def _conflicts(c: Config) -> Iterator[tuple[str, str]]:
    """Combinations that cannot run: the key to change and what it must be.

    ZeRO has none: accumulation, clipping, several contexts and ragged masks run at stage 3 as at stage 1.
    """
    if c.data.crop_size % c.mask.patch_size:
        sizes = [n for n in range(1, c.data.crop_size + 1) if c.data.crop_size % n == 0]
        near = sorted(sorted(sizes, key=lambda n: abs(n - c.mask.patch_size))[:3])
        yield "mask.patch_size", f"must divide data.crop_size {c.data.crop_size}, as {near} do"
    elif not 2 <= c.grid <= MAX_SIDE:
        yield "mask.patch_size", f"must leave 2 to {MAX_SIDE} patches along data.crop_size {c.data.crop_size}"
    else:
        yield from _mask_conflicts(c)

    for size, width, heads in (
        (c.vit, "meta.embed_dim", "meta.num_heads"),
        (c.predictor, "meta.pred_emb_dim", "meta.pred_num_heads"),
    ):
        if size.embed_dim % 4:
            yield width, "must be divisible by 4, for the 2-D sine-cosine positions"
        if size.embed_dim % size.num_heads:
            yield heads, f"{size.num_heads} heads must divide {width} {size.embed_dim}"

    for key in ("use_color_distortion", "use_gaussian_blur", "color_jitter_strength"):
        if getattr(c.data, key):
            yield f"data.{key}", "must be off: this engine does not augment colours, nor did I-JEPA's runs"
    if c.meta.copy_data:
        yield "meta.copy_data", "must be false: copy the images yourself and give data.root_path=<the copy>"
    for key, path in (("data.root_path", c.data.root_path), ("logging.folder", c.logging.folder)):
        if path.startswith("$"):
            yield key, f"is not filled in: give {key}=<path> on the command line"

    length = c.optimization.epochs * c.optimization.ipe_scale
    if c.optimization.warmup > length:
        yield (
            "optimization.warmup",
            f"must be at most optimization.epochs x ipe_scale = {length:g}; to stop sooner, give engine.max_steps",
        )
    if c.engine.precision and (c.engine.precision == "bf16") != c.meta.use_bfloat16:
        other = str(not c.meta.use_bfloat16).lower()
        yield (
            "engine.precision",
            f"contradicts meta.use_bfloat16: give meta.use_bfloat16={other} too, or null here",
        )
    unit = c.data.batch_size * (c.engine.gradient_accumulation_steps or 1)
    if (c.engine.global_batch_size or 0) % unit:
        yield "engine.global_batch_size", f"must be a multiple of data.batch_size x accumulation = {unit}"
    if c.loss.objective == "cjepa" and c.loss.vicreg_on == "predictions" and c.mask.num_pred_masks < 2:
        yield "mask.num_pred_masks", "must be at least 2: C-JEPA compares an image's blocks"
    if c.token_budget is not None and c.mask.mode != "packed":
        yield "mask.token_budget", "must be null: only mask.mode packed has contexts of unequal length"
    elif c.token_budget is not None and c.token_budget <= c.data.batch_size:
        yield "mask.token_budget", f"leaves {c.token_budget} rows for the contexts of {c.data.batch_size} images"
    if c.engine.compile and c.engine.zero_stage == 3:
        yield "engine.compile", "does not go with engine.zero_stage 3, which swaps weights in and out of a block"
    if c.engine.attention == "flash_attn" and (c.precision == "fp32" or c.engine.device == "cpu"):
        yield "engine.attention", "runs in bf16 on a GPU only: give sdpa, or meta.use_bfloat16=true on a GPU"
    if c.engine.attention == "xformers" and c.mask.mode == "packed":
        yield "engine.attention", "is not offered for mask.mode packed: give sdpa or flash_attn"
    if (c.engine.device, c.data.decoder) == ("cpu", "gpu"):
        yield "data.decoder", "needs a GPU, but engine.device is cpu"
    if c.eval.every and not (c.eval.train_path and c.eval.val_path):
        yield "eval.every", "needs eval.train_path and eval.val_path, folders of labelled images"


def _mask_conflicts(c: Config) -> Iterator[tuple[str, str]]:
    try:
        spec = c.mask_spec
    except ValueError as error:
        key, _, reason = str(error).partition(" ")
        yield f"mask.{key}", reason
        return
    target, context = (sum(scale) / 2 for scale in (spec.pred_mask_scale, spec.enc_mask_scale))
    left = context * c.grid**2 * (1 - target) ** spec.num_pred_masks
    if not spec.allow_overlap and left <= spec.min_keep:
        yield (
            "mask.num_pred_masks",
            f"so many targets leave about {left:.1f} of {c.grid**2} patches as context, which is not more than "
            f"mask.min_keep {spec.min_keep}",
        )


class _Short(Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60
        self.maxlevel = 2

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else "a number of over 300 digits"


def _show(value: object) -> str:
    return _Short().repr(value)
