"""Cut input files into splits that workers read independently."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from persona.errors import InputError
from persona.inputs.files import Format, InputFiles, find_files
from persona.inputs.records import WHOLE_FILE, BadRows


@dataclass(frozen=True, kw_only=True)
class Split:
    """A byte range of a file; the lines that *start* in `[start, end)` belong to it.

    Parquet row groups are assigned as if they were equally long, because a broken footer may give wrong offsets.
    `size_bytes` is the size of the whole file when it was listed.
    """

    uri: str
    start: int
    end: int
    format: Format
    size_bytes: int

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
    """Cut the files at or below `uri` into splits. Raises `InputError` as `find_files` and `cut` do."""
    return cut(find_files(uri, flag=flag, exclude=exclude), flag=flag, split_bytes=split_bytes)


def cut(files: InputFiles, *, flag: str, split_bytes: int = 64 * 2**20) -> list[Split]:
    """Splits of about `split_bytes`; a compressed file is one split.

    Raises `InputError`, naming `flag`, if all files are empty.
    """
    splits = []
    for file, kind in files.formats.items():
        step = split_bytes if kind in ("parquet", "jsonl") else max(file.size_bytes, 1)
        for start in range(0, max(file.size_bytes, 1), step):
            end = min(start + step, max(file.size_bytes, 1))
            splits.append(Split(uri=file.uri, start=start, end=end, format=kind, size_bytes=file.size_bytes))
    if not any(split.size_bytes for split in splits):
        raise InputError(f"{flag}: every file of the input is empty, the first is {splits[0].uri}")
    return splits
