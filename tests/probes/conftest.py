"""Probes run on ranks; most tests have one."""

from collections.abc import Iterator

import pytest

from probing import alone


@pytest.fixture
def one_rank() -> Iterator[None]:
    with alone():
        yield
