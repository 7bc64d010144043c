"""Read Parquet and JSONL splits as a stream of raw records.

Nothing is lost silently. A line that is not a JSON object, a row group that cannot be decoded and a file that ends too
early each become a *reject*, and everything else in the file is read. The values in a record are checked later
(`histories`, `requests`).
"""

from collections.abc import Callable, Iterator, Sequence
from urllib.parse import unquote

import pyarrow as pa

from persona.errors import InputError
from persona.inputs.jsonl import read_jsonl
from persona.inputs.parquet import read_parquet, read_schema
from persona.inputs.records import Records, rejects_of
from persona.inputs.splits import Split
from persona.options import MAX_ROW_MB

_FIRST_ROWS = 256
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def read_split(
    split: Split,
    *,
    max_rows: int = 4096,
    columns: Sequence[str] | None = None,
    job: str = "",
    max_row_mb: int = MAX_ROW_MB,
    problem: Callable[[pa.Schema], str] = lambda _: "",
) -> Iterator[Records]:
    """The rows of a split, at most `max_rows` at a time; of the named `columns`, those that exist.

    A folder `key=value` above the file gives a column `key` of strings, unless the file has one. A row of more than
    `max_row_mb` is a reject. So is, as a whole, a Parquet file for whose columns `problem` is not empty; JSON has no
    columns but those of each line.

    Raises `StorageError` if the store fails, rather than the file being broken.
    """

    def why_unusable(schema: pa.Schema) -> str:
        return problem(_with_partitions(schema.empty_table(), split.uri, None).schema)

    max_bytes = max_row_mb * 2**20
    if split.format == "parquet":
        parts = read_parquet(split, max_rows, columns, max_bytes, why_unusable)
    else:
        parts = read_jsonl(split, max_rows, columns, max_bytes)
    first_schema = None
    for part in parts:
        table = _with_partitions(part.table, split.uri, columns)
        if first_schema is None and table.num_rows:
            first_schema = table.schema
        rejects = rejects_of(split.uri, part.bad, job=job)
        first = first_schema or table.schema
        yield Records(table=table, rejects=rejects, first_schema=first, n_lost=part.n_lost)


def schema_of(splits: Sequence[Split]) -> pa.Schema:
    """The columns of the file with these splits, for JSON those of its first rows.

    Raises `InputError` with the reason if it cannot be read or has no rows.
    """
    if splits[0].format != "parquet":
        return first_rows(splits).schema
    schema = read_schema(splits[0])
    return _with_partitions(schema.empty_table(), splits[0].uri, None).schema


def first_rows(splits: Sequence[Split]) -> pa.Table:
    """A few rows of the first file that has any. Raises `InputError`, with the reason of a reject, if none has."""
    reason = "it has no rows"
    for split in splits:
        for records in read_split(split, max_rows=_FIRST_ROWS):
            if records.table.num_rows:
                return records.table
            if records.rejects.num_rows:
                reason = records.rejects["reason"][0].as_py()
    source = splits[0].uri if splits else "the input"
    others = f" and {len(splits) - 1} more" if len(splits) > 1 else ""
    raise InputError(f"no row can be read from {source}{others}: {reason}")


def _with_partitions(table: pa.Table, uri: str, columns: Sequence[str] | None) -> pa.Table:
    for folder in uri.split("/")[:-1]:
        key, is_partition, value = folder.partition("=")
        if is_partition and key and key not in table.column_names and (columns is None or key in columns):
            cell = None if value == _NULL_PARTITION else unquote(value)
            table = table.append_column(key, pa.repeat(pa.scalar(cell, pa.string()), table.num_rows))
    return table
