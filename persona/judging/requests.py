"""Requests to judge: a question about a task, the persona that should answer it, and another one to compare with."""

from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from persona.inputs import cells
from persona.inputs.histories import bucket_of
from persona.inputs.records import Records, bad_rows, column, describe
from persona.judging.rubrics import RUBRICS, TASKS

SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("user_id", pa.string()),
        ("input", pa.large_string()),
        ("task", pa.string()),
        ("persona", pa.large_string()),
        ("other_persona", pa.large_string()),
        ("other_user_id", pa.string()),
        ("bucket", pa.int32()),
    ]
)
_NEEDED = ("request_id", "user_id", "input", "task", "persona")
_KINDS: dict[str | None, cells.Kind] = {
    **dict.fromkeys(("request_id", "user_id", "task", "other_user_id"), cells.ID),
    **dict.fromkeys(("input", "persona", "other_persona"), cells.TEXT),
}


def problem(schema: pa.Schema) -> str:
    """Why no row of a file with these columns can be judged; empty if some may be."""
    missing = [name for name in _NEEDED if name not in schema.names]
    if missing:
        return (
            f"no column {missing[0]!r}. There are: {describe(schema)}. Required: {', '.join(_NEEDED)}; jobs.import_gym "
            "writes them"
        )
    return cells.unfit(schema, _KINDS)


def validate(records: Records, n_buckets: int, *, job: str) -> tuple[pa.Table, pa.Table]:
    """Requests (`SCHEMA`) in input order, and rejects. `other_persona` may be missing: such a row has no swap gap."""
    get = partial(column, records.table)
    ids = {name: cells.ids(get(name), name) for name in ("request_id", "user_id", "task")}
    texts = {name: cells.texts(get(name), name) for name in ("input", "persona")}
    others, why_other = cells.texts(get("other_persona"), "other_persona", required=False)
    other_users, why_other_user = cells.ids(get("other_user_id"), "other_user_id", required=False)
    tasks = ids["task"][0]
    unknown = pc.if_else(
        pc.is_in(tasks, value_set=pa.array(RUBRICS, pa.string())),
        pa.scalar(None, pa.string()),
        f"task is none of {', '.join(TASKS)}",
    )
    whys = [why for _, why in (*ids.values(), *texts.values())]
    reasons = pc.coalesce(*whys, why_other, why_other_user, unknown)
    found = {name: values for name, (values, _) in (ids | texts).items()}
    found |= {"other_persona": others, "other_user_id": other_users}
    # Without an owner of its own, a wrong persona is taken to be about the user of the request.
    found["other_user_id"] = pc.coalesce(found["other_user_id"], found["user_id"])
    good = pa.table(found).filter(reasons.is_null())
    good = good.append_column("bucket", pa.array(bucket_of(column(good, "user_id"), n_buckets), pa.int32()))
    return good.select(SCHEMA.names).cast(SCHEMA), records.all_rejects(bad_rows(get("_row"), reasons), job=job)
