"""What a pretraining method is. The engine takes a step of any method like this (jepa.train.step):

    views   = the batch's images, as `Method.views` wants them: a list of uint8 [B, S, S, 3]
    layout  = method.layout(...)                    what else the step draws: masks' rows, random directions, or None
    targets = method.targets(teacher, views, layout)     no gradient; the teacher holds the averages in `averaged`
    output  = method(views, layout, targets)
    output.loss.backward(), then the optimizer's step and the averages'

A method is a file in this folder with one subclass of Method, and in it a Settings class: the keys of `loss` that are
its own. The log, pictures, checkpoints, replay, health, budget, probes and benchmarks know no more of it than is here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from jepa.config.schema import Config, Loss
from jepa.data.augment import View
from jepa.model.cost import Held, Kept
from jepa.model.layout import Place
from jepa.model.vit import VisionTransformer


class Output(NamedTuple):
    """What a micro-batch gives."""

    loss: Tensor
    """fp32, 0-d, differentiable."""
    terms: tuple[Tensor, ...]
    """fp32, 0-d, detached and unweighted: the values of `Method.terms`."""
    features: dict[str, Tensor]
    """What must stay different between images, detached, by name: [R, D], or [R, K, D] whose mean over K counts.
    R is a multiple of B, and row r belongs to image r % B."""


class Method(nn.Module, ABC):
    """What is trained. `encoder` is what a run is for: it is probed, exported and visualized, or its average is."""

    Settings: ClassVar[type[Loss]] = Loss
    """The config section `loss` of this method."""
    terms: ClassVar[tuple[str, ...]] = ()
    """Names of the loss's terms, for the log."""
    averaged: ClassVar[tuple[str, ...]] = ()
    """Submodules whose moving average the teacher holds; none: there is no teacher, and no memory for one."""
    constant_lr: ClassVar[tuple[str, ...]] = ()
    """Submodules whose learning rate is optimization.lr in every step."""
    masked: ClassVar[bool] = False
    """Whether steps read masks, those of the section `mask`; then `layout` is a jepa.model.layout.Layout."""

    published: ClassVar[dict[tuple[str, str, str], dict[tuple[str, int, int, int], float]]] = {}
    """What its paper reports, to be printed beside a figure of the same protocol, task and name (jepa.probes), in
    percent: {(protocol, task, name): {(meta.model_name, mask.patch_size, data.crop_size, epochs): figure}}."""

    encoder: VisionTransformer

    def __init__(self, config: Config) -> None:
        super().__init__()

    @classmethod
    def settings(cls, config: Config) -> Any:
        """The config's section `loss`: an instance of this class's Settings."""
        assert isinstance(config.loss, cls.Settings)
        return config.loss

    @classmethod
    def conflicts(cls, config: Config) -> Iterator[tuple[str, str]]:
        """Settings that exclude each other: the key to change, and what it must be."""
        yield from ()

    @classmethod
    def couples_images(cls, config: Config) -> bool:
        """Whether the loss has statistics over the images of a micro-batch of all ranks."""
        return False

    @classmethod
    def views(cls, config: Config) -> list[View]:
        """How the loader makes the views of an image."""
        return [config.data.view]

    @classmethod
    def layout(cls, config: Config, place: Place, device: torch.device, whole: bool = False) -> Any:
        """What the micro-batch at `place` draws besides images, on `device`: for masked methods a Layout, the rows that
        it reads. `whole`: the features that `Output` holds are to be of whole images; training must not change by a
        bit."""
        return None

    @staticmethod
    def targets(teacher: Any, views: list[Tensor], layout: Any) -> Any:
        """What is predicted, made without gradient by `teacher` (jepa.train.teacher.Teacher; None without averages)."""
        return None

    @abstractmethod
    def forward(self, views: list[Tensor], layout: Any, targets: Any | Callable[[], Any]) -> Output:
        """`targets` may be a function that returns them, to be called once, when they are needed: on several ranks the
        teacher's weights arrive while the encoder computes."""

    @classmethod
    @abstractmethod
    def flops(cls, config: Config, kept: Kept) -> dict[str, float]:
        """Floating-point operations per image by part, forward and backward (jepa.model.cost)."""

    @classmethod
    @abstractmethod
    def activations(cls, config: Config, kept: Kept, size: int, ranks: int) -> Held:
        """Bytes that a micro-batch keeps for its backward; `size` of a value (jepa.model.cost)."""


def augmented(
    config: Config,
    *,
    blur: float,
    solarize: float = 0.0,
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
    size: int | None = None,
    scale: tuple[float, float] | None = None,
) -> View:
    """A view with the colour augmentation of joint-embedding methods (MoCo v2, BYOL, VICReg): `jitter` with probability
    0.8, greyscale with 0.2, `blur` and `solarize` with theirs; and a flip. With data.use_color_distortion the jitter is
    the config's, and with data.use_gaussian_blur the probability of blur. `size` in pixels and `scale`: the config's if
    not given."""
    own = config.data.view
    return View(
        size or own.size,
        scale or own.scale,
        flip=0.5,
        jitter=own.jitter if config.data.use_color_distortion else jitter,
        jitter_probability=0.8,
        grey=0.2,
        blur=own.blur if config.data.use_gaussian_blur else blur,
        solarize=solarize,
    )
