"""A look at the first rows of an input, for a dry run: how many rows there are, and what they find in the store."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from jobs.runtime.inputs import Histories, Requests
from persona.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.splits import Split
    from persona.store.store import Store

_ROWS = 200
_BUCKETS = 8  # of the store that are read at most
_COUNTED_BYTES = 2**26  # of the input, after which the number of rows is estimated


@dataclass(frozen=True, kw_only=True)
class Amount:
    """The valid rows of an input: counted, or estimated from the first part of a large one.

    `mean_tokens` is the approximate length of a row's text.
    """

    n: int
    mean_tokens: float
    is_exact: bool

    def at_most(self, limit: int | None) -> "Amount":
        """The first `limit` of these rows, or all."""
        return self if limit is None or limit > self.n else replace(self, n=limit, is_exact=True)

    def __str__(self) -> str:
        """Two digits of an estimate."""
        return f"{self.n:,}" if self.is_exact else f"about {float(f'{self.n:.2g}'):,.0f}"


@dataclass(frozen=True, kw_only=True)
class Behaviors:
    """The behaviors of an input, and how many of the first ones the store lacks or has with another text or time."""

    all: Amount
    n_compared: int = 0
    n_missing: int = 0

    def rows(self) -> list[tuple[str, str]]:
        """The row of a dry run."""
        lacks = f"; the store lacks {self.n_missing:,} of the first {self.n_compared:,}" if self.n_compared else ""
        return [("behaviors", f"{self.all}{lacks}")]

    def facts(self) -> dict[str, Any]:
        """The same for programs."""
        return {"behaviors": self.all.n, "compared": self.n_compared, "missing": self.n_missing}


@dataclass(frozen=True, kw_only=True)
class FirstLook:
    """What the first requests see."""

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
    import pyarrow.compute as pc

    from persona.store.join import seen_rows

    first = _first(requests.splits, partial(_requests_in, requests, store.n_buckets, needs_target=True))
    if first is None:
        return FirstLook(n_requests=0, n_with_history=0, mean_behaviors=0.0)
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


def look_at_behaviors(histories: Histories, store: "Store | None", *, limit: int | None) -> Behaviors:
    """Count the behaviors, up to `limit`, and compare the first ones with the store, if there is one."""
    import pyarrow.compute as pc

    found = _amount(histories.splits, partial(_behaviors_in, histories, 1), "text").at_most(limit)
    first = None
    if store is not None:
        first = _first(histories.splits, partial(_behaviors_in, histories, store.n_buckets))
    if store is None or first is None:
        return Behaviors(all=found)
    first = first.slice(0, limit)
    n_compared = n_missing = 0
    for bucket in islice(first["bucket"].unique().to_pylist(), _BUCKETS):
        rows = first.filter(pc.equal(first["bucket"], bucket))
        _, counts = store.missing(bucket, rows)
        n_compared, n_missing = n_compared + rows.num_rows, n_missing + counts["new"] + counts["edited"]
    return Behaviors(all=found, n_compared=n_compared, n_missing=n_missing)


def n_requests(requests: Requests, *, needs_target: bool) -> Amount:
    """The valid requests of an input."""
    return _amount(requests.splits, partial(_requests_in, requests, 1, needs_target=needs_target), "input")


def _amount(splits: "Sequence[Split]", rows_in: "Callable[[Split], Iterator[pa.Table]]", text: str) -> Amount:
    import pyarrow.compute as pc

    from persona.cost import tokens_of_text

    n_all = sum(split.end - split.start for split in splits)
    n_read = n_rows = n_text = 0
    for split in splits:
        for rows in rows_in(split):
            n_rows += rows.num_rows
            n_text += pc.sum(pc.binary_length(rows[text])).as_py() or 0
        n_read += split.end - split.start
        if n_read >= _COUNTED_BYTES:
            break
    n = round(n_rows * n_all / n_read) if n_read else 0
    return Amount(n=n, mean_tokens=tokens_of_text(n_text) / max(n_rows, 1), is_exact=n_read == n_all)


def _first(splits: "Sequence[Split]", rows_in: "Callable[[Split], Iterator[pa.Table]]") -> "pa.Table | None":
    """The first valid rows of an input; None if there are none."""
    import pyarrow as pa

    tables: list[pa.Table] = []
    for rows in (rows for split in splits for rows in rows_in(split)):
        tables.append(rows)
        if sum(table.num_rows for table in tables) >= _ROWS:
            break
    first = pa.concat_tables(tables).slice(0, _ROWS) if tables else None
    return first if first is not None and first.num_rows else None


def _requests_in(requests: Requests, n_buckets: int, split: "Split", *, needs_target: bool) -> "Iterator[pa.Table]":
    """The valid requests of a split."""
    from persona.inputs import requests as rules
    from persona.inputs.reader import read_split

    columns = requests.columns
    problem = partial(rules.problem, columns=columns, needs_target=needs_target)
    for records in read_split(split, job="dry run", max_row_mb=columns.max_row_mb, problem=problem):
        yield rules.validate(records, n_buckets, needs_target, columns=columns, needs_as_of=requests.needs_as_of)[0]


def _behaviors_in(histories: Histories, n_buckets: int, split: "Split") -> "Iterator[pa.Table]":
    """The valid behaviors of a split."""
    from persona.inputs import histories as rules
    from persona.inputs.reader import read_split

    columns = histories.columns
    problem = partial(rules.problem, columns=columns)
    for records in read_split(split, job="dry run", max_row_mb=columns.max_row_mb, problem=problem):
        yield rules.validate(records, columns, n_buckets)[0]
