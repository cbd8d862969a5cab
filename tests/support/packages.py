"""Packages that not every installation has."""

import importlib

import pytest


def need(*modules: str) -> None:
    """Skips the test module that calls it, unless all of these import."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            pytest.skip(f"{name} is not installed: pip install '.[eval]'", allow_module_level=True)
        except (ImportError, OSError, RuntimeError):  # which of them depends on the versions
            pytest.skip(f"{name} does not fit this torch", allow_module_level=True)
