"""Pytest on the null GPU: tests/nullgpu/run PYTHON -m pytest tests/nullgpu --confcutdir=tests/nullgpu"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from jepa.ranks import distributed


@pytest.fixture(scope="session", autouse=True)
def ranks() -> distributed.Ranks:
    """The one rank of this process, started first, as in a program: it sets how torch allocates."""
    os.environ.pop("RANK", None)
    return distributed.start("cuda")


@pytest.fixture(autouse=True)
def as_users_start_it() -> Iterator[None]:
    """What a test switches for the whole process is switched back."""
    settings: Any = torch.utils.deterministic
    state = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(state[0])
    settings.fill_uninitialized_memory = state[1]
