"""Delete users: their rows leave every table, their bytes and all old versions are deleted, and a search checks it.

Reads and writes all tables with a column `user_id`: behaviors, personas, answers, replies of chat models and what was
made of them. If `--store` is a pointer, those of the store in use and of all earlier ones that still exist. Data files
that hold rows of these users are rewritten without them. Then everything that the newest version does not need is
deleted, so older versions can no longer be read, and so are the files that rows moved through on their way
(`<store>/_exchange`). In the evaluations below `--reports`, the users' rows, examples and answers are removed, and
pages and charts are drawn anew; so they are in the evaluations that the table `plugs` names. The summary names what is
not searched. Plugs and checkpoints hold weights, no rows of users.
"""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.runtime import cli, exchange, reports, session
from jobs.runtime.cli import Summary
from persona.errors import InputError, PersonaError, UsageError

if TYPE_CHECKING:
    from persona.store.data_files import DataFile
    from persona.store.store import Store
    from persona.store.writer import Rewritten

_NOT_SEARCHED = (
    "histories and requests that jobs read: remove these users there, or the next jobs.embed adds them again",
    "texts that jobs.make_requests put into other users' requests, and their profiles and evaluations: make them again",
    "answers, texts or lists of differences that other programs or jobs.store have copied from the tables",
    "what a killed jobs.train, jobs.make_requests or jobs.pair left in _exchange below its --runs or --out: delete it",
    "hidden states that jobs.locate keeps, or left when it was killed: delete the folder states below its --out",
    "the table rejects: it names files, rows and reasons, no texts",
    "backups, and old versions that a bucket keeps of deleted objects",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.forget."""

    store: str
    """Folder of the tables, local or s3://; of a pointer, all stores that it names or has named."""
    user: tuple[str, ...] = ()
    """Ids of users to forget; for many, use --users."""
    users: str | None = None
    """Parquet or JSONL, local or s3://, with the ids of users to forget in a column user_id."""
    reports: tuple[str, ...] = ()
    """Folders of evaluations (--out of jobs.evaluate, or a folder above); removes the users there as well."""
    dry_run: bool = False
    """Count the rows that would be deleted, and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        if not self.user and self.users is None:
            raise UsageError("no users given: name those to forget with --user or --users")
        if any(not user.strip() for user in self.user):
            raise UsageError("--user: an id is empty; no user has been forgotten")


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.store.store import Store

    started = time.perf_counter()
    target = storage.check_uri(config.store, flag="--store")
    storage.check_reachable(target, flag="--store", write=True)
    stores = Store.open_all(target)
    users = _users(config)
    found = reports.find(report_folders(config, stores))
    # Reads every evaluation, so that one that cannot be read ends the job before it changes anything.
    in_reports = _count_in_reports(found, users)
    unsearched = _unsearched(stores, found)
    if config.dry_run:
        return _plan(stores, users, in_reports, unsearched)
    rows = _forget_rows(stores, users)
    for one in found.evaluations:
        reports.remove_users(one, set(users))
    for uri in found.run_files:
        storage.delete(uri)
    found_after = reports.find(report_folders(config, stores))
    left = {**rows.after, "parts of evaluations": _count_in_reports(found_after, users)}
    if any(left.values()):
        raise PersonaError(f"rows of these users are still there: {_listed(left)}; run the same command again")
    result = {
        "job": "forget",
        "stores": [store.uri for store in stores],
        "users": len(users),
        "rows_before": rows.before,
        "rows_after": rows.after,
        "files_rewritten": rows.rewritten,
        "files_deleted": rows.deleted,
        "reports": [one.folder for one in found.evaluations],
        "report_parts_deleted": in_reports,
        "not_searched": unsearched,
        "seconds": round(time.perf_counter() - started, 1),
    }
    table = [
        ("stores", ", ".join(store.label for store in stores)),
        ("users", f"{len(users):,}"),
        ("rows deleted", _listed(rows.before)),
        ("rows left", _listed(rows.after)),
        ("files rewritten", _listed(rows.rewritten)),
        ("files deleted", _listed(rows.deleted)),
        ("evaluations", f"{in_reports:,} rows, examples and run files removed from {len(found.evaluations):,}"),
        *(("not searched", text) for text in unsearched),
        ("seconds", f"{result['seconds']:,}"),
    ]
    return Summary(table=table, result=result)


@dataclass(frozen=True, kw_only=True)
class _Forgotten:
    """Rows of the users by table, before and after, and what became of the files."""

    before: dict[str, int]
    after: dict[str, int]
    rewritten: Counter[str]
    deleted: Counter[str]


def _forget_rows(stores: "Sequence[Store]", users: list[str]) -> _Forgotten:
    """Delete the rows of these users from all tables, while no other job can write to them."""
    from persona.exchange import leftovers
    from persona.store import maintenance

    rewritten: Counter[str] = Counter()
    deleted: Counter[str] = Counter()
    with ExitStack() as leases:
        writers = [
            (store, name, leases.enter_context(store.writer(name, job="jobs.forget")))
            for store in stores
            for name in maintenance.tables_of_users(store)
        ]
        session.connect()
        before = _count(stores, users)
        for store, name, writer in writers:
            files = _files(store, name, users)
            work = exchange.results(files, _rewrite, store=store, table=name, users=users)
            rewritten[name] += writer.exchange(list(work))
            deleted[name] += writer.erase_history()
        for store in stores:
            deleted["run files"] += leftovers.delete_leftovers(store.uri)
        after = _count(stores, users)
    return _Forgotten(before=before, after=after, rewritten=rewritten, deleted=deleted)


def _plan(stores: "Sequence[Store]", users: list[str], in_reports: int, unsearched: list[str]) -> Summary:
    session.connect()
    rows = _count(stores, users)
    would = f"delete the rows of {len(users):,} users: {_listed(rows)}, {in_reports:,} parts of evaluations"
    uris = [store.uri for store in stores]
    result = {"dry_run": True, "would": would, "stores": uris, "users": len(users), "rows": rows}
    table = [("would", would), ("stores", ", ".join(uris)), *(("not searched", text) for text in unsearched)]
    return Summary(table=table, result={**result, "report_parts": in_reports, "not_searched": unsearched})


def report_folders(config: Config, stores: "Sequence[Store]") -> list[str]:
    """The folders of --reports, and the evaluations that plugs of these stores were promoted or refused with."""
    from persona import storage
    from persona.store import registry

    given = [storage.check_uri(folder, flag="--reports") for folder in config.reports]
    of_plugs = [plug.evaluation for store in stores for plug in registry.read(store).versions]
    return [*given, *(folder for folder in reports.existing(of_plugs) if folder not in given)]


def _count_in_reports(found: reports.Found, users: Sequence[str]) -> int:
    n_parts = sum(reports.remove_users(one, set(users), dry_run=True) for one in found.evaluations)
    return n_parts + len(found.run_files)


def _unsearched(stores: "Sequence[Store]", found: reports.Found) -> list[str]:
    """The places that may hold these users and that this run does not search, for people."""
    places = list(_NOT_SEARCHED)
    if all(store.pointer is None for store in stores):
        places.append("other stores: --store is a store, not a pointer to stores")
    others = "other evaluations than those of --reports and of the table plugs"
    return [*places, others, *(f"{uri}: no file of jobs.evaluate" for uri in found.unknown)]


def _users(config: Config) -> list[str]:
    """The ids of both flags, sorted."""
    found = {*config.user, *(_read_users(config.users) if config.users is not None else ())}
    if not found:
        raise UsageError(f"--users {config.users}: contains no users")
    return sorted(found)


def _read_users(given: str) -> set[str]:
    """The ids in a file. A single unreadable row stops the job: its user would be missed unnoticed."""
    from persona import storage
    from persona.inputs import cells
    from persona.inputs.reader import first_rows, read_split
    from persona.inputs.records import column, describe
    from persona.inputs.splits import plan_splits

    uri = storage.check_uri(given, flag="--users")
    storage.check_reachable(uri, flag="--users")
    splits = plan_splits(uri, flag="--users")
    schema = first_rows(splits).schema
    if "user_id" not in schema.names:
        raise InputError(f"--users {given}: has no column 'user_id'. It has: {describe(schema)}")
    found: set[str] = set()
    for split in splits:
        for records in read_split(split, columns=["user_id"]):
            ids, reasons = cells.ids(column(records.table, "user_id"), "user_id")
            n_bad = records.rejects.num_rows + len(reasons) - reasons.null_count
            if n_bad:
                raise UsageError(
                    f"--users {given}: rows without a readable user_id: {n_bad:,}; no user has been forgotten"
                )
            found.update(ids.to_pylist())
    return found


def _count(stores: "Sequence[Store]", users: list[str]) -> dict[str, int]:
    """How many rows of these users the tables of all stores hold, by a search of all files that may hold any."""
    from persona.store import maintenance

    found: Counter[str] = Counter()
    for store in stores:
        for name in maintenance.tables_of_users(store):
            files = _files(store, name, users)
            found[name] += sum(exchange.results(files, _n_rows, store=store, table=name, users=users))
    return dict(found)


def _files(store: "Store", table: str, users: Sequence[str]) -> "list[DataFile]":
    from persona.store import maintenance

    return maintenance.files_of_users(store, table, users)


def _n_rows(file: "DataFile", *, store: "Store", table: str, users: Sequence[str]) -> int:
    from persona.store import maintenance

    return maintenance.rows_of_users(store.table(table), file, users)


def _rewrite(file: "DataFile", *, store: "Store", table: str, users: Sequence[str]) -> "Rewritten | None":
    from persona.store import maintenance

    return maintenance.without_users(store.table(table), file, users)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
