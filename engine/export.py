"""Exports a run's weights to other formats, and imports the published I-JEPA weights.

    python engine/export.py runs/demo/jepa-latest --to safetensors --out demo.safetensors
    python engine/export.py runs/demo/jepa-latest --to huggingface --out demo-ijepa
    python engine/export.py IN1K-vit.h.14-300e.pth.tar --config engine/configs/in1k_vith14_ep300_ijepa.yaml \\
        --to safetensors --out in1k_vith14.safetensors

The first argument is a checkpoint, a safetensors file written by this program, or a `.pth.tar` of the published I-JEPA
code. A `.pth.tar` does not say which model it holds: give its --config, overridden by section.key=value as in training.
`evaluate.py` and `visualize.py` read checkpoints and safetensors files.

    safetensors   one file, with the config in its metadata; --part all: both encoders and the predictor
    published     a .pth.tar for the published code: all three parts, without optimizer state
    timm          one file for timm's VisionTransformer, built with
                  class_token=False, global_pool="avg", fc_norm=False, num_classes=0
    huggingface   a folder for transformers' IJepaModel.from_pretrained

Only plain tensors are unpickled. Peak memory is about the size of the output.
"""

import sys
from pathlib import Path

from jepa.config.file import load_config
from jepa.config.words import command_line
from jepa.ranks.program import Parser, run_program
from jepa.state import interop
from jepa.state.restore import CheckpointError

FORMATS = ("safetensors", "published", "timm", "huggingface")


def export(
    source: str, to: str, out: Path, part: str | None, dtype: str, config: str | None, changes: list[str]
) -> str:
    """Writes `out` and returns a summary. Raises as `open_weights` does, and ValueError for an impossible part."""
    possible = {"safetensors": [*interop.PARTS, "all"], "published": ["all"]}.get(to, list(interop.ENCODERS))
    part = part or possible[0]
    if part not in possible:
        raise ValueError(f"--part {part}: must be {' or '.join(possible)} for --to {to}")
    if changes and not config:
        raise ValueError(f"{changes[0]}: an override needs --config")
    interop.refuse_out(out)
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


def work() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint, a .safetensors or a .pth.tar")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, type=Path, metavar="PATH", help="must not exist yet")
    parser.add_argument("--part", choices=[*interop.PARTS, "all"], help="default: target_encoder; for published: all")
    parser.add_argument("--dtype", choices=list(interop.DTYPES), default="fp32")
    parser.add_argument("--config", metavar="YAML", help="config of the model in a .pth.tar")
    parser.add_argument("changes", nargs="*", metavar="section.key=value", help="overrides of --config")
    args = parser.parse_intermixed_args(command_line(sys.argv[1:]))
    print(export(args.source, args.to, args.out, args.part, args.dtype, args.config, args.changes))
    return 0


def main() -> int:
    return run_program(work, CheckpointError, ValueError, OSError)


if __name__ == "__main__":
    sys.exit(main())
