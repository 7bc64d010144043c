"""List the data files of an Iceberg table's current snapshot, through a catalog that pyiceberg knows.

Catalogs are described in pyiceberg's own settings: `~/.pyiceberg.yaml`, or variables `PYICEBERG_CATALOG__<NAME>__URI`.
The data files are read like any other file, with the credentials and the endpoint of the environment.
"""

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from persona.errors import InputError, PersonaError, StorageError, UsageError
from persona.inputs.table_files import TableFiles, TableVersion
from persona.storage import FileEntry
from persona.storage.retry import in_one_line
from persona.storage.s3 import endpoint

if TYPE_CHECKING:
    from pyiceberg.table import Table

PREFIX = "iceberg+"
_URI = re.compile(r"iceberg\+(?P<catalog>[\w-]+)://(?P<table>[\w-]+(\.[\w-]+)+)")


def check_uri(uri: str, *, flag: str) -> str:
    """The URI itself, `iceberg+CATALOG://NAMESPACE.TABLE`. Raises `UsageError`, naming `flag`, for any other form."""
    if not _URI.fullmatch(uri):
        raise UsageError(f"{flag}: {uri!r} must be {PREFIX}CATALOG://NAMESPACE.TABLE, with a catalog of pyiceberg")
    return uri


def find(uri: str, *, flag: str) -> TableFiles:
    """The files of the current snapshot.

    Raises `InputError`, naming `flag`, if pyiceberg, the catalog or the table is missing, or if the table's files have
    to be combined with something else to get its rows.
    """
    table = _load(uri, flag)
    snapshot = table.current_snapshot()
    if snapshot is None:
        raise InputError(f"{flag}: the Iceberg table {uri} has no snapshot: nothing was ever written to it")
    _check_names(table, uri, flag)
    files = dict.fromkeys(_files(table, uri, flag), ())
    return TableFiles(version=TableVersion(kind="Iceberg", number=snapshot.snapshot_id), partitions=files)


def only_gained_rows(uri: str, since: int, *, flag: str) -> bool:
    """Whether since a snapshot rows were only added, or moved to other files as `rewrite_data_files` does.

    False also if that snapshot has expired.
    """
    table = _load(uri, flag)
    snapshot = table.current_snapshot()
    while snapshot is not None and snapshot.snapshot_id != since:
        operation = snapshot.summary.operation.value if snapshot.summary else ""
        if operation not in ("append", "replace") or snapshot.parent_snapshot_id is None:
            return False
        snapshot = table.snapshot_by_id(snapshot.parent_snapshot_id)
    return snapshot is not None


def store_options() -> dict[str, str]:
    """Settings with which pyiceberg finds a store other than AWS, as everything else here does."""
    url = endpoint()
    if not url:
        return {}
    # Without a region pyiceberg asks AWS for it.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"s3.endpoint": url, "s3.region": region}


def _load(uri: str, flag: str) -> "Table":
    try:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError
    except ModuleNotFoundError as error:
        raise InputError(
            f"{flag}: {uri} needs the library pyiceberg; install it with: pip install 'persona-plug[iceberg]'"
        ) from error
    parts = _URI.fullmatch(uri)
    assert parts is not None
    try:
        catalog = load_catalog(parts["catalog"], **store_options())
    except ValueError as error:
        raise InputError(
            f"{flag}: pyiceberg knows no catalog {parts['catalog']!r} ({in_one_line(error)}); describe it in "
            "~/.pyiceberg.yaml or in PYICEBERG_CATALOG__... variables, on every node"
        ) from error
    try:
        return catalog.load_table(parts["table"])
    except (NoSuchTableError, NoSuchNamespaceError) as error:
        raise InputError(f"{flag}: the catalog {parts['catalog']!r} has no table {parts['table']!r}") from error
    except PersonaError:
        raise
    except Exception as error:
        raise StorageError(f"{flag}: cannot load the Iceberg table {uri}: {in_one_line(error)}") from error


def _check_names(table: "Table", uri: str, flag: str) -> None:
    """Refuse a table in which a name has meant two columns, or a column has had two names: files keep the old names."""
    names: dict[int, str] = {}
    ids: dict[str, int] = {}
    for schema in table.schemas().values():
        for field_id in schema.field_ids:
            name = schema.find_column_name(field_id) or ""
            if names.setdefault(field_id, name) != name or ids.setdefault(name, field_id) != field_id:
                raise InputError(
                    f"{flag}: in the Iceberg table {uri} the column {name!r} was renamed or replaced, and older files "
                    "keep the old name, which is not supported; rewrite the table as a new one"
                )


def _files(table: "Table", uri: str, flag: str) -> Iterator[FileEntry]:
    for task in table.scan().plan_files():
        if task.delete_files:
            raise InputError(
                f"{flag}: the Iceberg table {uri} has delete files (merge-on-read), so that its data files still hold "
                "deleted rows, which is not supported; rewrite them with CALL system.rewrite_data_files(..., options "
                "=> map('delete-file-threshold', '1'))"
            )
        if task.file.file_format.value.upper() != "PARQUET":
            raise InputError(
                f"{flag}: the Iceberg table {uri} has data files in {task.file.file_format.value}; only Parquet is "
                "supported"
            )
        location = re.sub(r"^s3[an]://", "s3://", task.file.file_path).removeprefix("file://")
        # A data file never changes, so that its path and size identify its content.
        yield FileEntry(uri=location, size_bytes=task.file.file_size_in_bytes, tag="iceberg")
