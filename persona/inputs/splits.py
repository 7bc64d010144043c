"""Cut input files into splits that workers read independently."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from persona.inputs.files import Format, InputFiles, find_files
from persona.inputs.records import WHOLE_FILE, BadRows
from persona.inputs.table_files import Partitions
from persona.storage import FileEntry


@dataclass(frozen=True, kw_only=True)
class Split:
    """A byte range of a file; the lines that *start* in `[start, end)` belong to it.

    Parquet row groups are assigned as if they were equally long, because a broken footer may give wrong offsets.
    `size_bytes` is the size of the whole file when it was listed; `partitions` are columns that the file may lack.
    """

    uri: str
    start: int
    end: int
    format: Format
    size_bytes: int
    partitions: Partitions = ()

    @property
    def until(self) -> float:
        """The end of the range in bytes; unlimited for a file's last split, because the file may have grown."""
        return math.inf if self.end >= self.size_bytes else self.end

    def check_size(self, size_bytes: int) -> BadRows:
        """A reject if the file's size has changed since it was listed.

        It was replaced or is still being written. Other splits may have read the old content, so which rows are missing
        is unknown.
        """
        if size_bytes == self.size_bytes:
            return []
        sizes = f"{self.size_bytes:,} bytes when listed, {size_bytes:,} when read"
        return [(WHOLE_FILE, f"file changed during the run: {sizes}; the new content was read")]


def plan_splits(
    uri: str, *, flag: str, exclude: Sequence[str] | None = None, split_bytes: int = 64 * 2**20
) -> list[Split]:
    """Cut the files of the input `uri` into splits. Raises `InputError` as `find_files` does."""
    files = find_files(uri, flag=flag, exclude=exclude)
    return cut(files, files.formats, split_bytes=split_bytes)


def cut(files: InputFiles, chosen: Iterable[FileEntry], *, split_bytes: int = 64 * 2**20) -> list[Split]:
    """Splits of about `split_bytes` of some files of an input, in the input's order; a compressed file is one split."""
    return [split for file in sorted(chosen, key=lambda file: file.uri) for split in _cut_one(files, file, split_bytes)]


def _cut_one(files: InputFiles, file: FileEntry, split_bytes: int) -> Iterator[Split]:
    kind = files.formats[file]
    n_bytes = max(file.size_bytes, 1)
    step = split_bytes if kind in ("parquet", "jsonl") else n_bytes
    for start in range(0, n_bytes, step):
        yield Split(
            uri=file.uri,
            start=start,
            end=min(start + step, n_bytes),
            format=kind,
            size_bytes=file.size_bytes,
            partitions=files.partitions[file],
        )
