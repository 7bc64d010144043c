"""Raw records as they come from a file, and rejects for what cannot become one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa

REJECTS = pa.schema(
    [
        ("job", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("seen_at", pa.timestamp("us", "UTC")),
    ]
)
WHOLE_FILE = -1  # the `row` of a reject that concerns a whole file or an unknown part of it
MAX_BATCH_BYTES = 32 * 2**20  # hand rows on at this size, however few they are
LOCATION = ("_source", "_row")
_SHOWN = 20  # columns in a message

BadRows = list[tuple[int, str]]
"""Row (as in `Records`, or `WHOLE_FILE`) and reason."""


class Part(NamedTuple):
    """Rows of a file with their location, those that are bad, and `n_lost` as in `Records`."""

    table: pa.Table
    bad: BadRows
    n_lost: int = 0


@dataclass(frozen=True, kw_only=True)
class Records:
    """Raw rows of one file, and the rejects found while reading them.

    `table` has the file's own columns and two more: `_source` (the file's URI) and `_row` (the row number in a Parquet
    file, the byte offset of the line in uncompressed text). A column whose JSON values have no common type has the
    type `arrow.json`: each value is its own JSON text. `rejects` has the schema `REJECTS`. `first_schema` is that of
    the first rows of the same split; those of JSON may have other columns than later ones. `n_lost` is how many
    more rows the rejects stand for: those of a file or a row group that is a single reject.
    """

    table: pa.Table
    rejects: pa.Table
    first_schema: pa.Schema
    n_lost: int = 0

    def all_rejects(self, bad: BadRows, *, job: str) -> pa.Table:
        """`rejects`, followed by rejects for rows of `table` that were found bad later."""
        source = self.table["_source"][0].as_py() if bad else ""
        return pa.concat_tables([self.rejects, rejects_of(source, bad, job=job)])


def rejects(job: str, sources: Sequence[str], rows: Sequence[int], reasons: Sequence[str]) -> pa.Table:
    """Rejects (`REJECTS`) with the current time, one per row."""
    seen_at = pa.array([datetime.now(UTC)] * len(rows), REJECTS.field("seen_at").type)
    return pa.table([[job] * len(rows), sources, rows, reasons, seen_at], schema=REJECTS)


def rejects_of(source: str, bad: BadRows, *, job: str) -> pa.Table:
    """Rejects (`REJECTS`) of one file."""
    return rejects(job, [source] * len(bad), [row for row, _ in bad], [reason for _, reason in bad])


def bad_rows(rows: pa.Array, reasons: pa.Array) -> BadRows:
    """The rows that have a reason (not null)."""
    failed = reasons.is_valid()
    return list(zip(rows.filter(failed).to_pylist(), reasons.filter(failed).to_pylist(), strict=True))


def with_location(table: pa.Table, source: str, rows: Sequence[int]) -> pa.Table:
    """`table` with the columns `_row` and `_source`."""
    if table.num_columns == 0:  # records without fields are rows too, but a table without columns has no length
        table = pa.table({"_row": pa.array(rows, pa.int64())})
    else:
        table = table.append_column("_row", pa.array(np.asarray(rows, dtype=np.int64)))
    return table.append_column("_source", pa.repeat(pa.scalar(source), table.num_rows))


def no_rows() -> pa.Table:
    """A table with a location and no rows."""
    return pa.table({"_row": pa.array([], pa.int64()), "_source": pa.array([], pa.string())})


def selected(names: Iterable[str], columns: Sequence[str] | None) -> list[str]:
    """Those of a file's columns to read: all for None; never one named like a location column."""
    return [name for name in names if (columns is None or name in columns) and name not in LOCATION]


def column(table: pa.Table, name: str | None) -> pa.Array:
    """A column as one array; all nulls if the table does not have it."""
    return table[name].combine_chunks() if name in table.column_names else pa.nulls(table.num_rows)


def describe(schema: pa.Schema) -> str:
    """The columns of an input with their types, for messages."""
    shown = [f"{field.name} ({field.type})" for field in schema if field.name not in LOCATION]
    more = [f"{len(shown) - _SHOWN:,} more"] if len(shown) > _SHOWN else []
    return ", ".join(shown[:_SHOWN] + more)


def too_long(what: str, max_bytes: int) -> str:
    """The reason for rejecting a row of more than `max_bytes`."""
    return f"{what} is longer than {max_bytes // 2**20:,} MB; --max-row-mb sets the limit"


def first_line(error: Exception) -> str:
    """The first line of an error's message; its class if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def is_store_failure(error: Exception) -> bool:
    """Whether the store failed, rather than the content of a file: Arrow raises `OSError` for both."""
    return isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error))
