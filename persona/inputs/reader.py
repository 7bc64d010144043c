"""Read Parquet and JSONL splits as a stream of raw records.

Nothing is lost silently. A line that is not a JSON object, a row group that cannot be decoded and a file that ends too
early each become a *reject*, and everything else in the file is read. The values in a record are checked later
(`histories`, `requests`).
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from persona.errors import InputError
from persona.inputs.jsonl import read_jsonl
from persona.inputs.parquet import read_parquet
from persona.inputs.records import Records, rejects_of
from persona.inputs.splits import Split


def read_split(
    split: Split, *, max_rows: int = 4096, columns: Sequence[str] | None = None, job: str = ""
) -> Iterator[Records]:
    """The rows of a split, at most `max_rows` at a time; of the named `columns`, those that exist.

    Raises `StorageError` if the store fails, rather than the file being broken.
    """
    read = read_parquet if split.format == "parquet" else read_jsonl
    for table, bad in read(split, max_rows, columns):
        yield Records(table=table, rejects=rejects_of(split.uri, bad, job=job))


def first_rows(splits: Sequence[Split]) -> pa.Table:
    """A few rows of the first file that has any. Raises `InputError`, with the reason of a reject, if none has."""
    reason = "it has no rows"
    for split in splits:
        for records in read_split(split, max_rows=256):
            if records.table.num_rows:
                return records.table
            if records.rejects.num_rows:
                reason = records.rejects["reason"][0].as_py()
    source = splits[0].uri if splits else "the input"
    others = f" and {len(splits) - 1} more" if len(splits) > 1 else ""
    raise InputError(f"no row can be read from {source}{others}: {reason}")
