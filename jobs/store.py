"""Look after a store: `python -m jobs.store show --store URI`, or `verify`, `compact`, `vacuum` in the place of `show`.

show      versions, users, behaviors, bytes, how even the buckets are, the last runs
verify    every promise that the files themselves can keep or break: keys, buckets, vectors; exit 1 where one is broken
compact   merges small files, which many refreshes leave behind, into large ones
vacuum    deletes files that no version of the last `--keep-hours` needs, and those that no run has ever committed
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jobs.runtime import cli, exchange, session
from jobs.runtime.cli import Summary
from persona.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.store.store import Store
    from persona.store.writer import Merged

_GROUPS_A_COMMIT = 256


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `jobs.store` can be told."""

    action: Literal["show", "verify", "compact", "vacuum"]
    """What to do; it may stand first, without its flag."""
    store: str
    """Folder of the tables, local or s3://."""
    encoder: str | None = None
    """With verify: an encoder (hub id or folder) whose fingerprint the store must have."""
    target_mb: int = 128
    """With compact: about this large do files get."""
    keep_hours: int = 168
    """With vacuum: how long old versions stay readable."""
    dry_run: bool = False
    """Say what would be done, and start nothing."""

    def check(self) -> None:
        """Refuses what can be refused without looking at any data."""
        cli.at_least(self, "target_mb", 1)
        cli.at_least(self, "keep_hours", 0)
        for name, action in (("encoder", "verify"), ("target_mb", "compact"), ("keep_hours", "vacuum")):
            if getattr(self, name) != getattr(Config, name) and self.action != action:
                raise UsageError(f"--{name.replace('_', '-')} goes with {action}, not with {self.action}")


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.store.store import Store

    writes = config.action in ("compact", "vacuum")
    target = storage.check_uri(config.store, flag="--store")
    storage.check_reachable(target, flag="--store", write=writes)
    store = Store.open(target)
    if config.dry_run:
        would = f"{config.action} the store of {store.identity.encoder}"
        return Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    started = time.perf_counter()
    work = {"show": _show, "verify": _verify, "compact": _compact, "vacuum": _vacuum}[config.action]
    table, result = work(config, store)
    seconds = round(time.perf_counter() - started, 1)
    found = {"job": "store", "action": config.action, "store": store.uri, **result, "seconds": seconds}
    return Summary(
        table=[("store", store.uri), *table, ("seconds", f"{seconds:,}")],
        result=found,
        exit_code=1 if result.get("problems") else 0,
    )


_Found = tuple[list[tuple[str, str]], dict[str, Any]]


def _show(_config: Config, store: "Store") -> _Found:
    from persona.store import maintenance as housekeeping

    session.connect()
    facts = {name: housekeeping.facts(store, name) for name in housekeeping.TABLES}
    work = [{"bucket": bucket} for bucket in store.buckets()]
    n_users = sum(row["users"] for row in exchange.each_row(work, _n_users, store=store))
    rows = facts["behaviors"]["rows_by_partition"]
    uneven = max(rows.values(), default=0) * store.n_buckets / max(sum(rows.values()), 1)
    runs = [run for name in housekeeping.TABLES for run in store.table(name).runs()]
    runs = sorted(runs, key=lambda run: str(run["at"]), reverse=True)[:10]
    of = store.identity
    table = [
        ("encoder", f"{of.encoder} ({of.width} wide, {of.pooling} pooling, {of.max_tokens} tokens)"),
        ("users", f"{n_users:,}"),
        ("buckets", f"{len(rows):,} of {store.n_buckets:,} filled, the largest has {uneven:.2f} × the mean"),
    ]
    table += [
        (name, f"{fact['rows']:,} rows, {fact['bytes']:,} bytes, {fact['files']:,} files, version {fact['version']:,}")
        for name, fact in facts.items()
    ]
    table += [("run", f"{run['at']}  {run['job']} on {run['table']}, from version {run['version']:,}") for run in runs]
    return table, {"users": n_users, "buckets": store.n_buckets, "tables": facts, "runs": runs}


def _n_users(batch: "pa.Table", *, store: "Store") -> Iterator["pa.Table"]:
    import pyarrow as pa

    for bucket in batch["bucket"].to_pylist():
        yield pa.table({"bucket": [bucket], "users": [len(store.users(bucket))]})


def _verify(config: Config, store: "Store") -> _Found:
    from persona.models import resolve as models
    from persona.store import maintenance as housekeeping

    problems: list[str] = []
    if config.encoder is not None:
        given = models.resolve(config.encoder, revision=store.identity.revision, flag="--encoder")
        mine, theirs = store.identity.fingerprint[:12], given.fingerprint[:12]
        if mine != theirs:
            problems.append(f"the store was made by an encoder with fingerprint {mine}, and --encoder has {theirs}")
    session.connect()
    partitions = {name: housekeeping.facts(store, name)["rows_by_partition"] for name in housekeeping.OF_USERS}
    work = [{"table": name, "partition": value} for name, values in partitions.items() for value in values]
    checked = dict.fromkeys(housekeeping.OF_USERS, 0)
    for row in exchange.each_row(work, _verify_one, store=store):
        checked[row["table"]] += row["rows"]
        problems += row["problems"]
    table = [(name, f"{n:,} rows checked") for name, n in checked.items()]
    table += [("problem", problem) for problem in problems[:20]] or [("problems", "none")]
    return table, {"checked": checked, "problems": problems[:1000], "n_problems": len(problems)}


def _verify_one(batch: "pa.Table", *, store: "Store") -> Iterator["pa.Table"]:
    import pyarrow as pa

    from persona.store import maintenance as housekeeping

    for row in batch.to_pylist():
        n, problems = housekeeping.verify(store, row["table"], row["partition"])
        kinds = pa.schema([("table", pa.string()), ("rows", pa.int64()), ("problems", pa.list_(pa.string()))])
        yield pa.Table.from_pylist([{"table": row["table"], "rows": n, "problems": problems}], kinds)


# Both hold the lease: files that a run has staged and not yet committed would look like rubbish.
def _compact(config: Config, store: "Store") -> _Found:
    from persona.store import maintenance as housekeeping

    session.connect()
    table, result = [], {}
    for name in housekeeping.TABLES:
        with store.writer(name, job="jobs.store") as writer:
            before = len(writer.table.files())
            groups = writer.small_files(config.target_mb * 2**20)
            for start in range(0, len(groups), _GROUPS_A_COMMIT):
                work = [
                    {"table": name, "files": [file.to_json() for file in group]}
                    for group in groups[start : start + _GROUPS_A_COMMIT]
                ]
                writer.exchange_merged([_merged(row) for row in exchange.each_row(work, _merge, store=store)])
            after = len(writer.table.files())
        table.append((name, f"{before:,} files became {after:,}"))
        result[name] = {"files_before": before, "files_after": after}
    return table, result


def _merge(batch: "pa.Table", *, store: "Store") -> Iterator["pa.Table"]:
    import pyarrow as pa

    from persona.store import writer
    from persona.store.data_files import DataFile

    kinds = pa.schema([("old", pa.list_(pa.string())), ("new", pa.string())])
    for row in batch.to_pylist():
        _, new = writer.merge(store.table(row["table"]), [DataFile.from_json(file) for file in row["files"]])
        yield pa.Table.from_pylist([{"old": row["files"], "new": new.to_json()}], kinds)


def _merged(row: dict[str, Any]) -> "Merged":
    from persona.store.data_files import DataFile

    return [DataFile.from_json(file) for file in row["old"]], DataFile.from_json(row["new"])


def _vacuum(config: Config, store: "Store") -> _Found:
    from persona.store import maintenance as housekeeping

    table, result = [], {}
    for name in housekeeping.TABLES:
        with store.writer(name, job="jobs.store") as writer:
            deleted = writer.vacuum(keep_hours=config.keep_hours)
        table.append((name, f"{deleted:,} files deleted"))
        result[name] = {"files_deleted": deleted}
    return table, result


def _action_first(argv: Sequence[str]) -> list[str]:
    """`show --store X` is short for `--action show --store X`."""
    return ["--action", *argv] if argv and not argv[0].startswith("-") else list(argv)


if __name__ == "__main__":
    sys.exit(cli.run(Config, main, _action_first(sys.argv[1:])))
