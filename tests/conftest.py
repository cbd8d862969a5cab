"""Every test runs on a small number of threads, with uninitialised memory filled with NaN."""

import os

import pytest
import torch

# Without a GPU the Triton kernels run in the interpreter, which must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` returns NaN (or the largest integer), so that an output nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
