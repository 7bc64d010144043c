"""List the data files of a Delta table's newest version."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

import orjson
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, DeltaProtocolError, TableNotFoundError

from persona.errors import InputError, StorageError
from persona.inputs.table_files import Partitions, TableFiles, TableVersion
from persona.storage import FileEntry, delta_options, exists, join, read_bytes
from persona.storage.retry import in_one_line, retry_transient

LOG = "_delta_log"
_PARALLEL_READS, _MOST_READS = 16, 10_000
# Features that leave the data files as they are: readable one by one, column by column.
_PLAIN_FEATURES = {
    *("columnMapping", "deletionVectors"),  # refused only if they are in use
    *("timestampNtz", "typeWidening", "typeWidening-preview", "v2Checkpoint", "vacuumProtocolCheck"),
}


def is_table(uri: str) -> bool:
    """Whether a folder is a Delta table."""
    return exists(join(uri, LOG))


def find(uri: str, *, flag: str) -> TableFiles:
    """The files of the newest version of the table in a folder.

    Raises `InputError`, naming `flag`, if there is no table, or one whose files have to be combined with something else
    to get its rows.
    """

    def read() -> TableFiles:
        table = DeltaTable(uri, storage_options=delta_options(uri))
        _check_supported(table, uri, flag)
        version = TableVersion(kind="Delta", number=table.version())
        return TableFiles(version=version, partitions=dict(_files(table, uri)))

    what = f"{flag}: cannot read the log of the Delta table {uri}"
    try:
        return retry_transient(read, what)
    except TableNotFoundError as error:
        raise InputError(f"{flag}: there is no Delta table at {uri}: it has no folder {LOG}") from error
    except (DeltaError, OSError, pa.ArrowInvalid) as error:
        if isinstance(error, DeltaProtocolError) or "not supported" in str(error):
            raise InputError(f"{flag}: the Delta table {uri} cannot be read: {in_one_line(error)}") from error
        raise StorageError(f"{what}: {in_one_line(error)}") from error


def only_gained_rows(uri: str, since: int, until: int) -> bool:
    """Whether between two versions rows were only added, or moved to other files as OPTIMIZE does.

    False also if the log does not say any more, or is too long to be looked at.
    """
    if until - since > _MOST_READS:
        return False
    entries = [join(uri, LOG, f"{version:020}.json") for version in range(since + 1, until + 1)]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        try:
            return all(pool.map(_loses_no_row, entries))
        except StorageError:  # an old entry, which was deleted
            return False


def _loses_no_row(entry: str) -> bool:
    actions = [orjson.loads(line) for line in read_bytes(entry).splitlines() if line.strip()]
    return not any(action["remove"].get("dataChange", True) for action in actions if "remove" in action)


def _check_supported(table: DeltaTable, uri: str, flag: str) -> None:
    features = set(table.protocol().reader_features or ())
    mapping = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    problem = None
    if mapping != "none":
        problem = (
            f"column mapping ({mapping}): its files have other column names than the table",
            "copy it to a table without it",
        )
    elif "deletionVectors" in features and pa.table(table.deletion_vectors()).num_rows:
        problem = (
            "deletion vectors: its files still hold deleted rows",
            "rewrite these files with REORG TABLE ... APPLY (PURGE)",
        )
    elif others := sorted(features - _PLAIN_FEATURES):
        problem = (f"the reader feature {others[0]}", "copy it to a table without it")
    if problem is not None:
        raise InputError(f"{flag}: the Delta table {uri} uses {problem[0]}, which is not supported; {problem[1]}")


def _files(table: DeltaTable, uri: str) -> Iterator[tuple[FileEntry, Partitions]]:
    adds = pa.table(table.get_add_actions(flatten=False))
    names = table.metadata().partition_columns
    values = adds["partition"].combine_chunks() if names else None
    columns = [values.field(name).cast(pa.string()).to_pylist() for name in names] if values is not None else []
    for row, (path, size_bytes, modified) in enumerate(
        zip(*(adds[name].to_pylist() for name in ("path", "size_bytes", "modification_time")), strict=True)
    ):
        # Paths are percent-encoded in the log. Those of a shallow clone are URIs of another folder.
        location = unquote(path)
        location = location.removeprefix("file://") if "://" in location else join(uri, location)
        entry = FileEntry(uri=location, size_bytes=size_bytes, tag=f"delta:{modified}")
        yield entry, tuple((name, column[row]) for name, column in zip(names, columns, strict=True))
