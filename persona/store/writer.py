"""Commit staged files to a table, replacing older rows.

Files are immutable. To replace or delete rows, the files that hold them are rewritten without them, and one commit
removes the old files and adds the new ones, so a reader sees either all the old rows or all the new ones.
"""

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from persona.store import vacuum
from persona.store.changes import key_strings
from persona.store.data_files import DataFile
from persona.store.lease import Lease
from persona.store.table import Table

_STAGED = pa.schema([("file", pa.string()), ("change", pa.string()), ("rows", pa.int64())])

Touched = tuple[DataFile, list[DataFile]]
"""A committed file, and the staged files that may replace rows of it."""
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

    def add(self, staged: pa.Table) -> None:
        """Commit files of new rows."""
        self.lease.check()
        self.table.commit(files_of(staged, "new"), lease=self.lease.number)

    def touched(self, staged: pa.Table) -> list[Touched]:
        """The files that may hold rows to replace or delete; `rewrite` each, then `replace`."""
        replacing = files_of(staged, "edited", "gone")
        if not replacing:
            return []
        partitions = self.table.layout.partition_values({file.partition for file in replacing})
        pairs = [(file, [new for new in replacing if _may_overlap(file, new)]) for file in self.table.files(partitions)]
        return [(file, news) for file, news in pairs if news]

    def replace(self, staged: pa.Table, rewritten: Sequence[Rewritten | None]) -> int:
        """Commit staged files and the rewritten touched files together; returns the number of rewritten ones."""
        n_rewritten = self.exchange(rewritten, files_of(staged, "new", "edited"))
        for file in files_of(staged, "gone"):
            self.table.discard(file)
        return n_rewritten

    def exchange(self, rewritten: Sequence[Rewritten | None], added: Sequence[DataFile] = ()) -> int:
        """Replace files by their rewritten ones and add others, in one commit; returns the number of rewritten ones."""
        self.lease.check()
        pairs = [pair for pair in rewritten if pair is not None]
        added = [*added, *(new for _, new in pairs if new is not None)]
        self.table.commit(added, [old for old, _ in pairs], lease=self.lease.number)
        return len(pairs)

    def remove_partition(self, value: str) -> int:
        """Delete all rows of a partition without reading them; returns their number."""
        self.lease.check()
        files = self.table.files(self.table.layout.partition_values([value]))
        self.table.commit(remove=files, lease=self.lease.number)
        return sum(file.n_rows for file in files)

    def small_files(self, target_bytes: int) -> list[list[DataFile]]:
        """Groups of two or more small files to `merge`, each from one partition and neighboring in key order."""
        ordered = sorted(self.table.files(), key=lambda file: (file.partition, sorted(file.stats.items()), file.path))
        groups: list[list[DataFile]] = [[]]
        for file in ordered:
            if 2 * file.size_bytes > target_bytes:
                continue
            last = groups[-1]
            size_bytes = sum(other.size_bytes for other in last) + file.size_bytes
            if last and (last[0].partition != file.partition or size_bytes > target_bytes):
                groups.append(last := [])
            last.append(file)
        return [group for group in groups if len(group) > 1]

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


def _may_overlap(one: DataFile, other: DataFile) -> bool:
    """Whether both files may hold the same key, judging by partition and statistics."""
    both = one.stats.keys() & other.stats.keys()
    disjoint = any(one.stats[n][1] < other.stats[n][0] or other.stats[n][1] < one.stats[n][0] for n in both)
    return one.partition == other.partition and not disjoint


def rewrite(table: Table, file: DataFile, replacing: Sequence[DataFile]) -> Rewritten | None:
    """Stage a copy of a file without the keys of the `replacing` files; None when it has none of those keys.

    Reads keys first, and the other columns only if rows have to go.
    """
    names = table.layout.row_key
    replaced = pa.concat_arrays([key_strings(table.read_file(new, names)) for new in replacing])
    is_replaced = pc.is_in(key_strings(table.read_file(file, names)), value_set=replaced)
    if not pc.any(is_replaced).as_py():
        return None
    rest = table.read_file(file).filter(pc.invert(is_replaced))
    return file, table.write_file(rest) if rest.num_rows else None


def merge(table: Table, files: list[DataFile]) -> Merged:
    """Stage one file with the rows of several files of one partition."""
    return files, table.write_file(pa.concat_tables(table.read_file(file) for file in files))
