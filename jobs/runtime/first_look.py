"""A look at the first requests of an input, for a dry run: which of them see behaviors of their user."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from jobs.runtime.inputs import Requests
from persona.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.store.store import Store

_REQUESTS = 200
_BUCKETS = 8  # of the store that are read at most


@dataclass(frozen=True, kw_only=True)
class FirstLook:
    """What was found."""

    n_requests: int
    n_with_history: int
    mean_behaviors: float

    def rows(self) -> list[tuple[str, str]]:
        """The row of a dry run."""
        seen = f"{self.n_with_history:,} see behaviors of their user, {self.mean_behaviors:,.1f} on average"
        return [(f"first {self.n_requests:,} requests", seen)] if self.n_requests else []

    def facts(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "looked_at": self.n_requests,
            "with_history": self.n_with_history,
            "mean_behaviors": round(self.mean_behaviors, 2),
        }


def look(requests: Requests, store: "Store", *, max_behaviors: int, must_see: bool) -> FirstLook:
    """Read the first requests with a target, and their users' behaviors.

    Raises UsageError if none sees a behavior and `must_see`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from persona.store.join import seen_rows

    tables = list(_first(requests, store.n_buckets))
    if not any(table.num_rows for table in tables):
        return FirstLook(n_requests=0, n_with_history=0, mean_behaviors=0.0)
    first = pa.concat_tables(tables).slice(0, _REQUESTS)
    n_seen = [
        rows.num_rows
        for bucket in islice(first["bucket"].unique().to_pylist(), _BUCKETS)
        for rows in seen_rows(
            first.filter(pc.equal(first["bucket"], bucket)), store, bucket, max_behaviors=max_behaviors
        )
    ]
    if must_see and not any(n_seen):
        raise UsageError(
            f"--requests: none of the first {len(n_seen):,} requests sees a behavior in {store.label}: the store has "
            "none of their users, or nothing older than as_of; embed their histories first, or correct user_id or as_of"
        )
    n_with_history = sum(n > 0 for n in n_seen)
    return FirstLook(n_requests=len(n_seen), n_with_history=n_with_history, mean_behaviors=sum(n_seen) / len(n_seen))


def _first(requests: Requests, n_buckets: int) -> "Iterator[pa.Table]":
    """Valid requests, until there are enough."""
    from persona.inputs import requests as rules
    from persona.inputs.reader import read_split

    columns, n_read = requests.columns, 0
    problem = partial(rules.problem, columns=columns, needs_target=True)
    for split in requests.splits:
        for records in read_split(split, job="dry run", max_row_mb=columns.max_row_mb, problem=problem):
            good, _ = rules.validate(records, n_buckets, True, columns=columns, needs_as_of=requests.needs_as_of)
            yield good
            n_read += good.num_rows
            if n_read >= _REQUESTS:
                return
