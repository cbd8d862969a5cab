"""Paths as people write them, and the words of a command line.

A shell expands `~` and `$NAME` only where it sees a path of its own: not in `--out=~/x`, in `logging.folder=~/x`, in a
YAML file or in an argument of a job script's template.
"""

import os
import re
from collections.abc import Sequence

LOCAL_RANK = ("--local-rank", "--local_rank")  # of torch.distributed.launch and DeepSpeed; the environment has it too


def expanded(path: str) -> str:
    """`path` with a leading `~` or `~user` and every $NAME and ${NAME} replaced; what is unknown stays."""
    return os.path.expanduser(os.path.expandvars(path))


def unknown_in(path: str) -> str | None:
    """What keeps an expanded path from being one: a variable that is not set, a user that there is not."""
    if variable := re.search(r"\$([A-Za-z_]\w*|\{\w+\})", path):
        return f"{variable[0]} is not set here"
    return f"there is no user {path.split('/')[0][1:]!r}; ./~ begins such a name" if path.startswith("~") else None


def command_line(words: Sequence[str]) -> list[str]:
    """The words of a program's command line, paths expanded, without what launchers add.

    Overrides stay as they are: jepa.config knows which of them are paths. Raises ValueError for a path that has a
    variable that is not set or a user that there is not.
    """
    kept, rest = [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in LOCAL_RANK:
            if not equals:
                next(rest, None)
        elif word.startswith("--"):
            kept.append(f"{name}={_known(value)}" if equals else word)
        else:
            kept.append(word if is_override(word) else _known(word))
    return kept


def is_override(word: str) -> bool:
    """Whether a word has the form section.key=value."""
    return re.match(r"\s*\w+\.\w+\s*=", word) is not None


def _known(path: str) -> str:
    found = expanded(path)
    if unknown := unknown_in(found):
        raise ValueError(f"{path}: {unknown}")
    return found
