"""Receipts: what was done with the rows of a partition, as rows that travel with them from the task to the driver.

Ray passes on each row once, however often a task is retried, so the sums over all receipts are exact.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMN = "receipt"  # JSON of the counts; null in rows that are no receipts


def with_no_receipt(rows: "pa.Table") -> "pa.Table":
    """The rows, none of which is a receipt, with the column that receipts need."""
    import pyarrow as pa

    return rows.append_column(_COLUMN, pa.nulls(rows.num_rows, pa.string()))


def receipt(counts: Mapping[str, int], schema: "pa.Schema") -> "pa.Table":
    """One row that has the counts, and nulls in the columns of `schema`."""
    import pyarrow as pa

    nulls = {field.name: pa.nulls(1, field.type) for field in schema}
    return pa.table({**nulls, _COLUMN: pa.array([json.dumps(counts)], pa.string())})


def without_receipts(rows: "pa.Table") -> "pa.Table":
    """The rows that are no receipts."""
    if _COLUMN not in rows.column_names:
        return rows
    return rows.filter(rows[_COLUMN].is_null()).drop_columns([_COLUMN])


def joined(files: "pa.Table", rows: "pa.Table") -> "pa.Table":
    """`files`, a row for each file that the rows were written to, and the receipts among the rows."""
    import pyarrow as pa

    if _COLUMN not in rows.column_names:
        return files
    found = [text for text in rows[_COLUMN].to_pylist() if text is not None]
    return pa.concat_tables([with_no_receipt(files), *(receipt(json.loads(text), files.schema) for text in found)])


class Receipts:
    """The sums of the receipts that have reached the driver."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def taken_from(self, files: "pa.Table") -> "pa.Table":
        """Count the receipts in a table; returns its other rows."""
        for text in files[_COLUMN].to_pylist():
            if text is not None:
                self.counts.update(json.loads(text))
        return without_receipts(files)
