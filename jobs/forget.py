"""Forget users: their rows leave every table, then the bytes go, with all old versions, and a search proves it.

Reads and writes `<store>/behaviors`, `personas` and `generations`. A file that holds such rows is written again without
them; after that, everything that the newest version does not need is deleted, so no older version can be read any more.
Plugs and their checkpoints hold weights, no rows of anybody; the inputs of other jobs are yours to clean.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime import cli, exchange, session
from jobs.runtime.cli import Summary
from persona.errors import InputError, PersonaError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.store.store import Store
    from persona.store.writer import Rewritten

_TABLES = ("behaviors", "personas", "generations")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `jobs.forget` can be told."""

    store: str
    """Folder of the tables, local or s3://."""
    user: tuple[str, ...] = ()
    """Ids of users to forget."""
    users: str | None = None
    """Parquet or JSONL, local or s3://, with a column user_id: users to forget."""
    dry_run: bool = False
    """Say how many rows of whom would go, and change nothing."""

    def check(self) -> None:
        """Refuses what can be refused without looking at any data."""
        if not self.user and self.users is None:
            raise UsageError("--user or --users must say whom to forget")
        if any(not user.strip() for user in self.user):
            raise UsageError("--user: an id is empty; nobody has been forgotten")


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.store.store import Store

    started = time.perf_counter()
    target = storage.check_uri(config.store, flag="--store")
    storage.check_reachable(target, flag="--store", write=True)
    store = Store.open(target)
    users = _users(config)
    with ExitStack() as leases:
        if not config.dry_run:
            writers = {name: leases.enter_context(store.writer(name, job="jobs.forget")) for name in _TABLES}
        session.connect()
        before = _count(store, users)
        if config.dry_run:
            would = f"take out {_said(before)} of {len(users):,} users"
            return Summary(
                table=[("would", would)], result={"dry_run": True, "would": would, "users": len(users), "rows": before}
            )
        rewritten, deleted = {}, {}
        for name, writer in writers.items():
            work = _work(store, name, users)
            pairs = [_pair(row) for row in exchange.each_row(work, _rewrite, store=store, users=users)]
            rewritten[name] = writer.exchange(pairs)
            deleted[name] = writer.erase_history()
        after = _count(store, users)
    if any(after.values()):
        raise PersonaError(f"rows of users to forget are still there: {_said(after)}; run the same command again")
    result = {
        "job": "forget",
        "store": store.uri,
        "users": len(users),
        "rows_before": before,
        "rows_after": after,
        "files_rewritten": rewritten,
        "files_deleted": deleted,
        "seconds": round(time.perf_counter() - started, 1),
    }
    table = [
        ("users", f"{len(users):,}"),
        ("rows taken out", _said(before)),
        ("rows found now", _said(after)),
        ("files rewritten", ", ".join(f"{n:,} of {name}" for name, n in rewritten.items())),
        ("files deleted", ", ".join(f"{n:,} of {name}" for name, n in deleted.items())),
        ("seconds", f"{result['seconds']:,}"),
    ]
    return Summary(table=table, result=result)


def _users(config: Config) -> list[str]:
    from persona import storage
    from persona.inputs import cells, files as inputs
    from persona.inputs.files import column

    found = set(config.user)
    if config.users is not None:
        uri = storage.check_uri(config.users, flag="--users")
        storage.check_reachable(uri, flag="--users")
        splits = inputs.plan_splits(uri, flag="--users")
        there = inputs.first_rows(splits).schema
        if "user_id" not in there.names:
            raise InputError(f"--users {config.users}: has no column 'user_id'. It has: {inputs.describe(there)}")
        for split in splits:
            for records in inputs.read_split(split, columns=["user_id"]):
                names, reasons = cells.ids(column(records.table, "user_id"), "user_id")
                bad = records.rejects.num_rows + len(reasons) - reasons.null_count
                if bad:
                    raise UsageError(
                        f"--users {config.users}: rows without a readable user_id: {bad:,}; nobody has been forgotten"
                    )
                found.update(names.to_pylist())
    if not found:
        raise UsageError(f"--users {config.users}: names nobody")
    return sorted(found)


def _count(store: "Store", users: list[str]) -> dict[str, int]:
    """Rows of these users in each table, found by a search of all files that may hold any."""
    counts = dict.fromkeys(_TABLES, 0)
    for name in _TABLES:
        work = _work(store, name, users)
        counts[name] = sum(row["n"] for row in exchange.each_row(work, _found, store=store, users=users))
    return counts


def _work(store: "Store", name: str, users: list[str]) -> list[dict[str, str]]:
    """An item for each file that may hold rows of these users."""
    from persona.store import maintenance as housekeeping

    return [{"table": name, "file": file.to_json()} for file in housekeeping.files_of_users(store, name, users)]


def _found(batch: "pa.Table", *, store: "Store", users: list[str]) -> Iterator["pa.Table"]:
    import pyarrow as pa

    from persona.store import maintenance as housekeeping
    from persona.store.data_files import DataFile

    for row in batch.to_pylist():
        n = housekeeping.rows_of_users(store.table(row["table"]), DataFile.from_json(row["file"]), users)
        yield pa.table({"n": [n]})


def _rewrite(batch: "pa.Table", *, store: "Store", users: list[str]) -> Iterator["pa.Table"]:
    import pyarrow as pa

    from persona.store import maintenance as housekeeping
    from persona.store.data_files import DataFile

    kinds = pa.schema([("old", pa.string()), ("new", pa.string())])
    for row in batch.to_pylist():
        found = housekeeping.without_users(store.table(row["table"]), DataFile.from_json(row["file"]), users)
        if found is not None:
            old, new = found
            pair = {"old": old.to_json(), "new": new.to_json() if new else None}
            yield pa.Table.from_pylist([pair], kinds)


def _pair(row: dict[str, Any]) -> "Rewritten":
    from persona.store.data_files import DataFile

    return DataFile.from_json(row["old"]), DataFile.from_json(row["new"]) if row["new"] else None


def _said(counts: dict[str, Any]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
