"""What a model's frozen or fine-tuned features are worth, by the protocols of the I-JEPA and C-JEPA papers.

    python engine/evaluate.py PROTOCOL WEIGHTS ...          on one device; PROTOCOL --help lists its options
    deepspeed engine/evaluate.py PROTOCOL WEIGHTS ...       on all GPUs of a machine; torchrun works too
    python engine/evaluate.py report FOLDER                 gathers the results below FOLDER into one table

WEIGHTS: a checkpoint, an export, a .pth.tar of the published code with --config, or an IJepaModel's Hugging Face
folder. Prints a table, with an untrained encoder of the same shape and the paper's figure where it has one, and writes
a JSON into --out. The same command goes on after an interruption.

protocols:
"""

import argparse
import importlib
import sys
from types import ModuleType

import torch.distributed as dist
from torch import __version__

from jepa.config.words import command_line
from jepa.probes import job as jobs
from jepa.probes.results import file_name, record, table, write
from jepa.ranks.distributed import NotMet, leave, start
from jepa.ranks.program import Parser, program, run_program
from jepa.state.restore import CheckpointError

PROTOCOLS = {
    "features": "stores the features that knn, linear, lowshot and clevr read, and does nothing else",
    "knn": "nearest neighbours' vote",
    "linear": "linear classifier: the paper's, or a quick one on stored features",
    "lowshot": "1 %%, 10 %% or k images per class: linear or fine-tuned",
    "finetune": "all weights, end to end",
    "clevr": "object counts and distances of CLEVR",
    "davis": "label propagation through the videos of DAVIS 2017",
    "segment": "semantic segmentation in ADE20K's layout",
    "detect": "Mask R-CNN in COCO's layout",
    "report": "one table of several models' results",
}
DEFAULT = "linear"  # where the first word is no protocol


def parser_of(protocol: str | None) -> argparse.ArgumentParser:
    """The command line. Only the protocol in use is imported: some need packages that others do not."""
    parser = Parser(description=__doc__)
    chosen = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    for name, summary in PROTOCOLS.items():
        module = module_of(name) if name == protocol else None
        sub = chosen.add_parser(name, help=summary, description=module.__doc__ if module else summary)
        if module and name != "report":
            jobs.arguments(sub)
            sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        if module:
            module.arguments(sub)
            sub.set_defaults(command=sub)
    return parser


def module_of(protocol: str) -> ModuleType:
    """Its module. Raises ValueError if it needs a package that is missing or does not fit."""
    try:
        return importlib.import_module(f"jepa.probes.{protocol}")
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: a torchvision that was built for another torch
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"needs a package that cannot be imported ({reason}); pip install -e '.[eval]', with a torchvision that is "
            f"built for torch {__version__}"
        ) from error


def evaluate(args: argparse.Namespace) -> None:
    protocol = module_of(args.protocol)
    if args.protocol == "report":
        print(protocol.run(args))
        return
    ranks = start(args.device, timeout_minutes=12 * 60)  # ranks whose work is longer than others' are not lost
    try:
        job = jobs.open_job(args, ranks)
        result = protocol.run(job, args)
        aside = ("protocol", "weights", "command", "debug")
        settings = {name: value for name, value in vars(args).items() if name not in aside}
        defaults = {name: args.command.get_default(name) for name in settings}
        content = record(args.protocol, job, result, settings, defaults)
        path = job.out / file_name(content)
        job.first_only(lambda: write(path, content))
        if ranks.is_first:
            print(f"{args.weights}: {args.protocol}" + (f" on {result.task}" if result.task else ""))
            print(table(content["rows"]))
            print(f"written to {path}")
    finally:
        dist.destroy_process_group()


def words() -> list[str]:
    """The command line, with the protocol that it may leave out. Raises ValueError like `command_line`."""
    given = command_line(sys.argv[1:])
    if given and given[0] not in PROTOCOLS and not given[0].startswith("-"):
        given.insert(0, DEFAULT)
    return given


def protocol_in(given: list[str]) -> str | None:
    return next((word for word in given if word in PROTOCOLS), None)


def work() -> int:
    given = words()
    evaluate(parser_of(protocol_in(given)).parse_args(given))
    return 0


def main() -> int:
    mistakes = (CheckpointError, NotMet, ValueError, OSError)
    return run_program(work, *mistakes, name=lambda: f"{program()} {protocol_in(sys.argv[1:]) or ''}".rstrip())


if __name__ == "__main__":
    leave(main)
