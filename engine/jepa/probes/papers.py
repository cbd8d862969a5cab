"""Which data sets the papers report on, to print their figure beside one of the same model and task."""

from jepa.config.schema import MODELS, Config

from .labels import CLASS, Labelled

# Data sets known by their numbers of validation images and classes, which a subset or another set does not share.
CLASSIFIED = {
    (50_000, 1000): "ImageNet",
    (10_000, 100): "CIFAR-100",
    (20_500, 205): "Places205",
    (24_426, 8142): "iNaturalist 2018",
}


def reported(protocol: str, task: str | None, config: Config, epochs: int | None) -> dict[str, float]:
    """The paper's figures for this model and task, by name; empty if it has none. `epochs`: None if nobody knows."""
    if config.vit != MODELS[config.meta.model_name]:
        return {}
    model, found = (config.meta.model_name, config.mask.patch_size, config.data.crop_size), {}
    for (which, on, name), figures in config.method.published.items():
        fits = [value for (*of, trained), value in figures.items() if (*of,) == model and epochs in (None, trained)]
        if (which, on) == (protocol, task) and len(fits) == 1:
            found[name] = fits[0]
    return found


def classified(sets: Labelled) -> str | None:
    """The name of a labelled data set that a paper reports, or None."""
    return CLASSIFIED.get((len(sets.val), len(sets.train.classes))) if CLASS in sets.val_y else None
