"""The versions of Python and of the packages that results may depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("persona-plug", "torch", "transformers", "deepspeed", "ray", "deltalake", "rouge-score", "numpy")


def installed_versions() -> dict[str, str]:
    """By name, with Python first; a package that is missing is "not installed"."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
