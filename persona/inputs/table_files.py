"""The data files of a table that is read as input: a Delta table (`delta`) or an Iceberg table (`iceberg`)."""

from collections.abc import Mapping
from dataclasses import dataclass

from persona.storage import FileEntry

Partitions = tuple[tuple[str, str | None], ...]
"""Columns that have one value for all rows of a file and may be absent from it: name and value; None for null."""


@dataclass(frozen=True, kw_only=True)
class TableVersion:
    """A version of a table: the number of a Delta version, or the id of an Iceberg snapshot."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} table, {'snapshot' if self.kind == 'Iceberg' else 'version'} {self.number}"


@dataclass(frozen=True, kw_only=True)
class TableFiles:
    """The data files of one version of a table, all Parquet, and the partition columns of each."""

    version: TableVersion
    partitions: Mapping[FileEntry, Partitions]
