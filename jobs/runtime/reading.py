"""Read the valid rows of input splits; invalid rows go to the `rejects` table and are counted."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from typing import TYPE_CHECKING, Self

from jobs.runtime import inputs
from jobs.runtime.tally import Tally

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs import histories, requests
    from persona.inputs.records import Records
    from persona.inputs.splits import Split
    from persona.store.store import Store

TOO_MANY_REJECTS = 3
"""The exit code of a job that is done, but rejected more rows than `--max-reject-fraction` allows."""
_REASONS_SHOWN, _REASONS_KEPT = 5, 1000


@dataclass(kw_only=True)
class SplitFound:
    """What was found in a split; its reader fills it."""

    uri: str
    rows: int = 0
    rejects: int = 0
    unreadable: int = 0
    timeless: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> dict[str, float]:
        """What the tally shows."""
        return {"rows": self.rows, "rejects": self.rejects, "unreadable": self.unreadable}


@dataclass(frozen=True, kw_only=True)
class FileFound:
    """What was found in an input file.

    Attributes:
        rows: valid rows.
        rejects: rows and lines that went to the rejects table; unreadable: those of them that were no rows at all.
        timeless: valid rows without a time.
    """

    rows: int = 0
    rejects: int = 0
    unreadable: int = 0
    timeless: int = 0

    def __add__(self, other: "FileFound | SplitFound") -> "FileFound":
        names = [one.name for one in fields(FileFound)]
        return FileFound(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found in an input; decisions and summaries rest on it. Attributes: by file URI; rejects by reason."""

    files: Mapping[str, FileFound]
    reasons: Mapping[str, int]

    @classmethod
    def of(cls, splits: "Iterable[SplitFound]") -> Self:
        """The sums over splits, by file."""
        files: dict[str, FileFound] = {}
        reasons: Counter[str] = Counter()
        for split in splits:
            files[split.uri] = files.get(split.uri, FileFound()) + split
            reasons.update(split.reasons)
        return cls(files=files, reasons=dict(reasons.most_common(_REASONS_KEPT)))

    def __add__(self, other: "Found") -> "Found":
        files = {uri: self.files.get(uri, FileFound()) + found for uri, found in other.files.items()}
        reasons = Counter(self.reasons) + Counter(other.reasons)
        return Found(files={**self.files, **files}, reasons=dict(reasons.most_common(_REASONS_KEPT)))

    @cached_property
    def total(self) -> FileFound:
        """The sums over all files."""
        return sum(self.files.values(), FileFound())

    def exit_code(self, max_reject_fraction: float) -> int:
        """0, or `TOO_MANY_REJECTS`."""
        fraction = reject_fraction(rejects=self.total.rejects, rows=self.total.rows)
        return exit_code_of(fraction, max_reject_fraction)

    def reject_rows(self) -> list[tuple[str, str]]:
        """Rows of a summary: the number of rejects, and the most frequent reasons."""
        most_frequent = list(self.reasons.items())[:_REASONS_SHOWN]
        return [
            ("rejects", f"{self.total.rejects:,}"),
            *((f"  {n:,}", reason) for reason, n in most_frequent),
        ]


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Reads the valid requests of splits; the others go to the `rejects` table."""

    columns: "requests.Columns"
    needs_as_of: bool
    needs_target: bool
    blank_targets: bool
    rejected: str | None
    job: str
    store: "Store"
    tally: Tally

    def __call__(self, split: "Split", found: SplitFound, limit: int | None) -> "Iterator[pa.Table]":
        """The first `limit` of them, or all."""
        from persona.inputs import requests
        from persona.inputs.reader import read_split

        validate = partial(
            requests.validate,
            n_buckets=self.store.n_buckets,
            needs_target=self.needs_target,
            blank_targets=self.blank_targets,
            columns=self.columns,
            needs_as_of=self.needs_as_of,
            job=self.job,
            rejected=self.rejected,
        )
        problem = partial(
            requests.problem, columns=self.columns, needs_target=self.needs_target, rejected=self.rejected
        )
        batches = read_split(split, job=self.job, max_row_mb=self.columns.max_row_mb, problem=problem)
        good = keep_good(batches, validate, found, limit, time_column="as_of", store=self.store)
        yield from counted(good, split, found, self.tally)


@dataclass(frozen=True, kw_only=True)
class Behaviors:
    """Reads the valid behaviors of splits.

    The others go to the `rejects` table of `store`; without one they are only counted.
    """

    columns: "histories.Columns"
    n_buckets: int
    job: str
    tally: Tally | None = None
    store: "Store | None" = None

    def __call__(self, split: "Split", found: SplitFound, limit: int | None) -> "Iterator[pa.Table]":
        """The first `limit` of them, or all."""
        from persona.inputs import histories
        from persona.inputs.reader import read_split

        validate = partial(histories.validate, columns=self.columns, n_buckets=self.n_buckets, job=self.job)
        problem = partial(histories.problem, columns=self.columns)
        batches = read_split(split, job=self.job, max_row_mb=self.columns.max_row_mb, problem=problem)
        good = keep_good(batches, validate, found, limit, time_column="timestamp", store=self.store)
        yield from counted(good, split, found, self.tally)


def keep_good(
    batches: "Iterator[Records]",
    validate: "Callable[[Records], tuple[pa.Table, pa.Table]]",
    found: SplitFound,
    limit: int | None,
    *,
    time_column: str | None,
    store: "Store | None",
) -> "Iterator[pa.Table]":
    """The first `limit` valid rows of a split, or all, as they are read; its rejects are committed at the end.

    `validate` returns the valid rows and the rejects of a batch. Adds to `found`; nulls in `time_column` are counted.
    Each row of a file that is rejected as a whole counts as a reject. A split with rejects and no valid row counts as
    unreadable.
    """
    import pyarrow as pa

    rejects: list[pa.Table] = []
    for records in batches:
        good, bad = validate(records)
        if limit is not None:
            good = good.slice(0, limit - found.rows)
        found.rows += good.num_rows
        found.timeless += good[time_column].null_count if time_column is not None else 0
        found.unreadable += records.rejects.num_rows
        found.rejects += bad.num_rows + records.n_lost
        if bad.num_rows:
            rejects.append(bad)
        if good.num_rows:
            yield good
        if limit is not None and found.rows >= limit:
            break
    if rejects and not found.rows:
        found.unreadable = max(found.unreadable, 1)
    if rejects:
        table = pa.concat_tables(rejects)
        found.reasons = Counter(dict(Counter(table["reason"].to_pylist()).most_common(_REASONS_KEPT)))
        if store is not None:
            store.write_rejects(table)


def counted(rows: "Iterator[pa.Table]", split: "Split", found: SplitFound, tally: Tally | None) -> "Iterator[pa.Table]":
    """The rows of a split; the tally, if there is one, learns at the end what was found, and in how many seconds."""
    seconds, since = 0.0, time.perf_counter()
    for table in rows:
        seconds += time.perf_counter() - since
        yield table
        since = time.perf_counter()
    seconds += time.perf_counter() - since
    if tally is not None:
        tally.note("read", f"{split.uri}:{split.start}", {**found.counts, "seconds": seconds})


def request_rows(requests: "inputs.Requests", found: Found) -> list[tuple[str, str]]:
    """Rows of a summary about the input of requests: what they lack, and the rejects."""
    n_timeless = found.total.timeless
    see_all = f"{n_timeless:,} requests see the whole history"
    null = [("null as_of", see_all)] if n_timeless and requests.needs_as_of else []
    return [*null, *requests.rows(), *found.reject_rows()]


def reject_fraction(*, rejects: float, rows: float) -> float:
    """The share of the input that was rejected; `rows` are the valid ones."""
    return rejects / max(1, rejects + rows)


def exit_code_of(fraction: float, max_reject_fraction: float) -> int:
    """0, or `TOO_MANY_REJECTS`."""
    return TOO_MANY_REJECTS if fraction > max_reject_fraction else 0
