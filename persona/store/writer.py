"""Commit staged files to a table, replacing older rows.

Files are immutable. To replace or delete rows, the files that hold them are rewritten without them, and one commit
removes the old files and adds the new ones, so a reader sees either all the old rows or all the new ones.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from persona.store import small_files, stored_keys, vacuum
from persona.store.changes import key_strings
from persona.store.data_files import DataFile
from persona.store.lease import Lease
from persona.store.overlaps import KeyRanges
from persona.store.table import Table

_STAGED = pa.schema([("file", pa.string()), ("change", pa.string()), ("rows", pa.int64())])
_REWRITTEN_TOGETHER = 8  # files that share one look at the keys that replace theirs

Touched = tuple[list[DataFile], list[DataFile]]
"""Committed files of one partition, and the staged files that may replace rows of them."""
Rewritten = tuple[DataFile, DataFile | None]
"""A committed file, and its replacement; None when no row is left."""
Merged = tuple[list[DataFile], DataFile]
"""Committed files, and the one that replaces them."""


def staged_files(files: Iterable[tuple[DataFile, str]]) -> pa.Table:
    """Staged files and their change as a table, to send from where they were written to the `Writer`.

    The change is `new` (rows are added), `edited` (rows replace those of the same key) or `gone` (keys to delete).
    """
    rows = [{"file": file.to_json(), "change": change, "rows": file.n_rows} for file, change in files]
    return pa.Table.from_pylist(rows, _STAGED)


def files_of(staged: pa.Table, *changes: str) -> list[DataFile]:
    """The files of a `staged_files` table with one of these changes."""
    return [DataFile.from_json(row["file"]) for row in staged.to_pylist() if row["change"] in changes]


class Writer:
    """Commits to one table while its lease is held. Every method raises `LeaseLost` once the lease is lost."""

    def __init__(self, table: Table, lease: Lease) -> None:
        self.table = table
        self.lease = lease
        self.added_bytes = 0
        """The size of all files that were added so far, except by `exchange_merged`."""

    def add(self, staged: pa.Table) -> None:
        """Commit files of new rows."""
        self._commit(files_of(staged, "new"))

    def touched(self, staged: pa.Table) -> list[Touched]:
        """The files that may hold rows to replace or delete; `rewrite` each, then `replace`."""
        by_partition: dict[str, list[DataFile]] = defaultdict(list)
        for file in files_of(staged, "edited", "gone"):
            by_partition[file.partition].append(file)
        found: list[Touched] = []
        committed = self.table.file_list()
        for partition, replacing in by_partition.items():
            ranges = KeyRanges(replacing)
            touched = [file for file in committed.of_partitions([partition]) if ranges.near(file)]
            for start in range(0, len(touched), _REWRITTEN_TOGETHER):
                some = touched[start : start + _REWRITTEN_TOGETHER]
                near = {new.path: new for file in some for new in ranges.near(file)}
                found.append((some, list(near.values())))
        return found

    def replace(self, staged: pa.Table, rewritten: Sequence[Rewritten | None]) -> int:
        """Commit staged files and the rewritten touched files together; returns the number of rewritten ones."""
        n_rewritten = self.exchange(rewritten, files_of(staged, "new", "edited"))
        self.table.delete([file.path for file in files_of(staged, "gone")])
        return n_rewritten

    def exchange(self, rewritten: Sequence[Rewritten | None], added: Sequence[DataFile] = ()) -> int:
        """Replace files by their rewritten ones and add others, in one commit; returns the number of rewritten ones."""
        pairs = [pair for pair in rewritten if pair is not None]
        added = [*added, *(new for _, new in pairs if new is not None)]
        self._commit(added, [old for old, _ in pairs])
        return len(pairs)

    def remove_partition(self, value: str) -> int:
        """Delete all rows of a partition without reading them; returns their number."""
        files = self.table.files(self.table.layout.partition_values([value]))
        self._commit(remove=files)
        return sum(file.n_rows for file in files)

    def _commit(self, add: Sequence[DataFile] = (), remove: Sequence[DataFile] = ()) -> None:
        self.lease.check()
        self.table.commit(add, remove, lease=self.lease.number)
        self.added_bytes += sum(file.size_bytes for file in add)

    def small_files(self, target_bytes: int | None = None) -> list[list[DataFile]]:
        """Groups of two or more small files to `merge`, each from one partition and neighboring in key order.

        The size of a merged file is by default `small_files.target_bytes`.
        """
        files = self.table.files()
        return small_files.groups(files, target_bytes or small_files.target_bytes(files))

    def crowded_files(self, max_bytes: int) -> list[list[DataFile]]:
        """Such groups of the partitions that have so many small files that merging them pays, most files first.

        Together they have at most `max_bytes`, or are one group.
        """
        files = self.table.files()
        return small_files.crowded_groups(files, small_files.target_bytes(files), max_bytes)

    def exchange_merged(self, merged: Sequence[Merged]) -> None:
        """Replace files by the merged ones, in one commit that changes no row."""
        self.lease.check()
        removed = [old for olds, _ in merged for old in olds]
        self.table.commit([new for _, new in merged], removed, lease=self.lease.number, same_rows=True)

    def vacuum(self, *, keep_hours: int) -> int:
        """Delete the files that no version of the last `keep_hours` uses; returns their number."""
        self.lease.check()
        return len(vacuum.delete_unused_files(self.table, lease=self.lease.number, keep_hours=keep_hours))

    def erase_history(self) -> int:
        """Delete all data and log files except those of the newest version; returns their number."""
        self.lease.check()
        number = self.lease.number
        deleted = vacuum.delete_unused_files(self.table, lease=number, keep_hours=0)
        return len(deleted) + len(vacuum.delete_old_versions(self.table, lease=number))


def rewrite(table: Table, files: Sequence[DataFile], replacing: Sequence[DataFile]) -> list[Rewritten]:
    """Stage copies without the keys of the `replacing` files, of the files that have any of those keys.

    All files are of one partition. Reads keys first, and the other columns only if rows have to go.
    """
    replaced = _keys(table, replacing)
    touched = [file for file in files if pc.any(pc.is_in(_keys(table, [file]), value_set=replaced)).as_py()]
    if not touched:
        return []
    names = table.layout.row_key
    strings = pa.concat_arrays([key_strings(table.read_file(new, names)) for new in replacing])
    pairs: list[Rewritten] = []
    for file in touched:
        rows = table.read_file(file)
        rest = rows.filter(pc.invert(pc.is_in(key_strings(rows.select(names)), value_set=strings)))
        pairs.append((file, table.write_file(rest) if rest.num_rows else None))
    return pairs


def _keys(table: Table, files: Sequence[DataFile]) -> pa.Array:
    """A value for each row of the files, equal for equal keys."""
    if table.layout.has_key_index:
        return stored_keys.digests_of(table.uri, files)
    return pa.concat_arrays([key_strings(table.read_file(file, table.layout.row_key)) for file in files])


def merge(table: Table, files: list[DataFile]) -> Merged:
    """Stage one file with the rows of several files of one partition."""
    return files, table.write_file(pa.concat_tables(table.read_file(file) for file in files))
