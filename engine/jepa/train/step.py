"""One training step, of any method: what training, replay and the benchmarks all run."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from jepa import methods
from jepa.config.schema import Config
from jepa.data.loader import Batch
from jepa.methods.base import Method, Output
from jepa.model import fp8
from jepa.model.execution import compile_blocks, configure
from jepa.model.layout import Place
from jepa.model.vit import VisionTransformer, build_encoder
from jepa.ranks.distributed import Ranks

from . import zero
from .teacher import Teacher


def start_model(
    config: Config, device: torch.device, drawn_on: torch.device | str = "cpu"
) -> tuple[Any, Teacher | None]:
    """The DeepSpeed engine around a freshly initialised model, and the teacher, if the method has averages.

    `drawn_on`: the device that draws the initial weights; the same seed gives others there.
    """
    torch.manual_seed(config.engine.seed)
    with torch.device(drawn_on) if torch.device(drawn_on).type != "cpu" else contextlib.nullcontext():
        model = methods.build(config).to(device)
    copies: dict[str, nn.Module] = {
        name: copy.deepcopy(getattr(model, name)).to(config.dtype) for name in model.averaged
    }
    compiled = config.compiles(device.type)
    in_fp8 = None
    if config.engine.target_precision == "fp8":
        encoder = copies["encoder"]
        assert isinstance(encoder, VisionTransformer)
        in_fp8 = fp8.Encoder(encoder, compiled)
    model_engine = zero.start(model, config)
    if compiled:
        compile_blocks(model_engine.module, *copies.values())
    return model_engine, Teacher(copies, model_engine, in_fp8) if copies else None


def encoder_of(config: Config, model_engine: Any, teacher: Teacher | None) -> nn.Module:
    """The encoder that the run is for: its average, or without one the trained encoder. Every rank calls it. At ZeRO 3
    it is a copy, with whole weights: each rank may then run it as often as it likes."""
    trained = model_engine.module.encoder
    if teacher is not None and "encoder" in teacher.averages:
        return teacher.averages["encoder"]
    if config.engine.zero_stage < 3:
        return trained
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced
        encoder = build_encoder(config)
    configure(encoder, config)
    with torch.no_grad():
        for weight, parameter in zip(encoder.parameters(), trained.parameters(), strict=True):
            weight.copy_(zero.weight(parameter))
    return encoder.to(next(trained.parameters()).device, config.dtype)


class Step(NamedTuple):
    """The outcome of a step. Its tensors are still on the device; reading one synchronises."""

    applied: Tensor
    """Whether the weights were updated, bool, 0-d."""
    grad_norm: Tensor | None
    losses: list[Tensor]
    """Of each micro-batch: the loss, then the method's terms, fp32 [1 + terms]."""
    kept: tuple[int, int]
    """Patches in a context and in a target; (0, 0) without masks."""
    features: dict[str, Tensor]
    """`Output.features` of the last micro-batch."""
    files: list[str]
    """Of all micro-batches."""
    replaced: int
    """How many of these replace a file that cannot be used."""


class Watch(Protocol):
    """Sees what a step does before it is over. Every rank's is called."""

    def micro_batch(self, files: list[str], output: Output) -> None: ...

    def gradients(self, model_engine: Any) -> None:
        """All are accumulated, and the weights not yet updated."""


def take_step(
    config: Config,
    ranks: Ranks,
    model_engine: Any,
    teacher: Teacher | None,
    batches: Iterator[tuple[int, int, Batch]],
    step: int,
    *,
    whole: bool = False,
    at: Callable[[int, str], None] = lambda step, doing: None,
    watch: Watch | None = None,
) -> Step:
    """Takes step `step`, all its micro-batches, with the schedule values last given to `zero.schedule`, and updates the
    teacher. `whole`: its features are to be of whole images. `at` is called with each thing about to be done.
    """
    method: Method = model_engine.module
    losses, files, replaced, accumulation = [], [], 0, config.batch(ranks.world_size).accumulation
    for micro in range(accumulation):
        at(step, "waiting for images")
        of_step, of_micro, batch = next(batches)
        assert (of_step, of_micro) == (step, micro), "the images are those of another step"
        at(step, "computing")
        layout = method.layout(config, Place(step, micro, ranks.rank, ranks.world_size), ranks.device, whole)
        targets: Any = partial(method.targets, teacher, batch.views, layout)
        if ranks.world_size == 1:  # else called later, so that its weights' all-gather overlaps the encoder
            targets = targets()
        output: Output = model_engine(batch.views, layout, targets)
        model_engine.backward(poison(output.loss))
        losses.append(torch.stack([output.loss.detach(), *output.terms]))
        files += batch.files
        replaced += batch.replaced
        if watch is not None:
            watch.micro_batch(batch.files, output)
            if micro == accumulation - 1:
                watch.gradients(model_engine)
        outcome = zero.step(model_engine, config.optimization.clip_grad)
    assert outcome is not None  # the last micro-batch ended the step
    if teacher is not None:
        teacher.follow()
    kept = layout.kept if method.masked else (0, 0)
    return Step(*outcome, losses, kept, output.features, files, replaced)


def poison(loss: Tensor) -> Tensor:
    """The loss, unchanged if it is finite; if not, NaN with a gradient that is NaN."""
    return loss * (1 + 0 * loss.detach())
