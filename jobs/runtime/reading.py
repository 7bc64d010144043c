"""Read input splits as Ray datasets of valid rows; invalid rows go to the `rejects` table and are counted."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from jobs.runtime.inputs import Requests
from jobs.runtime.tally import Counts, Tally

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.inputs import histories, requests
    from persona.inputs.records import Records
    from persona.inputs.splits import Split
    from persona.store.store import Store

TOO_MANY_REJECTS = 3
"""The exit code of a job that is done, but rejected more rows than `--max-reject-fraction` allows."""
_REASONS_SHOWN = 5
_REASON = "rejected: "  # prefix of the counters by reason


def read(
    splits: Sequence["Split"],
    reader: "Callable[..., Iterator[pa.Table]]",
    *,
    limit: int | None,
    **settings: object,
) -> "Dataset":
    """The first `limit` rows, or all rows, of the tables that `reader(split, **settings)` yields, a task per split."""
    from dataclasses import asdict

    import ray

    sources = ray.data.from_items([asdict(split) for split in splits], override_num_blocks=len(splits))
    if limit is not None:
        # All jobs must take the same rows when given the same limit.
        sources.context.execution_options.preserve_order = True
    rows = sources.map_batches(
        _read_batch,  # type: ignore[arg-type]  # Ray's types do not cover fn_kwargs
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"reader": reader, "settings": settings},
    )
    return rows if limit is None else rows.limit(limit)


def _read_batch(
    batch: "pa.Table", *, reader: "Callable[..., Iterator[pa.Table]]", settings: Mapping[str, object]
) -> "Iterator[pa.Table]":
    from persona.inputs.splits import Split

    for fields in batch.to_pylist():
        yield from reader(Split(**fields), **settings)


def read_requests(
    split: "Split",
    *,
    columns: "requests.Columns",
    needs_as_of: bool,
    store: "Store",
    tally: Tally,
    job: str,
    needs_target: bool,
    blank_targets: bool,
    rejected: str | None,
) -> "Iterator[pa.Table]":
    """The valid requests of a split; the others go to the `rejects` table."""
    from persona.inputs import requests
    from persona.inputs.reader import read_split

    validate = partial(
        requests.validate,
        n_buckets=store.n_buckets,
        needs_target=needs_target,
        blank_targets=blank_targets,
        columns=columns,
        needs_as_of=needs_as_of,
        job=job,
        rejected=rejected,
    )
    problem = partial(requests.problem, columns=columns, needs_target=needs_target, rejected=rejected)
    records = read_split(split, job=job, max_row_mb=columns.max_row_mb, problem=problem)
    yield from keep_good(records, validate, time_column="as_of", split=split, store=store, tally=tally)


def read_histories(split: "Split", *, columns: "histories.Columns", n_buckets: int) -> "Iterator[pa.Table]":
    """The valid behaviors of a split. The others are dropped without a trace: `embed` is the job that reports them."""
    from persona.inputs import histories
    from persona.inputs.reader import read_split

    problem = partial(histories.problem, columns=columns)
    for records in read_split(split, job="texts", max_row_mb=columns.max_row_mb, problem=problem):
        yield histories.validate(records, columns, n_buckets)[0]


def keep_good(
    batches: "Iterator[Records]",
    validate: "Callable[[Records], tuple[pa.Table, pa.Table]]",
    *,
    time_column: str,
    split: "Split",
    store: "Store",
    tally: Tally,
) -> "Iterator[pa.Table]":
    """The valid rows of a split, as they are read; its rejects are committed together at the end.

    `validate` returns the valid rows and the rejects of a batch. Nulls in `time_column` are counted. Each row of a file
    that is rejected as a whole counts as a reject. A split with rejects and no valid row counts as unreadable.
    """
    rejects: list[pa.Table] = []
    n_good = n_timeless = n_unreadable = n_lost = 0
    good = None
    seconds, since = 0.0, time.perf_counter()
    for records in batches:
        good, bad = validate(records)
        n_good += good.num_rows
        n_timeless += good[time_column].null_count
        n_unreadable += records.rejects.num_rows
        n_lost += records.n_lost
        if bad.num_rows:
            rejects.append(bad)
        if good.num_rows:
            seconds += time.perf_counter() - since
            yield good
            since = time.perf_counter()
    if good is not None and not n_good:
        yield good  # no rows, but the columns that later steps expect
    if rejects and not n_good:
        n_unreadable = max(n_unreadable, 1)
    counts: dict[str, float] = {"rows": n_good, "timeless": n_timeless, "unreadable": n_unreadable, "rejects": 0}
    counts |= _write_rejects(store, rejects)
    counts["rejects"] += n_lost
    counts["seconds"] = seconds + time.perf_counter() - since
    tally.note("read", f"{split.uri}:{split.start}", counts)


def _write_rejects(store: "Store", rejects: "Sequence[pa.Table]") -> dict[str, float]:
    """Commit the rejects; their number in total and by reason."""
    import pyarrow as pa

    if not rejects:
        return {}
    table = pa.concat_tables(rejects)
    store.write_rejects(table)
    by_reason = Counter(table["reason"].to_pylist())
    return {"rejects": table.num_rows, **{f"{_REASON}{reason}": n for reason, n in by_reason.items()}}


def reject_rows(counts: Counts) -> list[tuple[str, str]]:
    """Rows of a summary: the number of rejects, and the most frequent reasons."""
    found = counts.get("read", {})
    reasons = {name.removeprefix(_REASON): n for name, n in found.items() if name.startswith(_REASON)}
    most_frequent = sorted(reasons.items(), key=lambda item: -item[1])[:_REASONS_SHOWN]
    return [
        ("rejects", f"{int(found.get('rejects', 0)):,}"),
        *((f"  {int(n):,}", reason) for reason, n in most_frequent),
    ]


def timeless(counts: Counts) -> int:
    """The number of requests without `as_of`, or of behaviors without `timestamp`."""
    return int(counts.get("read", {}).get("timeless", 0))


def request_rows(requests: Requests, counts: Counts) -> list[tuple[str, str]]:
    """Rows of a summary about the input of requests: what they lack, and the rejects."""
    n_timeless = timeless(counts)
    see_all = f"{n_timeless:,} requests see the whole history"
    null = [("null as_of", see_all)] if n_timeless and requests.needs_as_of else []
    return [*null, *requests.rows(), *reject_rows(counts)]


def exit_code(counts: Counts, max_reject_fraction: float) -> int:
    """0, or `TOO_MANY_REJECTS`."""
    found = counts.get("read", {})
    fraction = reject_fraction(rejects=found.get("rejects", 0), rows=found.get("rows", 0))
    return exit_code_of(fraction, max_reject_fraction)


def reject_fraction(*, rejects: float, rows: float) -> float:
    """The share of the input that was rejected; `rows` are the valid ones."""
    return rejects / max(1, rejects + rows)


def exit_code_of(fraction: float, max_reject_fraction: float) -> int:
    """0, or `TOO_MANY_REJECTS`."""
    return TOO_MANY_REJECTS if fraction > max_reject_fraction else 0
