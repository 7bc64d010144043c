"""Bring the users' texts to their requests: the store has only vectors and hashes, so the histories are read again.

Rows of the histories go to the task that joins the requests of their bucket.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from jobs.runtime.exchange import Reader, Source
from jobs.runtime.inputs import Histories
from jobs.runtime.reading import Behaviors, SplitFound

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.histories import Columns
    from persona.inputs.splits import Split
    from persona.store.store import Store


class TextUse(Protocol):
    """What is done with the texts of some users."""

    def __call__(self, requests: "pa.Table", texts: "pa.Table", store: "Store", bucket: int, /) -> "pa.Table":
        """The requests with more columns; `texts` has user_id, behavior_id, text and text_hash."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Which texts to read, of all users or of some, and what to do with them."""

    histories: Histories
    use: TextUse
    users: frozenset[str] | None = None

    def sources(self, requests: Source, n_buckets: int) -> list[Source]:
        """Requests and texts as sources of one exchange (`union_schema`); a row without `request_id` is a text."""
        read = _Texts(columns=self.histories.columns, users=self.users, n_buckets=n_buckets)
        return [
            replace(requests, read=_WithAllColumns(requests.read)),
            Source(splits=self.histories.splits, read=_WithAllColumns(read)),
        ]

    def joined(self, rows: "pa.Table", store: "Store") -> "pa.Table":
        """The requests among the rows of some users of one bucket, with the columns that `use` adds."""
        import pyarrow as pa

        from persona.inputs.requests import REJECTED, SCHEMA

        is_request = rows["request_id"].is_valid()
        requests = rows.filter(is_request).select([*SCHEMA.names, REJECTED.name])
        texts = rows.filter(pa.compute.invert(is_request)).select(["user_id", "behavior_id", "text", "text_hash"])
        return self.use(requests, texts, store, rows["bucket"][0].as_py()) if requests.num_rows else requests


def union_schema() -> "pa.Schema":
    """The columns of both requests and texts."""
    import pyarrow as pa

    from persona.inputs import histories, requests

    text_columns = ("behavior_id", "text", "text_hash")
    return pa.schema([*requests.SCHEMA, requests.REJECTED, *(histories.SCHEMA.field(name) for name in text_columns)])


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """Reads the texts of some users, or of all."""

    columns: "Columns"
    users: frozenset[str] | None
    n_buckets: int

    def __call__(self, split: "Split", found: SplitFound, limit: int | None) -> Iterator["pa.Table"]:
        import pyarrow as pa

        for behaviors in Behaviors(columns=self.columns, n_buckets=self.n_buckets, job="texts")(split, found, limit):
            if self.users is None:
                yield behaviors
            else:
                is_chosen = pa.compute.is_in(behaviors["user_id"], pa.array(sorted(self.users), pa.string()))
                yield behaviors.filter(is_chosen)


@dataclass(frozen=True)
class _WithAllColumns:
    """Reads rows and gives them the columns of both requests and texts; missing ones are null."""

    read: Reader

    def __call__(self, split: "Split", found: SplitFound, limit: int | None) -> Iterator["pa.Table"]:
        import pyarrow as pa

        all_columns = union_schema()
        for rows in self.read(split, found, limit):
            columns = [
                rows[field.name].cast(field.type)
                if field.name in rows.column_names
                else pa.nulls(rows.num_rows, field.type)
                for field in all_columns
            ]
            yield pa.table(columns, schema=all_columns)
