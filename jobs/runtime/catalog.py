"""The jobs and recipes that exist: found in the package, so a new job or recipe is one new file."""

import pkgutil
from importlib.util import find_spec
from pathlib import Path

import jobs

_RECIPES = Path(jobs.__path__[0]) / "recipes"


def job_names() -> list[str]:
    """What can follow `python -m jobs.`, sorted."""
    found = pkgutil.iter_modules(jobs.__path__)
    return sorted(module.name for module in found if not module.ispkg and not module.name.startswith("_"))


def job_summary(name: str) -> str:
    """The first line of a job's docstring, read without importing the job."""
    import ast

    spec = find_spec(f"jobs.{name}")
    assert spec is not None
    assert spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    return docstring.partition("\n")[0]


def recipe_names() -> list[str]:
    """The recipes of the package, like `small` or `lamp_4/paper`, sorted."""
    return sorted(path.relative_to(_RECIPES).with_suffix("").as_posix() for path in _RECIPES.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe."""
    return _RECIPES / f"{name}.yaml"
