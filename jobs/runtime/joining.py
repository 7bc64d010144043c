"""Join requests with the histories that they may see, bucket by bucket."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from jobs.runtime import exchange, reading
from jobs.runtime.exchange import Source
from jobs.runtime.inputs import Requests
from jobs.runtime.reading import Found
from jobs.runtime.tally import Tally
from jobs.runtime.texts import Texts, union_schema
from persona.options import PersonaKind

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.store.store import Store

_JOINED_ROWS = 512  # requests per table that goes on


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
    """Each request appears once per kind."""
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
    texts: Texts | None = None
    """Texts of the histories, to be used where requests are joined."""
    stage: str = "join"
    """Under which name the tally counts."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Requests with their histories, which are joined when they are consumed, and what was found in the input."""

    rows: "Dataset"
    found: Found


def requests_with_histories(requests: Requests, store: "Store", tally: Tally, plan: JoinPlan, *, folder: str) -> Joined:
    """The requests with the columns of `persona.store.join.join_histories` and `persona`, the kind.

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

    if plan.texts is not None:
        sources, schema = plan.texts.sources(requests, store.n_buckets), union_schema()
    else:
        sources, schema = [requests], SCHEMA if plan.rejected is None else pa.schema([*SCHEMA, REJECTED])
    exchanged = exchange.exchange(sources, store.n_buckets, schema, key=None, folder=folder)
    rows = exchange.by_window(exchanged, join_bucket, store=store, tally=tally, plan=plan)
    return Joined(rows=rows, found=exchanged.found[0])


def join_bucket(requests: "pa.Table", *, store: "Store", tally: Tally, plan: JoinPlan) -> "Iterator[pa.Table]":
    """All requests of some users of a bucket with their histories, a few hundred at a time.

    Of a repeated id, the first counts.
    """
    import pyarrow as pa

    from persona.store.join import join_histories

    since = time.perf_counter()
    bucket: int = requests["bucket"][0].as_py()
    first_user = requests["user_id"][0].as_py()
    if plan.texts is not None:
        requests = plan.texts.joined(requests, store)
    n_rows, requests = requests.num_rows, _first_of_each_id(requests)
    counts: dict[str, float] = {"asked": requests.num_rows, "repeated": n_rows - requests.num_rows}
    counts |= {"kept": 0, "untimed": 0, "empty": 0, "seconds": 0.0}
    with_histories = partial(join_histories, store=store, bucket=bucket, max_behaviors=plan.max_behaviors)
    # Kinds that see the own history all see the same one, so only the first of them is counted.
    counted = next((persona for persona in plan.personas if persona.sees_own_history), None)
    for persona in plan.personas:
        for start in range(0, requests.num_rows, _JOINED_ROWS):
            part = requests.slice(start, _JOINED_ROWS)
            part = part.append_column("persona", pa.repeat(persona.value, part.num_rows))
            joined = with_histories(part, persona=persona, with_vectors=plan.selection is None)
            if persona == counted:
                counts["untimed"] += sum(joined["n_untimed"].to_pylist())
                counts["empty"] += joined["n_behaviors"].to_pylist().count(0)
            if plan.selection is not None:
                selected = plan.selection(joined, store, bucket, counts)
                selected = selected.select([*part.column_names, *plan.selection.adds])
                joined = with_histories(selected, persona=persona)
            counts["kept"] += joined.num_rows
            counts["seconds"] += time.perf_counter() - since
            yield joined
            since = time.perf_counter()
    tally.note(plan.stage, f"{bucket}/{first_user}", counts)


def _first_of_each_id(requests: "pa.Table") -> "pa.Table":
    import numpy as np
    import pyarrow as pa

    _, first = np.unique(requests["request_id"].to_numpy(), return_index=True)
    return requests.take(pa.array(np.sort(first)))
