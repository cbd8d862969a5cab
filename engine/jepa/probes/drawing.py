"""Pictures beside a protocol's results."""

from collections.abc import Callable
from pathlib import Path

from .job import Job


def draw(job: Job, path: Path, work: Callable[[], object]) -> None:
    """Calls `work`, which writes a picture to `path`, on the first rank while the others wait.

    Results do not depend on it, so that whatever it raises is a line, not an error.
    """

    def on_first() -> None:
        try:
            work()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            job.say(f"{path} could not be drawn ({reason}); the results are whole without it")

    job.first_only(on_first)
