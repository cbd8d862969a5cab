"""The pretraining methods. One method is one file in here; `loss.objective` names the file.

`find` and `build` get a method by its name, so nothing outside this folder names one.
"""

import importlib
import inspect
import pkgutil
from functools import cache

from jepa.config.schema import Config
from jepa.model.execution import configure

from .base import Method

DEFAULT = "ijepa"  # where a config has no `loss.objective`, as the published ones


def names() -> list[str]:
    """The methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def find(name: object) -> type[Method]:
    """The method in the file `name`.py: its one subclass of Method. Raises ValueError if there is no such file, and
    TypeError if the method lacks a part."""
    if not isinstance(name, str) or name not in names():
        raise ValueError(f"must be one of {', '.join(names())}, the files of engine/jepa/methods")
    return _in_file(name)


@cache
def _in_file(name: str) -> type[Method]:
    module = importlib.import_module(f"{__name__}.{name}")
    (method,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    )
    if lacking := sorted(method.__abstractmethods__):
        raise TypeError(f"{module.__file__}: {method.__name__} lacks {', '.join(lacking)}: see jepa/methods/base.py")
    return method


def build(config: Config) -> Method:
    """The method of a config, freshly initialised, in fp32 on the default device, to be run as `engine` says.

    Raises ConfigError if its attention backend is not installed.
    """
    method = find(config.loss.objective)(config)
    configure(method, config)
    return method
