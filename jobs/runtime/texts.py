"""The users' texts beside their requests: the store holds vectors and hashes, so texts come from the histories again.

Rows of the histories go to the task that has their bucket's requests, as `embed` sends them to be compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jobs.runtime import reading

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
    """Histories whose texts are needed, of all users or of some, and what to do with them."""

    splits: "Sequence[Split]"
    columns: "Columns"
    use: TextUse
    users: frozenset[str] | None = None

    def beside(self, requests: "Dataset", n_buckets: int) -> "Dataset":
        """Requests and texts as rows of one dataset; a row without `request_id` is a text."""
        options = {"columns": self.columns, "users": self.users, "n_buckets": n_buckets}
        texts = reading.read(self.splits, _read, limit=None, **options)
        return requests.map_batches(_widened, batch_size=None, batch_format="pyarrow").union(texts)

    def joined(self, rows: "pa.Table", store: "Store") -> "pa.Table":
        """The requests among the rows of one bucket, with what `use` adds."""
        import pyarrow as pa

        from persona.inputs.requests import REJECTED, SCHEMA

        is_request = rows["request_id"].is_valid()
        requests = rows.filter(is_request).select([*SCHEMA.names, REJECTED.name])
        texts = rows.filter(pa.compute.invert(is_request)).select(["user_id", "behavior_id", "text", "text_hash"])
        return self.use(requests, texts, store, rows["bucket"][0].as_py()) if requests.num_rows else requests


def plan(uri: str, columns: str, *, flag: str) -> "tuple[list[Split], Columns]":
    """The splits of histories and their columns' names, checked."""
    from persona import storage
    from persona.inputs import histories
    from persona.inputs.splits import plan_splits

    source = storage.check_uri(uri, flag=flag)
    storage.check_reachable(source, flag=flag)
    named = histories.Columns.parse(columns, "--columns")
    splits = plan_splits(source, flag=flag)
    histories.check_columns(splits, named)
    return splits, named


def _read(split: "Split", *, columns: "Columns", users: frozenset[str] | None, n_buckets: int) -> Iterator["pa.Table"]:
    """The texts of a split, as rows that may stand beside requests."""
    import pyarrow as pa

    for good in reading.read_histories(split, columns=columns, n_buckets=n_buckets):
        mine = good
        if users is not None:
            mine = good.filter(pa.compute.is_in(good["user_id"], pa.array(sorted(users), pa.string())))
        yield _widened(mine)


def _widened(rows: "pa.Table") -> "pa.Table":
    """The rows with the columns of requests and of texts, null where they have none."""
    import pyarrow as pa

    from persona.inputs import histories, requests

    wanted = ("behavior_id", "text", "text_hash")
    schema = pa.schema([*requests.SCHEMA, requests.REJECTED, *(histories.SCHEMA.field(name) for name in wanted)])
    columns = [
        rows[field.name].cast(field.type) if field.name in rows.column_names else pa.nulls(rows.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
