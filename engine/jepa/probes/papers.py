"""What the papers report, to print beside a figure of the same model and task.

Sources: I-JEPA (arXiv 2301.08243) and C-JEPA (arXiv 2410.19560), their tables of 300 and 600 epochs on ImageNet-1K.
"""

from jepa.config.schema import Config

from .labels import CLASS, Labelled

# Data sets known by their numbers of validation images and classes, which a subset or another set does not share.
CLASSIFIED = {
    (50_000, 1000): "ImageNet",
    (10_000, 100): "CIFAR-100",
    (20_500, 205): "Places205",
    (24_426, 8142): "iNaturalist 2018",
}

B16, L16, H14, H16 = ("vit_base", 16, 224), ("vit_large", 16, 224), ("vit_huge", 14, 224), ("vit_huge", 16, 448)
# (protocol, task, figure's name): {(objective, model, patch size, crop size): percent}
FIGURES: dict[tuple[str, str, str], dict[tuple[str, str, int, int], float]] = {
    ("linear", "ImageNet", "class"): {
        ("ijepa", *B16): 72.9, ("ijepa", *L16): 77.5, ("ijepa", *H14): 79.3, ("ijepa", *H16): 81.1,
        ("cjepa", *B16): 73.7, ("cjepa", *L16): 78.1,
    },
    ("linear", "CIFAR-100", "class"): {("ijepa", *H14): 87.5},
    ("linear", "Places205", "class"): {("ijepa", *H14): 58.4},
    ("linear", "iNaturalist 2018", "class"): {("ijepa", *H14): 47.6},
    ("lowshot", "ImageNet", "1%"): {("ijepa", *L16): 69.4, ("ijepa", *H14): 73.3, ("ijepa", *H16): 77.3},
    ("finetune", "ImageNet", "class"): {
        ("ijepa", *B16): 83.5, ("ijepa", *L16): 85.3, ("ijepa", *H16): 87.1,
        ("cjepa", *B16): 84.5, ("cjepa", *L16): 86.2,
    },
    ("clevr", "CLEVR", "count"): {("ijepa", *H14): 86.7, ("cjepa", *L16): 86.8},
    ("clevr", "CLEVR", "distance"): {("ijepa", *H14): 72.4, ("cjepa", *L16): 71.6},
    ("davis", "DAVIS 2017", "J&F"): {("ijepa", *L16): 56.6, ("cjepa", *L16): 58.3},
    ("segment", "ADE20K", "mIoU"): {("ijepa", *B16): 47.6, ("cjepa", *B16): 48.7},
    ("detect", "COCO", "box AP"): {("ijepa", *B16): 49.9, ("cjepa", *B16): 50.7},
    ("detect", "COCO", "mask AP"): {("ijepa", *B16): 44.5, ("cjepa", *B16): 45.3},
}  # fmt: skip


def reported(protocol: str, task: str | None, config: Config) -> dict[str, float]:
    """The paper's figures for this model and task, by name; empty if it has none."""
    model = config.loss.objective, config.meta.model_name, config.mask.patch_size, config.data.crop_size
    found = {
        name: models.get(model) for (which, on, name), models in FIGURES.items() if (which, on) == (protocol, task)
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def classified(sets: Labelled) -> str | None:
    """The name of a labelled data set that a paper reports, or None."""
    return CLASSIFIED.get((len(sets.val), len(sets.train.classes))) if CLASS in sets.val_y else None
