"""Read Parquet and JSONL splits as a stream of raw records.

Nothing is lost silently. A line that is not a JSON object, a row group that cannot be decoded and a file that ends too
early each become a *reject*, and everything else in the file is read. The values in a record are checked later
(`histories`, `requests`).
"""

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from persona.errors import InputError
from persona.inputs.jsonl import read_jsonl
from persona.inputs.parquet import read_parquet, read_schema
from persona.inputs.records import Records, rejects_of
from persona.inputs.splits import Split
from persona.inputs.table_files import Partitions
from persona.options import MAX_ROW_MB

_FIRST_ROWS = 256


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

    Each of the split's `partitions` gives a column of strings, unless the file has one of that name. A row of more than
    `max_row_mb` is a reject. So is, as a whole, a Parquet file for whose columns `problem` is not empty; JSON has no
    columns but those of each line.

    Raises `StorageError` if the store fails, rather than the file being broken.
    """

    def why_unusable(schema: pa.Schema) -> str:
        return problem(_with_partitions(schema.empty_table(), split.partitions, None).schema)

    max_bytes = max_row_mb * 2**20
    if split.format == "parquet":
        parts = read_parquet(split, max_rows, columns, max_bytes, why_unusable)
    else:
        parts = read_jsonl(split, max_rows, columns, max_bytes)
    first_schema = None
    for part in parts:
        table = _with_partitions(part.table, split.partitions, columns)
        if first_schema is None and table.num_rows:
            first_schema = table.schema
        rejects = rejects_of(split.uri, part.bad, job=job)
        first = first_schema or table.schema
        yield Records(table=table, rejects=rejects, first_schema=first, n_lost=part.n_lost)


def schema_of(splits: Sequence[Split]) -> pa.Schema:
    """The columns of the file with these splits, for JSON those of its first rows.

    Raises `InputError` with the file and the reason if it cannot be read or has no rows.
    """
    if splits[0].format != "parquet":
        return first_rows(splits).schema
    try:
        schema = read_schema(splits[0])
    except InputError as error:
        raise InputError(f"no row can be read from {splits[0].uri}: {error}") from error
    return _with_partitions(schema.empty_table(), splits[0].partitions, None).schema


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


def _with_partitions(table: pa.Table, partitions: Partitions, columns: Sequence[str] | None) -> pa.Table:
    for name, value in partitions:
        if name not in table.column_names and (columns is None or name in columns):
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), table.num_rows))
    return table
