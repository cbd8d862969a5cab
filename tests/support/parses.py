"""Runs a program up to the end of its command line: parses.py PROGRAM WORD...

Exits with 0 if the program's own parser understands the words, and else as the program does.
"""

import argparse
import runpy
import sys
from collections.abc import Callable
from typing import Any


def only(parse: Callable[..., Any]) -> Callable[..., None]:
    def parse_and_leave(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise SystemExit(0)

    return parse_and_leave


if __name__ == "__main__":
    for name in ("parse_args", "parse_intermixed_args"):
        setattr(argparse.ArgumentParser, name, only(getattr(argparse.ArgumentParser, name)))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
