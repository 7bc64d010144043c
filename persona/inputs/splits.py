"""Cut input files into splits that workers read independently."""

import math
from dataclasses import dataclass
from typing import Literal

from persona.errors import InputError
from persona.inputs.records import WHOLE_FILE, BadRows
from persona.storage import list_files

Format = Literal["parquet", "jsonl", "jsonl.gz"]
_JSONL = (".jsonl", ".json", ".jsonlines", ".ndjson")
_FORMATS: dict[str, Format] = {".parquet": "parquet"}
_FORMATS.update(dict.fromkeys(_JSONL, "jsonl"))
_FORMATS.update({f"{name}.gz": "jsonl.gz" for name in _JSONL})


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


def plan_splits(uri: str, *, flag: str, split_bytes: int = 64 * 2**20) -> list[Split]:
    """Cut the files at or below `uri` into splits of about `split_bytes`; a compressed file is one split.

    Raises `InputError`, naming `flag`, if there is nothing to read or a file of unknown type.
    """
    files = list_files(uri, tuple(_FORMATS))
    known = ", ".join(sorted(_FORMATS))
    if not files:
        raise InputError(f"{flag}: {uri} has no file to read; file names must end in one of {known}")
    splits = []
    for file in files:
        kind = next((kind for end, kind in _FORMATS.items() if file.uri.endswith(end)), None)
        if kind is None:
            raise InputError(f"{flag}: {file.uri} has an unknown type; its name must end in one of {known}")
        step = max(file.size_bytes, 1) if kind == "jsonl.gz" else split_bytes
        for start in range(0, max(file.size_bytes, 1), step):
            end = min(start + step, max(file.size_bytes, 1))
            splits.append(Split(uri=file.uri, start=start, end=end, format=kind, size_bytes=file.size_bytes))
    if all(file.size_bytes == 0 for file in files):
        raise InputError(f"{flag}: every file at {uri} is empty")
    return splits
