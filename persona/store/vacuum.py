"""Delete the files of a table that its readable versions do not need."""

from persona import storage
from persona.store import key_index
from persona.store.file_list import FileList
from persona.store.table import Table


def delete_unused_files(table: Table, *, lease: int, keep_hours: int) -> list[str]:
    """Delete data files that no version of the last `keep_hours` uses, and files never committed. Returns their URIs.

    A key index goes with its data file. With 0 hours, only the newest version remains readable. Files are listed before
    the lease is checked: a run that takes over later cannot have staged any of them. Raises `LeaseLost` when another
    lease rules.
    """
    if not table.layout.key:
        keep_hours = max(keep_hours, 1)  # `Table.append` needs no lease: spare what it is about to commit
    indexed = key_index.indexed_paths(table.uri) if table.layout.has_key_index else set()
    stored = table.stored_paths()
    latest = table.log.latest()
    unused = set(latest.unused_files(keep_hours))
    used = FileList.of(table.log.require_lease(lease), table.layout).paths()
    # delta-rs goes by timestamps of other machines' clocks, so never delete what the newest version uses.
    paths = sorted((unused if keep_hours else unused | stored) - used)
    table.delete(paths)
    key_index.delete(table.uri, indexed - stored - used)  # a killed run may have deleted only the data file
    return [storage.join(table.uri, path) for path in paths]


def delete_old_versions(table: Table, *, lease: int) -> list[str]:
    """Delete the log of all versions but a new last one: their statistics name users. Returns the deleted URIs."""
    table.log.commit([], lease=lease)
    latest = table.log.require_lease(lease)
    latest.create_checkpoint()
    last = latest.version()
    old = [
        file.uri
        for file in storage.list_files(storage.join(table.uri, "_delta_log"))
        if (number := file.uri.rsplit("/", 1)[1].split(".")[0]).isdigit() and int(number) < last
    ]
    for uri in old:
        storage.delete(uri)
    return old
