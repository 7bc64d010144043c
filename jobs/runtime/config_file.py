"""Reads the file of `--config`: YAML or JSON with a config's keys, or a recipe with one section per job."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from jobs.runtime import catalog
from jobs.runtime.usage_messages import did_you_mean
from persona.errors import UsageError

if TYPE_CHECKING:
    from yaml import MappingNode, Node


def read_config_file(uri: str, keys: Sequence[str], job: str, texts: Collection[str] = ()) -> dict[str, Any]:
    """The keys and values for `job` in a file; `uri` is a path, an s3:// URI or the name of a recipe.

    Values of the keys `texts` are taken as they are written: YAML would read a user id 007 as 7.

    Raises:
        UsageError: a file that cannot be read, or with a key that is not in `keys` or duplicate.
        StorageError: an object store that does not answer.
    """
    import yaml

    text = _read_text(uri)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--config {uri}: is neither YAML nor JSON\n{error}") from error
    if values is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise UsageError(f"--config {uri}: must be a mapping of keys to values, not a {type(values).__name__}")
    place = f"--config {uri}"
    jobs = catalog.job_names()
    if any(name in jobs and isinstance(section, dict) for name, section in values.items()):
        # No flag takes a mapping, so this is a recipe.
        _check_keys(node, jobs, place, what="section")
        if job not in values:
            raise UsageError(f"{place}: has no section {job}, only {', '.join(values)}")
        for name, section in values.items():
            if not isinstance(section, dict):
                raise UsageError(f"{place}: the section {name} must be a mapping of keys to values")
        node = next(section for key, section in node.value if key.value == job)
        values, place = values[job], f"{place}: {job}"
    _check_keys(node, keys, place, what="key")
    return values | {
        key.value: _as_written(value, values[key.value]) for key, value in node.value if key.value in texts
    }


def job_name(config_type: type) -> str:
    """What follows `python -m jobs.` for the job of this config."""
    module = config_type.__module__
    spec = getattr(sys.modules[module], "__spec__", None)
    return (module if spec is None else spec.name).rpartition(".")[2]


def _read_text(uri: str) -> str:
    try:
        return _read_bytes(uri).decode()
    except OSError as error:
        raise UsageError(f"--config {uri}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {uri}: is not UTF-8 text (byte {error.start})") from error


def _read_bytes(uri: str) -> bytes:
    if "://" in uri:
        from persona.storage import read_bytes

        return read_bytes(uri)
    path = Path(uri).expanduser()
    if path.is_file() or path.is_absolute() or PurePosixPath(uri).suffix:
        return path.read_bytes()
    recipes = catalog.recipe_names()
    if uri not in recipes:
        near = did_you_mean(uri, recipes, otherwise="")
        raise UsageError(f"--config {uri}: is neither a file nor a recipe{near} (recipes: {', '.join(recipes)})")
    return catalog.recipe_path(uri).read_bytes()


def _as_written(node: "Node", value: Any) -> Any:
    """The text of a value that YAML has read as a number, a date or a boolean, or of each of a list."""
    if isinstance(value, list):
        return [_as_written(item, of_item) for item, of_item in zip(node.value, value, strict=True)]
    return value if value is None or isinstance(value, str | dict) else node.value


def _check_keys(node: "MappingNode", known: Sequence[str], place: str, *, what: str) -> None:
    """Raises UsageError for an unknown or duplicate key."""
    names = [str(key.value) for key, _ in node.value]
    for name in names:
        if name not in known:
            raise UsageError(f"{place}: unknown {what} {name}{did_you_mean(name, known)}")
        if names.count(name) > 1:
            raise UsageError(f"{place}: duplicate {what} {name}")
