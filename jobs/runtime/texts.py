"""Bring the users' texts to their requests: the store has only vectors and hashes, so the histories are read again.

Rows of the histories go to the task that joins the requests of their bucket.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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

    def source(self, n_buckets: int) -> Source:
        """The texts as a source of the exchange of requests (`union_schema`); a row without `request_id` is a text."""
        read = _Texts(columns=self.histories.columns, users=self.users, n_buckets=n_buckets)
        return Source(splits=self.histories.splits, read=WithAllColumns(read))

    def joined(self, rows: "pa.Table", store: "Store") -> "pa.Table":
        """The requests among the rows of some users of one bucket, with the columns that `use` adds."""
        import pyarrow as pa

        is_request = rows["request_id"].is_valid()
        requests = rows.filter(is_request).select(request_columns())
        texts = rows.filter(pa.compute.invert(is_request)).select(["user_id", "behavior_id", "text", "text_hash"])
        return self.use(requests, texts, store, rows["bucket"][0].as_py()) if requests.num_rows else requests


def union_schema() -> "pa.Schema":
    """The columns of requests, of what is known of them, and of texts."""
    import pyarrow as pa

    from persona.inputs import histories, requests

    text_columns = [histories.SCHEMA.field(name) for name in ("behavior_id", "text", "text_hash")]
    return pa.schema([*requests.SCHEMA, requests.REJECTED, *requests.REFERENCE, *text_columns])


def request_columns() -> list[str]:
    """The columns of `union_schema` that requests have."""
    from persona.inputs.requests import REFERENCE, REJECTED, SCHEMA

    return [*SCHEMA.names, REJECTED.name, *REFERENCE.names]


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
class WithAllColumns:
    """Reads rows and gives them the columns of `union_schema`; missing ones are null."""

    read: Reader

    def __call__(self, split: "Split", found: SplitFound, limit: int | None) -> Iterator["pa.Table"]:
        """The rows of a split, as `read` finds them."""
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
