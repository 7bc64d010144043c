"""Finds the module behind a name, such as `persona/engines/local.py` behind the engine `local`.

A new engine or retriever needs its file and its name in `persona.options`, nothing else.
"""

import importlib
from typing import Any

from persona.errors import UsageError


def find(package: str, name: str, *, required: str) -> Any:
    """The module `name` of a package.

    Raises:
        UsageError: there is no such module, or it does not define `required`.
    """
    path = f"{package}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # a library that the module itself needs
        module = None
    if not hasattr(module, required):
        raise UsageError(f"unknown name {name!r}: {package} has no module of this name that defines {required}")
    return module
