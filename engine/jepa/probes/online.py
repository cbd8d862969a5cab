"""The probe of a run that is under way."""

import torch
import torch.distributed as dist
from torch import Tensor

from jepa.config.schema import Config
from jepa.data.decode import dali
from jepa.data.loader import eval_batches

from .features import Encoder, evenly, extract, open_labelled
from .knn import knn


class OnlineProbe:
    """k-NN accuracy of the encoder, or of its average where there is one, during training, on labelled folders; the
    images are split over the ranks.

    It draws no random numbers, so probing does not change a bit of the run. Raises ValueError if the folders have no
    labels, their classes differ, or DALI is missing.
    """

    def __init__(self, config: Config, rank: int, world_size: int, device: torch.device) -> None:
        dali()  # if it is missing, say so now, not at the first probe
        self.config, self.device = config, device
        self.sources = open_labelled(str(config.eval.train_path), str(config.eval.val_path))
        self.indices = [evenly(len(s), config.eval.max_images)[rank::world_size].tolist() for s in self.sources]

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """{"knn": accuracy in 0..1}. Every rank calls it and gets the same result."""
        parts = []
        for source, indices in zip(self.sources, self.indices, strict=True):
            batches = eval_batches(
                source,
                crop_size=self.config.data.crop_size,
                batch_size=self.config.data.batch_size,
                indices=indices,
                device=self.device,
                decoder=self.config.decoder,
                num_workers=self.config.data.num_workers,
            )
            features, indices = extract(encoder, batches)
            assert source.labels is not None  # checked by open_labelled
            parts += [features.cpu(), torch.from_numpy(source.labels[indices])]
        ranks: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, parts)
        train_x, train_y, val_x, val_y = (torch.cat(rows) for rows in zip(*ranks, strict=True))
        return {"knn": knn(train_x, train_y, val_x, val_y, k=self.config.eval.knn_k)}
