"""The one who commits: files that anyone has staged become part of a table, and take the place of older rows.

Rows are staged as files of one change: `new` rows are simply added; `edited` rows replace those of the same key, and
`gone` ones take them away. Files are never altered, so a file that holds replaced rows is written again without them,
and one commit takes the old file out and puts all the others in: a reader sees the rows of before or those of after.
"""

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from persona.store.lease import Lease
from persona.store.schema import DataFile
from persona.store.table import Table

CHANGES = ("new", "edited", "gone")
_STAGED = pa.schema([("file", pa.string()), ("change", pa.string()), ("rows", pa.int64())])

Touched = tuple[DataFile, list[DataFile]]
Rewritten = tuple[DataFile, DataFile | None]
Merged = tuple[list[DataFile], DataFile]


def staged_files(files: Iterable[tuple[DataFile, str]]) -> pa.Table:
    """Staged files and their changes as rows, to travel from where they were written to the `Writer`."""
    rows = [{"file": file.to_json(), "change": change, "rows": file.n_rows} for file, change in files]
    return pa.Table.from_pylist(rows, _STAGED)


def files_of(staged: pa.Table, *changes: str) -> list[DataFile]:
    """The files of some changes among what `staged_files` made."""
    return [DataFile.from_json(row["file"]) for row in staged.to_pylist() if row["change"] in changes]


class Writer:
    """Commits to one table for as long as its lease is held."""

    def __init__(self, table: Table, lease: Lease) -> None:
        self.table = table
        self.lease = lease

    def commit(self, staged: pa.Table) -> None:
        """All of it in one commit; the files that have to be written again are written here, one after the other."""
        self.replace(staged, [rewrite(self.table, *touched) for touched in self.touched(staged)])

    def add(self, staged: pa.Table) -> None:
        """Files of new rows, in one commit."""
        self.lease.check()
        self.table.commit(files_of(staged, "new"), lease=self.lease.number)

    def touched(self, staged: pa.Table) -> list[Touched]:
        """The files that may hold rows which are to be replaced, each with the staged files that may replace them."""
        replacing = files_of(staged, "edited", "gone")
        if not replacing:
            return []
        partitions = self.table.partition_values({file.partition for file in replacing})
        pairs = [
            (file, [new for new in replacing if file.may_share_rows(new)]) for file in self.table.files(partitions)
        ]
        return [(file, news) for file, news in pairs if news]

    def replace(self, staged: pa.Table, rewritten: Sequence[Rewritten | None]) -> int:
        """What `rewrite` made of the touched files, and the staged files, in one commit; how many were rewritten."""
        n_rewritten = self.exchange(rewritten, files_of(staged, "new", "edited"))
        for file in files_of(staged, "gone"):
            self.table.discard(file)
        return n_rewritten

    def exchange(self, rewritten: Sequence[Rewritten | None], added: Sequence[DataFile] = ()) -> int:
        """Rewritten files in the place of the old ones, beside `added` ones, in one commit; returns how many."""
        self.lease.check()
        found = [pair for pair in rewritten if pair is not None]
        added = [*added, *(new for _, new in found if new is not None)]
        self.table.commit(added, [old for old, _ in found], lease=self.lease.number)
        return len(found)

    def remove_partition(self, value: str) -> int:
        """Takes all rows of a partition out, without reading them; returns how many."""
        self.lease.check()
        files = self.table.files(self.table.partition_values([value]))
        self.table.commit(remove=files, lease=self.lease.number)
        return sum(file.n_rows for file in files)

    def small_files(self, target_bytes: int) -> list[list[DataFile]]:
        """Groups of two files or more of one partition, with neighbouring keys, that `merge` makes one of."""
        ordered = sorted(self.table.files(), key=lambda file: (file.partition, sorted(file.span.items()), file.path))
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
        """Merged files in the place of those they were made of, in one commit that changes no row."""
        self.lease.check()
        removed = [old for olds, _ in merged for old in olds]
        self.table.commit([new for _, new in merged], removed, lease=self.lease.number, same_rows=True)

    def vacuum(self, *, keep_hours: int) -> int:
        """Deletes files that no version of the last hours has, and those never committed; returns how many."""
        self.lease.check()
        return len(self.table.vacuum(lease=self.lease.number, keep_hours=keep_hours))

    def erase_history(self) -> int:
        """Deletes every file, and every line of the log, that the newest version does not need; returns how many."""
        self.lease.check()
        number = self.lease.number
        return len(self.table.vacuum(lease=number, keep_hours=0)) + len(self.table.forget_log(lease=number))


def rewrite(table: Table, file: DataFile, replacing: Sequence[DataFile]) -> Rewritten | None:
    """The file without the rows whose keys are in the `replacing` files, as a new one; None where it has none of them.

    Keys are read first, and the rest only if a row has to go. The new file is None when no row is left.
    """
    names = [name for name in table.layout.key if name != table.layout.partition]
    going = pa.concat_arrays([key_strings(table.read_file(new, names)) for new in replacing])
    goes = pc.is_in(key_strings(table.read_file(file, names)), value_set=going)
    if not pc.any(goes).as_py():
        return None
    left = table.read_file(file).filter(pc.invert(goes))
    return file, table.write_file(left) if left.num_rows else None


def merge(table: Table, files: list[DataFile]) -> Merged:
    """One file with the rows of several of one partition, which nobody sees yet."""
    return files, table.write_file(pa.concat_tables(table.read_file(file) for file in files))


def key_strings(rows: pa.Table) -> pa.Array:
    """Keys of one or more columns as one string a row, the same for the same key only: parts follow their lengths."""
    parts = [rows[name].cast(pa.large_string()) for name in rows.column_names]
    sized = [part for text in parts for part in (pc.utf8_length(text).cast(pa.large_string()), text)]
    joined = pc.binary_join_element_wise(*sized, pa.scalar(":", pa.large_string()))
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined
