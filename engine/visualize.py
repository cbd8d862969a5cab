"""Plots a run: attention maps, principal components of the features, masks, and training curves.

    python engine/visualize.py runs/demo/jepa-latest --images data/demo/val --log runs/demo/jepa.jsonl

writes attention.png, features.png and, of a method with masks, masks.png for a checkpoint, curves.png for a log. Give
either or both.
"""

import argparse
import sys
from pathlib import Path

import torch

from jepa.config.words import command_line
from jepa.data.loader import eval_batches
from jepa.data.masks import sample_masks
from jepa.data.sources import open_images
from jepa.pictures.attention import attention_maps
from jepa.pictures.curves import training_curves
from jepa.pictures.masks import masks_on_images
from jepa.pictures.pca import feature_pca
from jepa.ranks.program import Parser, run_program
from jepa.state.encoder import load_encoder
from jepa.state.restore import CheckpointError


def draw_encoder(checkpoint: str, images_path: str, count: int, out: Path) -> list[Path]:
    """Plots attention, features and, if the method has them, masks for `count` images spread evenly over those at
    `images_path`."""
    encoder, config = load_encoder(checkpoint)
    source = open_images(images_path)
    indices = torch.linspace(0, len(source) - 1, min(count, len(source))).round().int().tolist()
    batches = eval_batches(source, crop_size=config.data.crop_size, batch_size=len(indices), indices=indices)
    images, _ = next(batches, (None, None))
    if images is None:
        raise ValueError(f"--images: none of the {len(indices)} images chosen from {images_path} can be decoded")
    with torch.no_grad():
        attention_maps(images, encoder.attention(images), out / "attention.png")
        feature_pca(images, encoder(images), out / "features.png")
    drawn = [out / "attention.png", out / "features.png"]
    if config.method.masked:
        # As in training, contexts are cut to the shortest of a batch.
        cut = (0, max(config.data.batch_size, len(images)))
        masks = sample_masks(config.mask_spec, seed=config.engine.seed, step=0, first=0, batch=len(images), cut=cut)
        masks_on_images(images, masks, config.mask.patch_size, out / "masks.png")
        drawn.append(out / "masks.png")
    return drawn


def draw(args: argparse.Namespace) -> list[Path]:
    if not args.checkpoint and not args.log:
        raise ValueError("nothing to draw; wanted a checkpoint with --images FOLDER, or --log FILE.jsonl, or both")
    if bool(args.checkpoint) != bool(args.images):
        given, wanted = ("a checkpoint", "--images FOLDER") if args.checkpoint else ("--images", "a checkpoint")
        raise ValueError(f"given {given} alone; wanted {wanted} as well")
    if args.count < 1:
        raise ValueError(f"--count: given {args.count}, wanted at least 1")
    is_new = not args.out.exists()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: given {args.out}, which cannot be a folder ({error.strerror}); wanted one") from error
    try:
        paths = draw_encoder(args.checkpoint, args.images, args.count, args.out) if args.checkpoint else []
        if args.log:
            training_curves(args.log, args.out / "curves.png")
            paths.append(args.out / "curves.png")
    except Exception:
        if is_new and not any(args.out.iterdir()):
            args.out.rmdir()
        raise
    return paths


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a checkpoint or exported .safetensors")
    parser.add_argument("--images", metavar="FOLDER", help="a folder tree, a .txt list, or WebDataset tars")
    parser.add_argument("--log", metavar="FILE.jsonl", help="the log of a run")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write the plots")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="number of images to show (default: 6)")
    return parser.parse_args(command_line(sys.argv[1:]))


def work() -> int:
    for path in draw(arguments()):
        print(path)
    return 0


def main() -> int:
    return run_program(work, CheckpointError, ValueError, OSError)


if __name__ == "__main__":
    sys.exit(main())
