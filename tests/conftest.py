"""Every test runs with uninitialised memory filled with NaN, on its own random inputs.

They are drawn from a seed derived from the commit and the test's name: new ones with every commit, the same ones when a
failure is reproduced. `JEPA_TEST_SEED=random`, or a number, draws others.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in the interpreter, which must be selected before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def chosen_seed() -> str:
    seed = os.environ.get("JEPA_TEST_SEED", "")
    if not seed and shutil.which("git"):
        head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        seed = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    return seed if seed and seed != "random" else f"{random.SystemRandom().getrandbits(32)}"


def number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def pytest_configure(config):
    # Through the environment the controller's choice reaches the workers of pytest-xdist.
    os.environ["JEPA_TEST_SEED"] = chosen_seed()
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(number(os.environ["JEPA_TEST_SEED"]))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"inputs drawn from JEPA_TEST_SEED={os.environ['JEPA_TEST_SEED']}")


@pytest.fixture(autouse=True, scope="module")
def inputs_of_the_modules_own_fixtures(request):
    seed(request.node)


@pytest.fixture(autouse=True)
def inputs_of_its_own(request):
    seed(request.node)


def seed(node):
    of = number(os.environ["JEPA_TEST_SEED"] + node.nodeid)
    random.seed(of)
    torch.manual_seed(of)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` returns NaN (or the largest integer), so that an output left unwritten is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """A run that was stopped ignores them until its process ends, and what the process starts inherits that."""
    kept = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    }
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def fresh_compiler():
    """Nothing is compiled yet, and torch's counters are at zero."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
