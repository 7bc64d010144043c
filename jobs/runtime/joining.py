"""Requests meet the histories that they may see, bucket by bucket."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobs.runtime.exchange import by_bucket
from jobs.runtime.reading import read, read_requests
from jobs.runtime.tally import note
from persona.options import PersonaKind

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from jobs.runtime.texts import Texts
    from persona.inputs.splits import Split
    from persona.store.store import Store

_JOINED_ROWS = 512


def requests_with_histories(
    splits: Sequence["Split"],
    store: "Store",
    tally: Any,
    *,
    job: str,
    personas: Sequence[PersonaKind],
    max_behaviors: int,
    needs_target: bool,
    stage: str = "join",
    limit: int | None = None,
    keep: Any = None,
    texts: "Texts | None" = None,
    rejected: str | None = None,
) -> "Dataset":
    """Each request once for each of `personas`, with the history that it may see (`persona.store.join`).

    `store` is a snapshot of the tables that are read; `keep(joined, store, bucket, counts)` may take rows out before
    their vectors are read, and adds the columns that `keep.adds` names; `stage` is where the tally counts; `texts`
    brings the texts of histories to the requests; `rejected` is the column of a text that was not the right answer
    (`requests.REJECTED`).
    """
    reading = {"store": store, "tally": tally, "job": job, "needs_target": needs_target, "rejected": rejected}
    rows = read(splits, read_requests, limit=limit, **reading)
    joining = {"personas": personas, "max_behaviors": max_behaviors}
    joining |= {"store": store, "tally": tally, "stage": stage, "keep": keep, "texts": texts}
    if texts is not None:
        rows, splits = texts.beside(rows, store.n_buckets), [*splits, *texts.splits]
    return by_bucket(rows, splits, store.n_buckets, join_bucket, **joining)


def join_bucket(
    requests: "pa.Table",
    *,
    store: "Store",
    tally: Any,
    stage: str,
    personas: Sequence[PersonaKind],
    max_behaviors: int,
    keep: Any,
    texts: "Texts | None" = None,
) -> Iterator["pa.Table"]:
    """The requests of one bucket with their histories, a few hundred at a time; of a repeated id the first counts."""
    import numpy as np
    import pyarrow as pa

    from persona.store.join import join_histories

    since = time.perf_counter()
    bucket = requests["bucket"][0].as_py()
    if texts is not None:
        requests = texts.joined(requests, store)
    _, first = np.unique(requests["request_id"].to_numpy(), return_index=True)
    counts: dict[str, float] = {"asked": len(first), "repeated": requests.num_rows - len(first)}
    counts |= {"kept": 0, "untimed": 0, "empty": 0, "seconds": 0.0}
    requests = requests.take(pa.array(np.sort(first)))
    sees_own = next((persona for persona in personas if persona.sees_own_history), None)
    for persona in personas:
        for start in range(0, requests.num_rows, _JOINED_ROWS):
            part = requests.slice(start, _JOINED_ROWS)
            part = part.append_column("persona", pa.repeat(persona.value, part.num_rows))
            how: dict[str, Any] = {"persona": persona, "max_behaviors": max_behaviors}
            joined = join_histories(part, store, bucket, with_vectors=keep is None, **how)
            if persona == sees_own:
                counts["untimed"] += sum(joined["n_untimed"].to_pylist())
                counts["empty"] += joined["n_behaviors"].to_pylist().count(0)
            if keep is not None:
                kept = keep(joined, store, bucket, counts).select([*part.column_names, *keep.adds])
                joined = join_histories(kept, store, bucket, **how)
            counts["kept"] += joined.num_rows
            counts["seconds"] += time.perf_counter() - since
            yield joined
            since = time.perf_counter()
    note(tally, stage, str(bucket), counts)
