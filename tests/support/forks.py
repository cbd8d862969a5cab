"""Runs programs of a copy of the engine in forks of this process, which has imported everything that they need.

    python tests/support/forks.py COPY

reads a line of JSON, [[program, words, environment, file for its output], ...], runs these at once and prints their
exit codes, until there are no more lines. (`processes.start` forks only this repository's engine/train.py.)
"""

import importlib
import json
import os
import runpy
import sys

LAZILY = ("deepspeed", "deepspeed.runtime.zero.stage_1_and_2", "nvidia.dali.experimental.dynamic", "matplotlib.figure")


def begin(program: str, words: list[str], environment: dict[str, str], output: str) -> int:
    process = os.fork()
    if process == 0:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ |= environment
        sys.argv = [program, *words]
        runpy.run_path(program, run_name="__main__")
        sys.exit(0)
    return process


def main(root: str) -> None:
    sys.path[:0] = [f"{root}/engine", f"{root}/benchmarks"]
    for name in ("train", "evaluate", "export", "visualize", *LAZILY):
        importlib.import_module(name)
    for line in sys.stdin:
        started = [begin(*one) for one in json.loads(line)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
