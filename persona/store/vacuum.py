"""Delete the files of a table that its readable versions do not need."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from persona import storage
from persona.store import data_files
from persona.store.delta_calls import with_retries
from persona.store.table import Table

_PARALLEL_DELETES = 16


def delete_unused_files(table: Table, *, lease: int, keep_hours: int) -> list[str]:
    """Delete data files that no version of the last `keep_hours` uses, and files never committed. Returns their URIs.

    With 0 hours, only the newest version remains readable. Files are listed before the lease is checked: a run that
    takes over later cannot have staged any of them. Raises `LeaseLost` when another lease rules.
    """
    if not table.layout.key:
        keep_hours = max(keep_hours, 1)  # `Table.append` needs no lease: spare what it is about to commit
    stored = table.stored_paths() if not keep_hours else set()
    latest = table.log.latest()
    list_unused = partial(latest.vacuum, keep_hours, dry_run=True, enforce_retention_duration=False, full=True)
    unused = set(with_retries(list_unused, f"cannot list the unused files of the table {table.uri}"))
    used = {file.path for file in data_files.from_log(table.log.require_lease(lease), table.layout)}
    # delta-rs goes by timestamps of other machines' clocks, so never delete what the newest version uses.
    uris = sorted(storage.join(table.uri, path) for path in (unused | stored) - used)
    with ThreadPoolExecutor(_PARALLEL_DELETES) as pool:
        list(pool.map(storage.delete, uris))
    return uris


def delete_old_versions(table: Table, *, lease: int) -> list[str]:
    """Delete the log of all versions but a new last one: their statistics name users. Returns the deleted URIs."""
    table.log.commit([], lease=lease)
    latest = table.log.require_lease(lease)
    with_retries(latest.create_checkpoint, f"cannot write a checkpoint of {table.uri}")
    last = latest.version()
    old = [
        file.uri
        for file in storage.list_files(storage.join(table.uri, "_delta_log"))
        if (number := file.uri.rsplit("/", 1)[1].split(".")[0]).isdigit() and int(number) < last
    ]
    for uri in old:
        storage.delete(uri)
    return old
