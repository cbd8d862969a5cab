"""Runs programs of a copy of the engine in forks of this process, which has imported everything that they need.

    python tests/support/forks.py COPY

reads a line of JSON, [[program, words, environment, file for its output], ...], runs these at once and prints their
exit codes, until there are no more lines. What goes to stderr is in the same file, or in a fifth that is named.
(`processes.start` forks only this repository's engine/train.py.)
"""

import atexit
import importlib
import json
import os
import runpy
import sys
import traceback

LAZILY = ("deepspeed", "deepspeed.runtime.zero.stage_1_and_2", "nvidia.dali.experimental.dynamic", "matplotlib.figure")


def begin(program: str, words: list[str], environment: dict[str, str], output: str, errors: str | None = None) -> int:
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if errors else 1, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ |= environment
        sys.argv = [program, *words]
        try:
            runpy.run_path(program, run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # taking all modules down would take seconds
    return process


def main(root: str) -> None:
    sys.path[:0] = [f"{root}/engine", f"{root}/benchmarks"]
    for name in ("train", "evaluate", "export", "visualize", "doctor", *LAZILY):
        importlib.import_module(name)
    for line in sys.stdin:
        started = [begin(*one) for one in json.loads(line)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
