"""Writes the weights of a run for others to read, and makes other people's readable here.

    python engine/export.py runs/demo/jepa-latest --to safetensors --out demo.safetensors
    python engine/export.py runs/demo/jepa-latest --to huggingface --out demo-ijepa
    python engine/export.py IN1K-vit.h.14-300e.pth.tar --config engine/configs/in1k_vith14_ep300_ijepa.yaml \\
        --to safetensors --out in1k_vith14.safetensors

The first argument is a checkpoint, a safetensors file that this program wrote, or a `.pth.tar` of the published I-JEPA
code. That one does not say which model it holds: name its config, and change it by section.key=value as in training.
`evaluate.py` and `visualize.py` take checkpoints and safetensors files.

    safetensors   one file, the config in its metadata; --part all: both encoders and the predictor
    published     the published code's .pth.tar: all three parts, without the optimizer's state
    timm          one file for timm's VisionTransformer, built with
                  class_token=False, global_pool="avg", fc_norm=False, num_classes=0
    huggingface   a folder for transformers' IJepaModel.from_pretrained

Nothing is unpickled but plain tensors. The memory needed is that of what is written.
"""

import argparse
import sys
from pathlib import Path

from jepa import interop
from jepa.config import ConfigError
from jepa.config_file import load_config
from jepa.restore import CheckpointError

FORMATS = ("safetensors", "published", "timm", "huggingface")


def export(
    source: str, to: str, out: Path, part: str | None, dtype: str, config: str | None, changes: list[str]
) -> str:
    """Writes `out`; returns what was written. Raises as `open_weights` does, and ValueError for a wrong part."""
    possible = {"safetensors": [*interop.PARTS, "all"], "published": ["all"]}.get(to, list(interop.ENCODERS))
    part = part or possible[0]
    if part not in possible:
        raise ValueError(f"--part {part}: --to {to} writes {' or '.join(possible)}")
    if changes and not config:
        raise ValueError(f"{changes[0]}: there is no --config to change")
    weights = interop.open_weights(source, load_config(config, changes) if config else None)
    parts = list(interop.PARTS) if part == "all" else [part]
    if missing := [name for name in parts if name not in weights.shapes]:
        raise ValueError(f"--part {part}: {source} has no {missing[0]}; it has {', '.join(weights.shapes)}")
    if to == "safetensors":
        interop.save_safetensors(weights, parts, interop.DTYPES[dtype], out)
    elif to == "published":
        interop.save_published(weights, interop.DTYPES[dtype], out)
    elif to == "timm":
        interop.save_timm(weights, part, interop.DTYPES[dtype], out)
    else:
        interop.save_huggingface(weights, part, interop.DTYPES[dtype], out)
    trained = "".join(f", {name} {number}" for name, number in weights.trained.items())
    return f"{out}: {', '.join(parts)} of {weights.config.meta.model_name} in {dtype}{trained}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint, a .safetensors or a .pth.tar")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, type=Path, metavar="PATH", help="must not exist yet")
    parser.add_argument("--part", choices=[*interop.PARTS, "all"], help="default: the target encoder, or all")
    parser.add_argument("--dtype", choices=list(interop.DTYPES), default="fp32")
    parser.add_argument("--config", metavar="YAML", help="the model of a .pth.tar")
    parser.add_argument("changes", nargs="*", metavar="section.key=value", help="changes to --config")
    args = parser.parse_intermixed_args()
    try:
        print(export(args.source, args.to, args.out, args.part, args.dtype, args.config, args.changes))
    except (CheckpointError, ConfigError, ValueError, OSError) as error:
        print(f"engine/export.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
