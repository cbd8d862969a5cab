"""Checks for config values that are valid alone but not in combination."""

from collections.abc import Iterator
from reprlib import Repr
from typing import TYPE_CHECKING

from jepa.data.masks import MAX_SIDE

from .words import unknown_in

if TYPE_CHECKING:
    from .schema import Config


def conflicts(c: "Config") -> Iterator[tuple[str, str]]:
    """Invalid combinations: the key to change and what it must be."""
    if c.data.crop_size % c.mask.patch_size:
        sizes = [n for n in range(1, c.data.crop_size + 1) if c.data.crop_size % n == 0]
        near = sorted(sorted(sizes, key=lambda n: abs(n - c.mask.patch_size))[:3])
        yield "mask.patch_size", f"must divide data.crop_size {c.data.crop_size}; {near} do"
    elif not 2 <= c.grid <= MAX_SIDE:
        yield "mask.patch_size", f"must give 2 to {MAX_SIDE} patches along data.crop_size {c.data.crop_size}"
    elif c.method.masked:
        yield from _mask_conflicts(c)

    for size, width, heads in (
        (c.vit, "meta.embed_dim", "meta.num_heads"),
        *([(c.predictor, "meta.pred_emb_dim", "meta.pred_num_heads")] if c.method.masked else []),
    ):
        if size.embed_dim % 4:
            yield width, "must be divisible by 4, for the 2-D sine-cosine position embeddings"
        if size.embed_dim % size.num_heads:
            yield heads, f"the number of heads, {size.num_heads}, must divide {width} {size.embed_dim}"

    if c.meta.copy_data:
        yield "meta.copy_data", "must be false: copy the images yourself and give data.root_path=<the copy>"
    if c.data.root_path is None and not c.data.synthetic:
        yield "data.root_path", "must be the path of the images; data.synthetic=10000 trains on synthetic ones instead"
    for key in _paths_used(c):
        if unknown := unknown_in(c[key] or ""):
            yield key, f"{unknown}: give {key}=<path> on the command line"

    length = c.optimization.epochs * c.optimization.ipe_scale
    if c.optimization.warmup > length:
        yield (
            "optimization.warmup",
            f"must be at most optimization.epochs x ipe_scale = {length:g}; to stop a run early, give engine.max_steps",
        )
    if c.engine.target_precision == "fp8":
        if c.precision == "fp32":
            yield "engine.target_precision", "needs bf16 training: give engine.precision=bf16, or bf16 here"
        if "encoder" not in c.method.averaged:
            yield "engine.target_precision", f"needs a target encoder, which {c.loss.objective} has not: give bf16"
        for name, wide in (("width", c.vit.embed_dim), ("MLP width", int(c.vit.embed_dim * c.vit.mlp_ratio))):
            if wide % 16:
                yield "engine.target_precision", f"needs an encoder {name} divisible by 16, not {wide}; or give bf16"
    unit = c.data.batch_size * (c.engine.gradient_accumulation_steps or 1)
    if (c.engine.global_batch_size or 0) % unit:
        yield "engine.global_batch_size", f"must be a multiple of data.batch_size x accumulation = {unit}"
    yield from c.method.conflicts(c)
    if c.token_budget is not None and c.mask.mode != "packed":
        yield "mask.token_budget", "must be null: it applies only to mask.mode packed"
    elif c.token_budget is not None and c.token_budget <= c.data.batch_size:
        yield "mask.token_budget", f"gives {c.token_budget} rows to {c.data.batch_size} images; wanted more than that"
    if c.engine.compile and c.engine.zero_stage == 3:
        yield "engine.compile", "cannot be used with engine.zero_stage 3, which gathers and frees a block's weights"
    if c.engine.optimizer in ("deepspeed", "apex") and c.engine.zero_stage == 0 and c.precision == "bf16":
        yield "engine.optimizer", "needs engine.zero_stage 1 or more in bf16; on one GPU stage 1 needs no more memory"
    if c.engine.attention == "flash_attn" and (c.precision == "fp32" or c.engine.device == "cpu"):
        yield "engine.attention", "needs bf16 and a GPU: give sdpa, or engine.precision=bf16 and a GPU"
    if c.engine.attention == "xformers" and c.mask.mode == "packed":
        yield "engine.attention", "does not support mask.mode packed: give sdpa or flash_attn"
    if (c.engine.device, c.data.decoder) == ("cpu", "gpu"):
        yield "data.decoder", "needs a GPU, but engine.device is cpu: give cpu or auto"
    if c.engine.deterministic and c.data.decoder == "gpu":
        yield "data.decoder", "contradicts engine.deterministic: there pixels may depend on the batch; give cpu or auto"
    if c.eval.every and not (c.eval.train_path and c.eval.val_path):
        yield "eval.every", "needs eval.train_path and eval.val_path, folders of labelled images"


def _paths_used(c: "Config") -> Iterator[str]:
    """The keys of the paths that this run reads or writes: the others may hold the placeholders of a published file."""
    yield from () if c.data.synthetic else ("data.root_path", "data.image_folder")
    yield from ("logging.folder", "meta.init_from", "meta.read_checkpoint")
    yield from ("eval.train_path", "eval.val_path") if c.eval.every else ()


def _mask_conflicts(c: "Config") -> Iterator[tuple[str, str]]:
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
            f"leaves about {left:.1f} of {c.grid**2} patches as context; wanted more than mask.min_keep "
            f"{spec.min_keep}: lower either",
        )


class _Short(Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60
        self.maxlevel = 2

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else "a number of over 300 digits"


def show(value: object) -> str:
    """A value as quoted in an error, shortened if long."""
    return _Short().repr(value)
