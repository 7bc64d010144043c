"""Bring the users' texts to their requests: the store has only vectors and hashes, so the histories are read again.

Rows of the histories go to the task that joins the requests of their bucket.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jobs.runtime import reading
from jobs.runtime.inputs import Histories

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.inputs.histories import Columns
    from persona.inputs.splits import Split
    from persona.store.store import Store


class TextUse(Protocol):
    """What is done with the texts of a bucket."""

    def __call__(self, requests: "pa.Table", texts: "pa.Table", store: "Store", bucket: int, /) -> "pa.Table":
        """The requests with more columns; `texts` has user_id, behavior_id, text and text_hash."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Which texts to read, of all users or of some, and what to do with them."""

    histories: Histories
    use: TextUse
    users: frozenset[str] | None = None

    def union_with(self, requests: "Dataset", n_buckets: int) -> "Dataset":
        """Requests and texts as rows of one dataset; a row without `request_id` is a text."""
        texts = reading.read(
            self.histories.splits,
            _read,
            limit=None,
            columns=self.histories.columns,
            users=self.users,
            n_buckets=n_buckets,
        )
        return requests.map_batches(_with_all_columns, batch_size=None, batch_format="pyarrow").union(texts)

    def joined(self, rows: "pa.Table", store: "Store") -> "pa.Table":
        """The requests among the rows of one bucket, with the columns that `use` adds."""
        import pyarrow as pa

        from persona.inputs.requests import REJECTED, SCHEMA

        is_request = rows["request_id"].is_valid()
        requests = rows.filter(is_request).select([*SCHEMA.names, REJECTED.name])
        texts = rows.filter(pa.compute.invert(is_request)).select(["user_id", "behavior_id", "text", "text_hash"])
        return self.use(requests, texts, store, rows["bucket"][0].as_py()) if requests.num_rows else requests


def _read(split: "Split", *, columns: "Columns", users: frozenset[str] | None, n_buckets: int) -> Iterator["pa.Table"]:
    """The texts of a split, as rows of the dataset with requests."""
    import pyarrow as pa

    for behaviors in reading.read_histories(split, columns=columns, n_buckets=n_buckets):
        chosen = behaviors
        if users is not None:
            chosen = behaviors.filter(pa.compute.is_in(behaviors["user_id"], pa.array(sorted(users), pa.string())))
        yield _with_all_columns(chosen)


def _with_all_columns(rows: "pa.Table") -> "pa.Table":
    """The rows with the columns of both requests and texts; missing ones are null."""
    import pyarrow as pa

    from persona.inputs import histories, requests

    text_columns = ("behavior_id", "text", "text_hash")
    schema = pa.schema([*requests.SCHEMA, requests.REJECTED, *(histories.SCHEMA.field(name) for name in text_columns)])
    columns = [
        rows[field.name].cast(field.type) if field.name in rows.column_names else pa.nulls(rows.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
