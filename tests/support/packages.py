"""Packages that not every environment can import."""

import importlib

import pytest


def need(*modules: str) -> None:
    """Skips the rest of a test module unless all of these packages can be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
            why = (
                f"{module} cannot be imported"
                if isinstance(error, ImportError)
                else f"{module} does not fit this torch"
            )
            pytest.skip(f"{why} ({str(error).splitlines()[0][:100]})", allow_module_level=True)
