"""Parameters, kept tokens and FLOPs of a run, computed from its config alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

import torch

from jepa.config.schema import Config
from jepa.data.masks import MaskSpec, sample_masks
from jepa.model.cost import Kept
from jepa.model.layout import target_rows


@dataclass(frozen=True)
class Parameters:
    """Trained parameters by submodule, and how many of them have an average. Fixed position embeddings are none."""

    parts: Mapping[str, int]
    averaged: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def parameters(config: Config) -> Parameters:
    """Those of the method's model, built without memory."""
    with torch.device("meta"):
        model = config.method(config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return Parameters(parts, sum(parts[name] for name in model.averaged))


def mean_tokens(config: Config) -> Kept:
    """Means over micro-batches of masks sampled as in the run."""
    if not config.method.masked:
        return Kept(*3 * (config.grid**2,))
    lengths, rows = _sampled(config.mask_spec, config.data.batch_size)
    contexts, targets = zip(*lengths, strict=True)
    return Kept(fmean(contexts), fmean(targets), rows)


def longest_tokens(config: Config) -> Kept:
    """The lengths of the micro-batch with the most context patches, of those that `mean_tokens` samples, and the mean
    rows."""
    if not config.method.masked:
        return mean_tokens(config)
    lengths, rows = _sampled(config.mask_spec, config.data.batch_size)
    return Kept(*max(lengths), rows)


def flops_per_image(config: Config, tokens: tuple[float, ...] = ()) -> dict[str, float]:
    """Floating-point operations by part. `tokens`: the fields of `Kept`, or the first of them; the rest default to
    `mean_tokens`."""
    if len(tokens) < len(Kept._fields):
        tokens = (*tokens, *mean_tokens(config)[len(tokens) :])
    return config.method.flops(config, Kept(*tokens))


@lru_cache
def _sampled(spec: MaskSpec, batch: int) -> tuple[list[tuple[float, float]], float]:
    """Patches in a context and in a target, micro-batch by micro-batch, and the mean of the rows they need."""
    lengths, rows = [], []
    for step in range(max(16, 2**17 // batch)):
        masks = sample_masks(spec, seed=0, step=step, first=0, batch=batch)
        lengths.append((masks.context.numel() / (spec.num_enc_masks * batch), float(masks.target.shape[-1])))
        if step % 8 == 0:  # counting these takes longer than sampling
            rows.append(target_rows(masks.target, spec.height * spec.width)[2])
    return lengths, fmean(rows)
