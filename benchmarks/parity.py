"""Loss and every gradient of one I-JEPA step, compared with the published implementation.

    python benchmarks/parity.py --reference PATH_TO_A_CHECKOUT_OF_facebookresearch/ijepa

Both get the same weights, images and masks (from the published collator), in fp32 on the CPU. Prints the largest
relative errors and exits with 1 if one exceeds the tolerance.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("kernels", "engine")]

from published import as_floats, checkout
from torch import Tensor, nn

from jepa.config.file import parse_config
from jepa.config.schema import ConfigError
from jepa.methods import build
from jepa.model.layout import Layout
from jepa.ranks.program import Parser, run_program

TOLERANCE = 1e-5


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--reference", type=Path, required=True, metavar="PATH", help="the checkout")
    parser.add_argument(
        "--model", default="vit_small", help="vit_tiny, vit_small, vit_base, ... (default: %(default)s)"
    )
    parser.add_argument("--crop", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--patch", type=int, default=16, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of weights, images and masks (default: random)")
    args = parser.parse_args()
    try:
        args.code = checkout(args.reference)
    except ConfigError as error:
        parser.error(str(error))
    seed = torch.seed() if args.seed is None else args.seed
    worst = 0.0
    print(f"{args.model}, {args.crop} px, patch {args.patch}, batch {args.batch}, seed {seed}")
    for contexts in (1, 2):
        errors = compare(args, contexts, seed)
        name = max(errors, key=lambda key: errors[key])
        worst = max(worst, errors[name])
        print(
            f"  {contexts} context mask(s): loss {errors['loss']:.1e}; {len(errors) - 1} gradients, "
            f"the largest relative error {errors[name]:.1e} in {name}"
        )
    print(f"{'equal' if worst <= TOLERANCE else 'DIFFERENT'} within {TOLERANCE:g}")
    return int(worst > TOLERANCE)


def compare(args: argparse.Namespace, contexts: int, seed: int) -> dict[str, float]:
    """Relative error of the loss and of each parameter's gradient, by name."""
    published = args.code.models
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (args.batch, args.crop, args.crop, 3), dtype=torch.uint8)
    collate = args.code.collator.MaskCollator(
        input_size=args.crop, patch_size=args.patch, enc_mask_scale=(0.85, 1.0), pred_mask_scale=(0.15, 0.2),
        aspect_ratio=(0.75, 1.5), nenc=contexts, npred=4, min_keep=10,
    )  # fmt: skip
    _, context, target = collate([(image,) for image in images])
    config = parse_config(
        {
            "meta": {"model_name": args.model, "use_bfloat16": False},
            "data": {"root_path": "-", "batch_size": args.batch, "crop_size": args.crop},
            "mask": {"patch_size": args.patch, "num_enc_masks": contexts},
            "optimization": {"epochs": 1, "warmup": 0},
            "logging": {"folder": "-"},
        }
    )
    ours: Any = build(config)
    encoder = getattr(published, args.model)(img_size=[args.crop], patch_size=args.patch)
    teacher = getattr(published, args.model)(img_size=[args.crop], patch_size=args.patch)
    predictor = published.vit_predictor(
        num_patches=encoder.patch_embed.num_patches,
        embed_dim=encoder.embed_dim,
        predictor_embed_dim=384,
        depth=len(ours.predictor.predictor_blocks),
        num_heads=encoder.num_heads,
    )
    for module in (encoder, teacher, predictor):
        roughen(module)
    ours.encoder.load_state_dict(encoder.state_dict())
    ours.predictor.load_state_dict(predictor.state_dict())
    pixels = as_floats(images, config)
    with torch.no_grad():
        h = teacher(pixels)

    normed = args.code.masks.apply_masks(F.layer_norm(h, h.shape[-1:]), target)
    goal = args.code.tensors.repeat_interleave_batch(normed, args.batch, repeat=contexts)
    theirs = F.smooth_l1_loss(predictor(encoder(pixels, context), context, target), goal)
    theirs.backward()
    loss = ours([images], Layout(torch.stack(context), torch.stack(target), (), torch.stack(target), (0, 0)), h).loss
    loss.backward()

    errors = {"loss": relative(loss, theirs)}
    for mine, other, prefix in (
        (ours.encoder, encoder, "encoder."),
        (ours.predictor, predictor, "predictor."),
    ):
        wanted = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
        for name, parameter in mine.named_parameters():
            grad = wanted.pop(name)
            assert parameter.grad is not None and grad is not None
            errors[prefix + name] = relative(parameter.grad, grad)
        assert not wanted, f"only the published model has the parameters {sorted(wanted)}"
    return errors


def roughen(module: nn.Module) -> None:
    """Moves biases and norms away from zeros and ones, so that every gradient is compared at a generic point."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    sys.exit(run_program(main, ValueError, OSError))
