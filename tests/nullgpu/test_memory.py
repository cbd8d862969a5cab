"""The memory that --dry-run foretells against torch's allocator, in steps of short and of long contexts."""

import pytest
from steps import load, take

from jepa.data.masks import sample_masks
from jepa.model.cost import Kept
from jepa.model.layout import target_rows
from jepa.ranks import distributed
from jepa.train.memory import memory_per_rank

# Some cut in depth, so that the processor can draw the weights in seconds.
RUNS = [
    "in1k_vitb16_ep600_ijepa.yaml",
    "in1k_vitl16_ep600_cjepa.yaml meta.depth=6",
    "in1k_vith14_ep300_ijepa.yaml meta.depth=4",
    "in22k_vitg16_ep44_ijepa.yaml meta.depth=4",
    "cifar10_vits4_cjepa.yaml",
    "in1k_vith16-448_ep300_ijepa.yaml meta.depth=4 meta.pred_depth=4",
    "in1k_vitb16_ep600_ijepa.yaml meta.depth=4 mask.mode=packed",
    "in1k_vitb16_ep600_ijepa.yaml meta.depth=4 engine.zero_stage=0 meta.use_bfloat16=false",
]


@pytest.mark.parametrize("run", RUNS)
def test_peak_memory_is_foretold(run: str, ranks: distributed.Ranks) -> None:
    name, *words = run.split()
    config = load(name, *words, "engine.compile=false")  # keeps the same, in less time
    B, spec = config.data.batch_size, config.mask_spec
    lengths = {s: sample_masks(spec, seed=0, step=s, first=0, batch=B).context.numel() for s in range(40)}
    shortest, longest = (choose(lengths, key=lambda step: lengths[step]) for choose in (min, max))
    settled = take(config, ranks, [0, 1, longest, shortest])[2:]
    for step in settled:
        masks = sample_masks(spec, seed=0, step=step.step, first=0, batch=B)
        foretold = memory_per_rank(config, 1, Kept(*step.kept, target_rows(masks.target, config.grid**2)[2]))
        assert foretold.total == pytest.approx(step.allocated, rel=0.05), step.kept
    # Segments grow and shrink with the masks: little more is reserved than the peak needs.
    assert settled[-1].reserved < 1.1 * settled[0].allocated + 2**26
