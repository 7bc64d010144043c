"""Read the lines of a JSONL split; a line that is not a JSON object becomes a reject."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
import pyarrow as pa

from persona.errors import StorageError
from persona.inputs.json_columns import MAX_CELLS, MAX_KEYS, json_array, kind_of
from persona.inputs.lines import read_lines
from persona.inputs.records import (
    MAX_BATCH_BYTES,
    WHOLE_FILE,
    BadRows,
    Part,
    first_line,
    selected,
    too_long,
    with_location,
)
from persona.inputs.splits import Split
from persona.storage import open_filesystem

_HINT = "; write each object of a list as a line of its own"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _Batch:
    """Rows and rejects until there are enough to hand on."""

    def __init__(self) -> None:
        self.objects: list[dict[str, Any]] = []
        self.offsets: list[int] = []
        self.bad: BadRows = []
        self._names: set[str] = set()
        self._n_bytes = 0

    def add(self, offset: int, line: bytes) -> None:
        self._n_bytes += len(line)
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            self.bad.append((offset, f"line is not JSON: {error.msg}"))
            return
        if not isinstance(value, dict):
            self.bad.append(
                (offset, f"line is {kind_of(value)}, not an object{_HINT if isinstance(value, list) else ''}")
            )
        elif len(value) > MAX_KEYS:
            self.bad.append((offset, f"line has more than {MAX_KEYS:,} keys"))
        else:
            self.objects.append(value)
            self.offsets.append(offset)
            self._names.update(value)

    def is_full(self, max_rows: int) -> bool:
        """Whether it has enough rows, bytes or cells; many cells if every line has different keys."""
        n_rows, n_cells = len(self.objects) + len(self.bad), len(self.objects) * len(self._names)
        return n_rows >= max_rows or self._n_bytes >= MAX_BATCH_BYTES or n_cells >= MAX_CELLS

    def table(self, source: str, columns: Sequence[str] | None) -> pa.Table:
        names = selected(dict.fromkeys(name for record in self.objects for name in record), columns)
        table = pa.table({name: json_array([record.get(name) for record in self.objects]) for name in names})
        return with_location(table, source, self.offsets)


def read_jsonl(split: Split, max_rows: int, columns: Sequence[str] | None, max_row_bytes: int) -> Iterator[Part]:
    """The rows of a split. Raises `StorageError` if the store fails."""
    batch = _Batch()
    file_rejects: BadRows = []
    try:
        for offset, line in _lines(split, file_rejects, max_row_bytes):
            if line is None:
                batch.bad.append((offset, too_long("line", max_row_bytes)))
            else:
                batch.add(offset, line)
            if batch.is_full(max_rows):
                yield Part(batch.table(split.uri, columns), batch.bad)
                batch = _Batch()
    except (EOFError, zlib.error) as error:
        file_rejects.append((WHOLE_FILE, f"file cannot be read to its end: {first_line(error)}"))
    except OSError as error:
        raise StorageError(f"cannot read {split.uri}: {error}") from error
    bad = batch.bad + file_rejects
    if batch.objects or bad:
        yield Part(batch.table(split.uri, columns), bad)


def _lines(split: Split, file_rejects: BadRows, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """The non-blank lines that start within the split, as `read_lines` yields them.

    A problem with the file as a whole is added to `file_rejects`.
    """
    filesystem, path = open_filesystem(split.uri)
    with filesystem.open_input_file(path) as raw:
        file_rejects += split.check_size(raw.size())
        lines = read_lines(raw, split.format, start=split.start, until=split.until, max_bytes=max_bytes)
        for offset, line in lines:
            content = line if line is None or offset else line.removeprefix(_BYTE_ORDER_MARK)
            if content is None or (content := content.strip()):
                yield offset, content
