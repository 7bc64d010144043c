"""Find which behaviors of the input are missing from the store: read them, bring them together by key, and compare."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.runtime import exchange
from jobs.runtime.inputs import Histories
from jobs.runtime.reading import Behaviors
from jobs.runtime.receipts import receipt, with_no_receipt
from jobs.runtime.tally import Tally

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.exchange.windows import Window
    from persona.store.store import Store


def read(histories: Histories, store: "Store", tally: Tally, *, limit: int | None, folder: str) -> exchange.Exchanged:
    """The valid behaviors, brought together by key in the run files of `folder`; the others go to the rejects table."""
    from persona.inputs.histories import SCHEMA, latest

    read = Behaviors(columns=histories.columns, n_buckets=store.n_buckets, job="embed", tally=tally, store=store)
    source = exchange.Source(splits=histories.splits, read=read, limit=limit)
    return exchange.exchange([source], store.n_buckets, SCHEMA, key="behavior_id", folder=folder, fold=latest)


def missing(
    behaviors: exchange.Exchanged, store: "Store", tally: Tally, *, deletes: bool, keeps_later: bool
) -> "Dataset":
    """The behaviors that are new or edited in comparison with a snapshot of a store, and receipts of `Store.missing`.

    With `deletes`, also the stored behaviors that the input does not have: those in all ranges of places are looked up,
    whether the input has a row there or not. With `keeps_later`, a stored behavior that is later than the given one
    stays.
    """
    settings = {"deletes": deletes, "keeps_later": keeps_later}
    return exchange.by_partition(behaviors, compare, store=store, tally=tally, **settings)


def compare(
    windows: "Iterator[Window]", *, store: "Store", deletes: bool, keeps_later: bool, tally: Tally
) -> "Iterator[pa.Table]":
    """What `missing` finds in one partition; the receipt comes last."""
    import pyarrow as pa

    from persona.inputs.histories import SCHEMA

    found: Counter[str] = Counter()
    stored = frozenset(store.buckets()) if deletes else frozenset()
    for window in windows:
        if not window.rows.num_rows and window.bucket not in stored:
            continue
        started = time.perf_counter()
        absent = (window.low, window.high) if deletes else None
        rows, counts = store.missing(window.bucket, window.rows, absent=absent, keeps_later=keeps_later)
        tally.note("compare", str(window.low), {**counts, "seconds": time.perf_counter() - started})
        found.update(counts)
        if rows.num_rows:
            yield with_no_receipt(rows)
    yield receipt(found, SCHEMA.append(pa.field("change", pa.string())))
