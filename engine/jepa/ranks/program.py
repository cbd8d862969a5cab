"""How a program begins and ends for whoever typed its command: its options, and a mistake told in one message."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from torch import OutOfMemoryError

from .terminal import outlive_the_terminal

DEBUG = "--debug"


class Parser(argparse.ArgumentParser):
    """Describes its program by the docstring as it is laid out, has --debug, and tells a mistake in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self.add_argument(DEBUG, action="store_true", help="if something is wrong, show where, as a traceback")

    def error(self, message: str) -> NoReturn:
        subcommand = self.prog.removeprefix(os.path.basename(sys.argv[0]))
        self.exit(2, f"{program()}{subcommand}: {message}; --help lists what can be given\n")


def program() -> str:
    """What runs, such as engine/train.py."""
    return os.path.join(*os.path.abspath(sys.argv[0]).split(os.sep)[-2:])


def run_program(work: Callable[[], int | None], *mistakes: type[Exception], name: Callable[[], str] = program) -> int:
    """Does a program's work, wherever its output goes, and returns its exit code.

    One of `mistakes`, a GPU whose memory is full, and Ctrl-C end it with a message that begins with `name()`, on
    stderr; a traceback is before it with --debug alone. Its code is the `exit_code` of the exception, or 1. Any other
    exception is the program's own mistake, and raised.
    """
    outlive_the_terminal()
    told: tuple[type[Exception], ...] = (*mistakes, OutOfMemoryError)
    error: BaseException
    try:
        return work() or 0
    except KeyboardInterrupt as stopped:
        error, message, code = stopped, str(stopped) or "interrupted", 128 + signal.SIGINT
    except told as mistake:
        kind = "" if isinstance(mistake, (ValueError, OSError, RuntimeError)) else f"{type(mistake).__name__}: "
        error, message, code = mistake, f"{kind}{mistake}", getattr(mistake, "exit_code", 1)
    if DEBUG in sys.argv:
        traceback.print_exception(error)
    print(f"{name()}: {message}", file=sys.stderr)
    return code
