"""Turn raw records into requests to the LLM, or into rejects with a reason."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from persona.errors import InputError
from persona.inputs import cells
from persona.inputs.histories import bucket_of
from persona.inputs.reader import first_rows
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
_KINDS = {
    "request_id": cells.ID,
    "user_id": cells.ID,
    "input": cells.TEXT,
    "query": cells.TEXT,
    "target": cells.TEXT,
    "system": cells.TEXT,
    "as_of": cells.TIMESTAMP,
}


def check_columns(splits: Sequence[Split], *, needs_target: bool, rejected: str | None = None) -> None:
    """Refuse an input whose first readable file lacks a column or has one of an unusable type.

    Raises `InputError` with the missing column and the existing ones.
    """
    table = first_rows(splits)
    source = table["_source"][0].as_py()
    needed = ["request_id", "user_id", "input", *(["target"] if needs_target else [])]
    needed += [rejected] if rejected is not None else []
    whys = {"target": "; training and scoring need it", rejected: "; --rejected names it"}
    for name in needed:
        if name not in table.column_names:
            why = whys.get(name, "")
            raise InputError(
                f"the requests in {source} have no column {name!r}{why}. They have: {describe(table.schema)}. "
                f"Required: {', '.join(needed)}"
            )
    cells.check_types(table.schema, _KINDS | ({} if rejected is None else {rejected: cells.TEXT}), source)


def have_system(splits: Sequence[Split]) -> bool:
    """Whether requests have system texts of their own, for chats; a blank one is that of the plug."""
    return "system" in first_rows(splits).column_names


def validate(
    records: Records, n_buckets: int, needs_target: bool, *, job: str = "", rejected: str | None = None
) -> tuple[pa.Table, pa.Table]:
    """Requests (`SCHEMA`) in input order, and rejects: those of `records` and those found here.

    A missing or blank `query` becomes the `input`. A missing `as_of` stays null (the whole history is visible), but an
    unreadable one is a reject, because it may have been a limit. With `rejected`, the name of a column, there is also
    the column `REJECTED`, and a row without such a text is a reject.
    """
    table = records.table
    request_ids, why_id = cells.ids(column(table, "request_id"), "request_id")
    users, why_user = cells.ids(column(table, "user_id"), "user_id")
    inputs, why_input = cells.texts(column(table, "input"), "input")
    queries, why_query = cells.texts(column(table, "query"), "query", required=False)
    targets, why_target = cells.texts(column(table, "target"), "target", required=needs_target)
    systems, why_system = cells.texts(column(table, "system"), "system", required=False)
    as_of, why_time = cells.timestamps(column(table, "as_of"), "as_of")
    reasons = pc.coalesce(why_id, why_user, why_input, why_query, why_target, why_system, why_time)
    if rejected is not None:
        wrong, why_wrong = cells.texts(column(table, rejected), rejected)
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
    return good, records.all_rejects(bad_rows(column(table, "_row"), reasons), job=job)
