"""Join requests with the histories that they may see, bucket by bucket."""

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from jobs.runtime import exchange, reading
from jobs.runtime.exchange import Source
from jobs.runtime.inputs import Requests
from jobs.runtime.reading import Found
from jobs.runtime.reference import Reference
from jobs.runtime.tally import Counts, Tally
from jobs.runtime.texts import Texts, WithAllColumns, request_columns, union_schema
from jobs.runtime.user_profiles import AddProfiles
from persona.errors import InputError
from persona.options import PersonaKind
from persona.strengths import names_at, parse

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.store import join as histories
    from persona.store.store import Store

_JOINED_ROWS = 512  # requests per table that goes on, and whose users' vectors are in memory together


class Selection(Protocol):
    """Selects the requests to go on with, before their vectors are read, and may add columns."""

    @property
    def adds(self) -> Sequence[str]:
        """Names of the columns that a call adds."""

    def __call__(self, joined: "pa.Table", store: "Store", bucket: int, counts: dict[str, float], /) -> "pa.Table":
        """Some of the `joined` requests of a bucket, all of one kind of persona; may add to `counts`."""


@dataclass(frozen=True, kw_only=True)
class JoinPlan:
    """What to read, and how to join it."""

    job: str
    """Name of the job, for its rejects."""
    personas: Sequence[PersonaKind]
    """Each request appears once per kind and strength."""
    strengths: Sequence[float] = (1.0,)
    """Strengths of the personas that have a history (`persona.strengths`)."""
    max_behaviors: int
    """A request sees at most this many behaviors, the latest ones."""
    needs_target: bool
    """Whether a request without a target is rejected."""
    blank_targets: bool = False
    """Whether a blank target is a target: LaMP's own evaluation scores it."""
    rejected: str | None = None
    """Column with a text that was not the right answer; it becomes `requests.REJECTED`."""
    limit: int | None = None
    """Take only this many requests."""
    selection: Selection | None = None
    """Which requests to go on with; None for all."""
    with_vectors: bool = True
    """Whether the requests get the column `history`."""
    texts: Texts | None = None
    """Texts of the histories, to be used where requests are joined."""
    reference: Reference | None = None
    """Losses of targets and rejected texts under the LLM alone, which become `requests.REFERENCE`."""
    front: AddProfiles | None = None
    """Texts in front of the requests that need no histories; they become the column `retrieved`."""
    stage: str = "join"
    """Under which name the tally counts."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Requests with their histories, which are joined when they are consumed, and what was found in the input."""

    rows: "Dataset"
    found: Found


def requests_with_histories(requests: Requests, store: "Store", tally: Tally, plan: JoinPlan, *, folder: str) -> Joined:
    """The requests with the columns of `persona.store.join.join_histories`, and `persona` (see `persona.strengths`).

    `store` must be a snapshot of the tables that are read, so that a retried task joins the same rows. The run files in
    `folder` (`exchange.run_files`) must exist until the rows have been consumed.
    """
    read = reading.Requests(
        columns=requests.columns,
        needs_as_of=requests.needs_as_of,
        needs_target=plan.needs_target,
        blank_targets=plan.blank_targets,
        rejected=plan.rejected,
        job=plan.job,
        store=store,
        tally=tally,
    )
    return join(Source(splits=requests.splits, read=read, limit=plan.limit), store, tally, plan, folder=folder)


def join(requests: Source, store: "Store", tally: Tally, plan: JoinPlan, *, folder: str) -> Joined:
    """`requests_with_histories` for requests of any source."""
    import pyarrow as pa

    from persona.inputs.requests import REJECTED, SCHEMA

    others = [one.source(store.n_buckets) for one in (plan.texts, plan.reference) if one is not None]
    if others:
        sources, schema = [replace(requests, read=WithAllColumns(requests.read)), *others], union_schema()
    else:
        sources, schema = [requests], SCHEMA if plan.rejected is None else pa.schema([*SCHEMA, REJECTED])
    exchanged = exchange.exchange(sources, store.n_buckets, schema, key=None, folder=folder)
    rows = exchange.by_window(exchanged, join_bucket, store=store, tally=tally, plan=plan)
    return Joined(rows=rows, found=exchanged.found[0])


def join_bucket(requests: "pa.Table", *, store: "Store", tally: Tally, plan: JoinPlan) -> "Iterator[pa.Table]":
    """All requests of some users of a bucket with their histories, a few hundred at a time.

    Of a repeated id, the first counts. Raises InputError for an id of several users.
    """
    since = time.perf_counter()
    bucket: int = requests["bucket"][0].as_py()
    first_user = requests["user_id"][0].as_py()
    if plan.reference is not None:
        requests = plan.reference.joined(requests)
    if plan.texts is not None:
        requests = plan.texts.joined(requests, store)
    elif plan.reference is not None:
        requests = requests.select(request_columns())
    if plan.front is not None and requests.num_rows:
        requests = plan.front(requests, store, bucket)
    n_rows, requests = requests.num_rows, _first_of_each_id(requests)
    counts: dict[str, float] = {"asked": requests.num_rows, "repeated": n_rows - requests.num_rows}
    counts |= {"kept": 0, "untimed": 0, "empty": 0, "seconds": 0.0}
    if requests.num_rows:
        by_user = requests.sort_by([("user_id", "ascending"), ("request_id", "ascending")])
        for joined in _joined(by_user, store, bucket, plan, counts):
            counts["kept"] += joined.num_rows
            counts["seconds"] += time.perf_counter() - since
            yield joined
            since = time.perf_counter()
    tally.note(plan.stage, f"{bucket}/{first_user}", counts)


@dataclass(frozen=True)
class _Chosen:
    """Requests of one kind of persona to go on with, sorted by user, and for each its source and its user."""

    rows: "pa.Table"
    sources: "Sequence[histories.Source | None]"
    users: Sequence[str]

    def of_users(self, first: str, last: str) -> "_Chosen":
        """Those of the users from `first` to `last`."""
        return self.slice(bisect_left(self.users, first), bisect_right(self.users, last))

    def slice(self, start: int, end: int) -> "_Chosen":
        """Rows `start` to `end`."""
        return _Chosen(self.rows.slice(start, end - start), self.sources[start:end], self.users[start:end])


def _joined(
    requests: "pa.Table", store: "Store", bucket: int, plan: JoinPlan, counts: dict[str, float]
) -> "Iterator[pa.Table]":
    """Reads the keys of the histories once, for all personas, if something depends on them.

    Vectors are read of a few hundred requests at a time that go on: those of each user once, for all personas.
    """
    import pyarrow as pa

    from persona.store.join import Histories, sources, with_histories

    max_behaviors = plan.max_behaviors
    names = names_at(plan.personas, plan.strengths)
    of_kind = {kind: sources(requests, store, bucket, kind) for kind in plan.personas}
    seen = {name: of_kind[parse(name)[0]] for name in names}
    # Personas that see the own history all see the same one, so only the first of them is counted.
    counted = next((name for name in names if parse(name)[0].sees_own_history), None)
    keys = None
    if plan.selection is not None or not plan.with_vectors:
        keys = Histories.read(store, chain(*of_kind.values()), with_vectors=False)
    chosen: list[_Chosen] = []
    for persona, found in seen.items():
        rows = requests.append_column("persona", pa.repeat(persona, requests.num_rows))
        if keys is not None:
            joined = with_histories(rows, found, keys, max_behaviors=max_behaviors)
            if persona == counted:
                _count(joined, counts)
            if plan.selection is not None:
                joined = plan.selection(joined, store, bucket, counts)
            if not plan.with_vectors:
                yield joined
                continue
            rows = joined.select([*rows.column_names, *(plan.selection.adds if plan.selection else [])])
        of_request = dict(zip(requests["request_id"].to_pylist(), found, strict=True))
        of_rows = [of_request[request] for request in rows["request_id"].to_pylist()]
        chosen.append(_Chosen(rows, of_rows, rows["user_id"].to_pylist()))
    if not chosen:
        return
    for first, last in _groups(requests["user_id"].to_pylist()):
        parts = [one.of_users(first, last) for one in chosen]
        histories = Histories.read(store, chain(*(part.sources for part in parts)), with_vectors=True)
        for part, persona in zip(parts, seen, strict=True):
            # An empty table has the columns that later steps expect.
            for start in range(0, max(part.rows.num_rows, 1), _JOINED_ROWS):
                some = part.slice(start, start + _JOINED_ROWS)
                joined = with_histories(some.rows, some.sources, histories, max_behaviors=max_behaviors)
                if keys is None and persona == counted:
                    _count(joined, counts)
                yield joined


def _count(joined: "pa.Table", counts: dict[str, float]) -> None:
    counts["untimed"] += sum(joined["n_untimed"].to_pylist())
    counts["empty"] += joined["n_behaviors"].to_pylist().count(0)


def _groups(users: list[str]) -> "Iterator[tuple[str, str]]":
    """The first and the last user of groups with about `_JOINED_ROWS` rows, given the sorted users of all rows."""
    start = 0
    while start < len(users):
        last = users[min(start + _JOINED_ROWS, len(users)) - 1]
        yield users[start], last
        start = bisect_right(users, last)


def _first_of_each_id(requests: "pa.Table") -> "pa.Table":
    import numpy as np
    import pyarrow as pa

    request_ids, users = (requests[name].to_numpy() for name in ("request_id", "user_id"))
    _, first, number = np.unique(request_ids, return_index=True, return_inverse=True)
    if len(others := request_ids[users[first][number] != users]):
        raise id_of_several_users(others[0])
    return requests.take(pa.array(np.sort(first)))


def id_of_several_users(request_id: str) -> InputError:
    """The error for a request id that two users have."""
    return InputError(
        f"the request_id {request_id!r} is that of requests of several users, and perhaps other ids are, too; an id "
        "identifies an answer, so no two users may share one: for example, put the user's id in front of it"
    )


def repeated_rows(counts: Counts) -> list[tuple[str, str]]:
    """The row of a summary about requests that were left out because an earlier one has the same id; often none."""
    n_repeated = int(counts.get("join", {}).get("repeated", 0))
    return [("repeated ids", f"{n_repeated:,} requests left out; of each id, the first counts")] if n_repeated else []
