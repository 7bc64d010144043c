"""Turn raw records into requests to the LLM, or into rejects with a reason."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from persona.inputs import cells
from persona.inputs.columns import ColumnNames, check, why_absent
from persona.inputs.histories import bucket_of
from persona.inputs.records import Records, bad_rows, column, describe
from persona.inputs.splits import Split

SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("user_id", pa.string()),
        ("input", pa.large_string()),
        ("query", pa.large_string()),
        ("target", pa.large_string()),
        ("system", pa.large_string()),
        ("as_of", cells.TIME),
        ("bucket", pa.int32()),
    ]
)
# A wrong answer to compare the target with, read only if the caller names its column.
REJECTED = pa.field("rejected", pa.large_string())
# Nats and tokens of target and rejected text under the LLM without a plug, which the preference loss compares with.
REFERENCE = pa.schema(
    [
        ("reference_nats", pa.float64()),
        ("reference_tokens", pa.int32()),
        ("reference_rejected_nats", pa.float64()),
        ("reference_rejected_tokens", pa.int32()),
    ]
)
_KINDS = {
    "request_id": cells.ID,
    "user_id": cells.ID,
    "input": cells.TEXT,
    "query": cells.TEXT,
    "target": cells.TEXT,
    "system": cells.TEXT,
    "as_of": cells.TIMESTAMP,
}


@dataclass(frozen=True, kw_only=True)
class Columns(ColumnNames):
    """The columns of requests."""

    OPTIONAL: ClassVar = ("query", "as_of", "system")

    request_id: str = "request_id"
    user_id: str = "user_id"
    input: str = "input"
    query: str | None = "query"
    target: str = "target"
    as_of: str | None = "as_of"
    system: str | None = "system"


def check_columns(
    splits: Sequence[Split],
    columns: Columns,
    *,
    needs_target: bool,
    rejected: str | None = None,
    flag: str = "--request-columns",
) -> frozenset[str]:
    """The optional fields whose column exists in the files that can be used. Raises `InputError` as `columns.check`."""
    why = partial(problem, columns=columns, needs_target=needs_target, rejected=rejected, flag=flag)
    return check(splits, columns, why, flag=flag)


def problem(
    schema: pa.Schema,
    columns: Columns,
    *,
    needs_target: bool,
    rejected: str | None = None,
    flag: str = "--request-columns",
) -> str:
    """Why no row of a file with these columns is a request: one is missing or of another type; empty if some may be.

    For a missing column with the existing ones, and how to map them with `flag`.
    """
    needed = ["request_id", "user_id", "input", *(["target"] if needs_target else [])]
    for field in needed:
        name = columns.name_of(field)
        if name not in schema.names:
            why = "; training and scoring need it" if field == "target" else ""
            return (
                f"no column {name!r}{why}. There are: {describe(schema)}. Required: {', '.join(needed)}. "
                f"To use another column: {flag} {field}=COLUMN"
            )
    if rejected is not None and rejected not in schema.names:
        return f"no column {rejected!r}; --rejected names it. There are: {describe(schema)}"
    kinds = {columns.name_of(field): kind for field, kind in _KINDS.items()}
    return cells.unfit(schema, kinds | ({} if rejected is None else {rejected: cells.TEXT}))


def validate(
    records: Records,
    n_buckets: int,
    needs_target: bool,
    *,
    blank_targets: bool = False,
    columns: Columns = Columns(),
    needs_as_of: bool = False,
    job: str = "",
    rejected: str | None = None,
) -> tuple[pa.Table, pa.Table]:
    """Requests (`SCHEMA`) in input order, and rejects: those of `records` and those found here.

    With `blank_targets`, a needed target may be blank, but not null. A missing or blank `query` becomes the `input`. A
    missing `as_of` stays null (the whole history is visible), but an unreadable one is a reject, because it may have
    been a limit. With `needs_as_of` (other files have the column) so is a missing one where the first rows of the split
    lack the column. With `rejected`, the name of a column, there is also the column `REJECTED`, and a row without such
    a text is a reject.
    """
    raw = {field: column(records.table, columns.name_of(field)) for field in _KINDS}
    request_ids, why_id = cells.ids(raw["request_id"], columns.request_id)
    users, why_user = cells.ids(raw["user_id"], columns.user_id)
    inputs, why_input = cells.texts(raw["input"], columns.input)
    queries, why_query = cells.texts(raw["query"], str(columns.query), required=False)
    targets, why_target = cells.texts(raw["target"], columns.target, required=needs_target and not blank_targets)
    systems, why_system = cells.texts(raw["system"], str(columns.system), required=False)
    as_of, why_time = cells.timestamps(raw["as_of"], str(columns.as_of), columns.timestamp_unit)
    absent = why_absent(records.first_schema, columns)
    if needs_as_of and columns.as_of not in records.first_schema.names:
        absent.setdefault("as_of", f"the file has no column {columns.as_of}, but other files do")
    if needs_target:
        absent["target"] = f"{columns.target} is missing"
    optional = {"query": queries, "target": targets, "system": systems, "as_of": as_of}
    why_absent_one = cells.why_null(optional, absent)
    reasons = pc.coalesce(why_id, why_user, why_input, why_query, why_target, why_system, why_time, why_absent_one)
    if rejected is not None:
        wrong, why_wrong = cells.texts(column(records.table, rejected), rejected)
        reasons = pc.coalesce(reasons, why_wrong)
    good = pa.table(
        {
            "request_id": request_ids,
            "user_id": users,
            "input": inputs,
            "query": pc.if_else(cells.is_blank(queries), inputs, queries),
            "target": targets,
            "system": systems,
            "as_of": as_of,
        }
    ).filter(reasons.is_null())
    good = good.append_column("bucket", pa.array(bucket_of(column(good, "user_id"), n_buckets))).cast(SCHEMA)
    if rejected is not None:
        good = good.append_column(REJECTED, wrong.filter(reasons.is_null()))
    return good, records.all_rejects(bad_rows(column(records.table, "_row"), reasons), job=job)
