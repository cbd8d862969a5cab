"""The probes of a run that is under way."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa.config.schema import Config
from jepa.data.decode import dali
from jepa.data.loader import eval_batches
from jepa.ranks.distributed import Ranks

from .knn import knn
from .labels import CLASS, open_labelled
from .linear import linear_probe


class OnlineProbe:
    """Accuracy of the encoder, or of its average where there is one, during training, on labelled folders; the images
    are split over the ranks.

    It draws none of the run's random numbers, so probing does not change a bit of the run. Raises ValueError if the
    folders have no labels, their classes differ, or DALI is missing.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        dali()  # if it is missing, say so now, not at the first probe
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.sets = open_labelled(str(config.eval.train_path), str(config.eval.val_path))
        sizes = len(self.sets.train), len(self.sets.val)
        self.indices = [evenly(size, config.eval.max_images)[ranks.rank :: ranks.world_size].tolist() for size in sizes]

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """{"knn": accuracy in 0..1, "linear": that of jepa.probes.linear}. Every rank calls it, and gets the same."""
        sets: list[Tensor] = []
        labelled = (self.sets.train, self.sets.train_y[CLASS]), (self.sets.val, self.sets.val_y[CLASS])
        for (source, labels), indices in zip(labelled, self.indices, strict=True):
            batches = eval_batches(
                source,
                crop_size=self.config.data.crop_size,
                batch_size=self.config.data.batch_size,
                indices=indices,
                device=self.device,
                decoder=self.config.decoder,
                num_workers=self.config.data.num_workers,
            )
            features, numbers = [torch.empty(0)], []
            for images, some in batches:
                with torch.no_grad():
                    features.append(encoder(images).float().mean(1).cpu())
                numbers += some
            shares: list[tuple[Tensor, list[int]]] = [(torch.empty(0), [])] * self.ranks.world_size
            dist.all_gather_object(shares, (torch.cat(features), numbers), group=self.ranks.cpu_group)
            together = np.concatenate([some for _, some in shares]).astype(int)
            order = np.argsort(together)  # the same on any number of ranks: the linear probe's figure depends on it
            sets += [torch.cat([rows for rows, _ in shares])[order], torch.from_numpy(labels[together[order]])]
        train_x, train_y, val_x, val_y = (x.to(self.device) for x in sets)
        found = knn(train_x, train_y, val_x, val_y, k=self.config.eval.knn_k)
        return {"knn": found, "linear": linear_probe(train_x, train_y, val_x, val_y)}


def evenly(total: int, wanted: int | None) -> np.ndarray:
    """`wanted` indices spread evenly over `total`; all of them if there are fewer."""
    return (
        np.arange(total) if wanted is None or wanted >= total else np.linspace(0, total - 1, wanted).round().astype(int)
    )
