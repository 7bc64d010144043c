"""Turn raw records into labelled statements, or into rejects with a reason.

A statement is a text that matches a group (a persona, a trait, a field) or does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from persona.inputs import cells
from persona.inputs.columns import ColumnNames, check, why_absent
from persona.inputs.histories import bucket_of, text_hash
from persona.inputs.records import Records, bad_rows, column, describe
from persona.inputs.splits import Split

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),  # what brings rows together: here the key of the statement
        ("group", pa.string()),
        ("row_id", pa.string()),
        ("label", pa.int8()),
        ("text", pa.large_string()),
        ("bucket", pa.int32()),
    ]
)
_LABELS = {
    **dict.fromkeys(("1", "true", "yes", "matching"), 1),
    **dict.fromkeys(("0", "false", "no", "not matching"), 0),
}
_LABEL = cells.Kind(
    description=f"a boolean or one of {', '.join(_LABELS)}",
    fits=lambda kind: types.is_boolean(kind) or cells.ID.fits(kind),
)
_KINDS = {"group": cells.ID, "text": cells.TEXT, "label": _LABEL, "statement_id": cells.ID}


@dataclass(frozen=True, kw_only=True)
class Columns(ColumnNames):
    """The columns of statements."""

    OPTIONAL: ClassVar = ("statement_id",)

    group: str = "group"
    text: str = "text"
    label: str = "label"
    statement_id: str | None = "statement_id"


def check_columns(splits: Sequence[Split], columns: Columns, *, flag: str) -> frozenset[str]:
    """The optional fields whose column exists. Raises `InputError` as `columns.check`."""
    return check(splits, columns, partial(problem, columns=columns, flag=flag), flag=flag)


def problem(schema: pa.Schema, *, columns: Columns, flag: str = "--statement-columns") -> str:
    """Why no row of a file with these columns can be used; empty if some can."""
    for field in ("group", "text", "label"):
        if (name := columns.name_of(field)) not in schema.names:
            return f"no column {name!r}. There are: {describe(schema)}. To use one of them: {flag} {field}=COLUMN"
    return cells.unfit(schema, {columns.name_of(field): kind for field, kind in _KINDS.items()})


def validate(records: Records, columns: Columns, n_buckets: int, *, job: str = "") -> tuple[pa.Table, pa.Table]:
    """Statements (`SCHEMA`) in input order, and rejects: those of `records` and those found here.

    A missing or blank `statement_id` becomes the hash of the text.
    """
    table = records.table
    groups, why_group = cells.ids(column(table, columns.group), columns.group)
    texts, why_text = cells.texts(column(table, columns.text), columns.text)
    labels, why_label = _labels(column(table, columns.label), columns.label)
    ids, why_id = cells.ids(column(table, columns.statement_id), str(columns.statement_id), required=False)
    absent = why_absent(records.first_schema, columns)
    reasons = pc.coalesce(why_group, why_text, why_label, why_id, cells.why_null({"statement_id": ids}, absent))
    good = pa.table({"group": groups, "row_id": ids, "label": labels, "text": texts}).filter(reasons.is_null())
    texts = column(good, "text")
    ids = pc.if_else(cells.is_blank(column(good, "row_id")), text_hash(texts), column(good, "row_id"))
    keys = pc.binary_join_element_wise(column(good, "group"), ids, "\n")
    rows = {**{name: column(good, name) for name in ("group", "label", "text")}, "row_id": ids, "user_id": keys}
    rows["bucket"] = pa.array(bucket_of(keys, n_buckets))
    statements = pa.table({name: rows[name] for name in SCHEMA.names}).cast(SCHEMA)
    return statements, records.all_rejects(bad_rows(column(table, "_row"), reasons), job=job)


def _labels(values: pa.Array, name: str) -> cells.Cells:
    words, reasons = cells.ids(values.cast(pa.string()) if types.is_boolean(values.type) else values, name)
    found = [None if word is None else _LABELS.get(word.strip().lower()) for word in words.to_pylist()]
    labels = pa.array(found, pa.int8())
    why = pc.if_else(labels.is_null(), f"{name} is not one of {', '.join(_LABELS)}", pa.scalar(None, pa.string()))
    return labels, pc.coalesce(reasons, why)
