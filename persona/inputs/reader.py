"""Read Parquet and JSONL splits as a stream of raw records.

Nothing is lost silently. A line that is not a JSON object, a row group that cannot be decoded and a file that ends too
early each become a *reject*, and everything else in the file is read. The values in a record are checked later
(`histories`, `requests`).
"""

from collections.abc import Iterator, Sequence
from urllib.parse import unquote

import pyarrow as pa

from persona.errors import InputError
from persona.inputs.jsonl import read_jsonl
from persona.inputs.parquet import read_parquet, read_schema
from persona.inputs.records import Records, rejects_of
from persona.inputs.splits import Split

_FIRST_ROWS = 256
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def read_split(
    split: Split, *, max_rows: int = 4096, columns: Sequence[str] | None = None, job: str = ""
) -> Iterator[Records]:
    """The rows of a split, at most `max_rows` at a time; of the named `columns`, those that exist.

    A folder `key=value` above the file gives a column `key` of strings, unless the file has one.

    Raises `StorageError` if the store fails, rather than the file being broken.
    """
    read = read_parquet if split.format == "parquet" else read_jsonl
    first_schema = None
    for raw, bad in read(split, max_rows, columns):
        table = _with_partitions(raw, split.uri, columns)
        if first_schema is None and table.num_rows:
            first_schema = table.schema
        rejects = rejects_of(split.uri, bad, job=job)
        yield Records(table=table, rejects=rejects, first_schema=first_schema or table.schema)


def schema_of(split: Split) -> pa.Schema:
    """The columns of a file, for JSON those of its first rows. It has no fields if the file cannot be read."""
    if split.format == "parquet":
        schema = read_schema(split)
        return _with_partitions(schema.empty_table(), split.uri, None).schema
    return next((records.table.schema for records in read_split(split, max_rows=_FIRST_ROWS)), pa.schema([]))


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
