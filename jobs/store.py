"""Inspect and maintain a store: `persona-plug store show --store URI`, or another action in place of `show`.

show: print versions, users, behaviors, bytes, how evenly the buckets are filled, and the last runs.

verify: check every data file (keys, buckets, vectors, key index); exit code 1 if anything is wrong.

compact: merge all small files into large ones; jobs that write merge those of crowded partitions themselves.

vacuum: delete files that no version of the last `--keep-hours` needs, and files that were never committed.

switch: point the folder `--store` to the store `--to`, in one write; every job that is given the folder then uses that
store. Exit code 2 unless both have the same behaviors.
"""

import posixpath
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from jobs.runtime import cli, compaction, exchange, session, switching
from jobs.runtime.cli import Summary
from persona.errors import UsageError
from persona.option_checks import check_at_least

if TYPE_CHECKING:
    from persona.store.store import Store

_RUNS_SHOWN = 10
_PROBLEMS_SHOWN, _PROBLEMS_RETURNED = 20, 1000
_ONLY_WITH = {
    "encoder": "verify",
    "target_mb": "compact",
    "keep_hours": "vacuum",
    "to": "switch",
    "allow_differences": "switch",
    "differences": "switch",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.store."""

    FIRST_ARGUMENT: ClassVar[str] = "action"

    action: Literal["show", "verify", "compact", "vacuum", "switch"]
    """What to do; may also be given first, without the flag."""
    store: str
    """Folder of the tables, local or s3://; with switch: folder of the pointer, created if it does not exist."""
    to: str | None = None
    """With switch: the store that --store is to point to."""
    allow_differences: bool = False
    """With switch: also switch to a store that does not have the same behaviors as the one in use."""
    differences: str | None = None
    """With switch: write up to 3,000 behaviors that are not the same in both stores to this file, as JSON lines."""
    encoder: str | None = None
    """With verify: also check that this encoder (hub id or folder) made the store's vectors."""
    target_mb: int | None = None
    """With compact: size of the merged files in MiB; default 128, and more in a store of more than a terabyte."""
    keep_hours: int = 168
    """With vacuum: how long old versions stay readable; lower it to free space sooner."""
    dry_run: bool = False
    """Print what would be done, and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "target_mb")
        check_at_least(self, 0, "keep_hours")
        for name, action in _ONLY_WITH.items():
            if getattr(self, name) != getattr(Config, name) and self.action != action:
                raise UsageError(f"--{name.replace('_', '-')} goes with {action}, not with {self.action}")
        if self.action == "switch" and self.to is None:
            raise UsageError("switch needs --to, the store that --store is to point to")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an action found or did: rows for people, fields for programs."""

    table: Sequence[tuple[str, str]]
    result: Mapping[str, object]
    is_ok: bool = True


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.store.store import Store

    writes = config.action in ("compact", "vacuum", "switch")
    target = storage.check_uri(config.store, flag="--store")
    storage.check_reachable(target, flag="--store", write=writes)
    started = time.perf_counter()
    if config.action == "switch":
        return _summary(config, target, target, _switch(config, target), started)
    store = Store.open(target)
    if config.dry_run:
        would = f"{config.action} the store of {store.identity.encoder}"
        return Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    action = {"show": _show, "verify": _verify, "compact": _compact, "vacuum": _vacuum}[config.action]
    return _summary(config, store.uri, store.label, action(config, store), started)


def _summary(config: Config, uri: str, label: str, outcome: Outcome, started: float) -> Summary:
    seconds = round(time.perf_counter() - started, 1)
    return Summary(
        table=[("store", label), *outcome.table, ("seconds", f"{seconds:,}")],
        result={"job": "store", "action": config.action, "store": uri, **outcome.result, "seconds": seconds},
        exit_code=0 if outcome.is_ok else 1,
    )


def _show(_config: Config, store: "Store") -> Outcome:
    from persona.store import maintenance

    session.connect()
    facts = {name: maintenance.facts(store, name) for name in maintenance.tables(store)}
    n_users = sum(exchange.results(store.buckets(), _n_users, store=store.snapshot("behaviors")))
    rows = facts["behaviors"]["rows_by_partition"]
    skew = max(rows.values(), default=0) * store.n_buckets / max(sum(rows.values()), 1)
    runs = [run for name in facts for run in store.table(name).runs()]
    runs = sorted(runs, key=lambda run: str(run["at"]), reverse=True)[:_RUNS_SHOWN]
    identity = store.identity
    table = [
        ("encoder", f"{identity.encoder} ({identity.describe()})"),
        ("users", f"{n_users:,}"),
        ("buckets", f"{len(rows):,} of {store.n_buckets:,} filled, the largest has {skew:.2f} × the mean"),
    ]
    table += [
        (name, f"{fact['rows']:,} rows, {fact['bytes']:,} bytes, {fact['files']:,} files, version {fact['version']:,}")
        for name, fact in facts.items()
    ]
    table += [("run", f"{run['at']}  {run['job']} on {run['table']}, from version {run['version']:,}") for run in runs]
    return Outcome(table=table, result={"users": n_users, "buckets": store.n_buckets, "tables": facts, "runs": runs})


def _n_users(bucket: int, *, store: "Store") -> int:
    return len(store.users(bucket))


def _verify(config: Config, store: "Store") -> Outcome:
    from persona.store import maintenance

    problems = [] if config.encoder is None else _encoder_problems(config.encoder, store)
    session.connect()
    tables = maintenance.tables_of_users(store)
    store = store.snapshot(*tables)
    partitions = [
        _Partition(table=name, value=value)
        for name in tables
        for value in maintenance.facts(store, name)["rows_by_partition"]
    ]
    checked = dict.fromkeys(tables, 0)
    for found in exchange.results(partitions, _verify_partition, store=store):
        checked[found.partition.table] += found.n_rows
        problems += found.problems
    table = [(name, f"{n:,} rows checked") for name, n in checked.items()]
    table += [("problem", problem) for problem in problems[:_PROBLEMS_SHOWN]] or [("problems", "none")]
    result = {"checked": checked, "problems": problems[:_PROBLEMS_RETURNED], "n_problems": len(problems)}
    return Outcome(table=table, result=result, is_ok=not problems)


def _encoder_problems(encoder: str, store: "Store") -> list[str]:
    from persona.models import resolve as models

    given = models.resolve(encoder, revision=store.identity.revision, flag="--encoder")
    of_store, of_given = store.identity.fingerprint[:12], given.fingerprint[:12]
    if of_store == of_given:
        return []
    return [f"the store was made by an encoder with fingerprint {of_store}, and --encoder has {of_given}"]


@dataclass(frozen=True, kw_only=True)
class _Partition:
    table: str
    value: str


@dataclass(frozen=True, kw_only=True)
class _Verified:
    partition: _Partition
    n_rows: int
    problems: list[str]


def _verify_partition(partition: _Partition, *, store: "Store") -> _Verified:
    from persona.store import maintenance

    n_rows, problems = maintenance.verify(store, partition.table, partition.value)
    return _Verified(partition=partition, n_rows=n_rows, problems=problems)


# Compact and vacuum hold the lease: vacuum would delete the files that a running job has staged and not yet committed.
def _compact(config: Config, store: "Store") -> Outcome:
    from persona.store import maintenance

    session.connect()
    table, result = [], {}
    for name in maintenance.tables(store):
        with store.writer(name, job="jobs.store") as writer:
            n_before = len(writer.table.files())
            target_bytes = None if config.target_mb is None else config.target_mb * 2**20
            compaction.merge(writer, writer.small_files(target_bytes))
            n_after = len(writer.table.files())
        table.append((name, f"{n_before:,} files became {n_after:,}"))
        result[name] = {"files_before": n_before, "files_after": n_after}
    return Outcome(table=table, result=result)


def _vacuum(config: Config, store: "Store") -> Outcome:
    from persona.exchange import leftovers
    from persona.store import maintenance

    table, result = [], {}
    for name in maintenance.tables(store):
        with store.writer(name, job="jobs.store") as writer:
            # Also the run files of killed jobs, as none that holds this lease can be at work.
            n_deleted = writer.vacuum(keep_hours=config.keep_hours) + leftovers.delete_leftovers(store.uri, name)
        table.append((name, f"{n_deleted:,} files deleted"))
        result[name] = {"files_deleted": n_deleted}
    return Outcome(table=table, result=result)


def _switch(config: Config, pointer: str) -> Outcome:
    from persona import storage

    assert config.to is not None
    to = storage.check_uri(config.to, flag="--to")
    storage.check_reachable(to, flag="--to")
    listed = None
    if config.differences is not None:
        listed = storage.check_uri(config.differences, flag="--differences")
        storage.check_reachable(posixpath.dirname(listed), flag="--differences", write=True)
    switch = switching.plan(pointer, to)
    if not switch.is_needed:
        return Outcome(table=[("points to", f"{to}, as before")], result={"to": to, "before": to})
    found = switching.compare(switch, allow_differences=config.allow_differences)
    if found is not None:
        if listed is not None:
            switching.write_differences(found, listed)
        if not config.allow_differences:
            switching.require_equal(found, switch)
    table, result = switching.facts(switch, found)
    if config.dry_run:
        would = f"point {pointer} to {to}"
        return Outcome(table=[("would", would), *table[1:]], result={"dry_run": True, "would": would, **result})
    switching.write(switch)
    return Outcome(table=table, result=result)


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
