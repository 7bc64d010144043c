"""A catalog of Iceberg tables in a SQLite file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyiceberg.catalog
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.utils.config import Config

from persona import storage
from persona.inputs.iceberg import store_options


@contextmanager
def sqlite_catalog(file: Path, warehouse: str) -> Iterator[Catalog]:
    """A catalog that pyiceberg finds by the name `local`, with a namespace `app` and tables on disk or on S3."""
    with pytest.MonkeyPatch.context() as change:
        change.setenv("PYICEBERG_CATALOG__LOCAL__URI", f"sqlite:///{file}")
        where = warehouse if storage.is_s3(warehouse) else f"file://{warehouse}"
        change.setenv("PYICEBERG_CATALOG__LOCAL__WAREHOUSE", where)
        change.setattr(pyiceberg.catalog, "_ENV_CONFIG", Config())  # which it reads once, when it is imported
        found = load_catalog("local", **store_options())
        found.create_namespace("app")
        yield found
        found.engine.dispose()  # type: ignore[attr-defined]  # or SQLite's connection is closed by the garbage collector
