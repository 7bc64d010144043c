"""The keys and contents that a store has in one bucket, read from the key indexes of its data files.

Shape suffix: N stored behaviors, sorted by place.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona.inputs.histories import KEY
from persona.inputs.place import digests, places_of
from persona.store import data_files, key_index
from persona.store.data_files import DataFile
from persona.store.schema import LAYOUTS

_LAYOUT = LAYOUTS["behaviors"]
_PARALLEL_READS = 16


@dataclass(frozen=True, kw_only=True)
class StoredKeys:
    """Stored behaviors of one bucket, as `key_index.ENTRIES`: some 40 bytes a behavior."""

    table_uri: str
    files: Sequence[DataFile]
    places_N: np.ndarray
    files_N: np.ndarray
    """The number of each behavior's file in `files`."""
    entries: pa.Table
    n_bytes: int
    """How many bytes were read."""

    def __len__(self) -> int:
        return len(self.places_N)

    def between(self, low: int, high: int) -> "StoredKeys":
        """Those whose place is in [low, high)."""
        start, end = np.searchsorted(self.places_N, np.array([low, high], np.uint64)).tolist()
        some = slice(start, end)
        entries = self.entries.slice(start, end - start)
        return replace(self, places_N=self.places_N[some], files_N=self.files_N[some], entries=entries)

    def keys(self, is_wanted_N: np.ndarray) -> tuple[pa.Table, int]:
        """user_id and behavior_id of some of them, read from their data files, and the bytes read."""
        found = [KEYS.empty_table()]
        n_read = 0
        for number in np.unique(self.files_N[is_wanted_N]).tolist():
            wanted = self.entries["digest"].filter(pa.array(is_wanted_N & (self.files_N == number)))
            rows, n_bytes = data_files.read_counted(self.table_uri, _LAYOUT, self.files[number], KEY)
            rows = rows.filter(_has_key(rows))
            found.append(rows.filter(pc.is_in(digests(rows), value_set=wanted.combine_chunks())))
            n_read += n_bytes
        return pa.concat_tables(found), n_read


KEYS = pa.schema([(name, pa.string()) for name in KEY])


@lru_cache(maxsize=1)  # a bucket may be compared in many windows, one after the other
def of_bucket(table_uri: str, bucket: int, n_buckets: int, files: tuple[DataFile, ...]) -> StoredKeys:
    """The stored behaviors of a bucket, which has these files in one version of the table."""
    read = _read(table_uri, files)
    entries = pa.concat_tables([key_index.ENTRIES.empty_table(), *(of_file for of_file, _ in read)])
    files_N = np.repeat(np.arange(len(files), dtype=np.int32), [of_file.num_rows for of_file, _ in read])
    places_N = places_of(entries["hash"].to_numpy(), bucket, n_buckets)
    order_N = np.argsort(places_N, kind="stable")
    return StoredKeys(
        table_uri=table_uri,
        files=files,
        places_N=places_N[order_N],
        files_N=files_N[order_N],
        entries=entries.drop_columns(["hash"]).take(pa.array(order_N)).combine_chunks(),
        n_bytes=sum(n_bytes for _, n_bytes in read),
    )


def digests_of(table_uri: str, files: Sequence[DataFile]) -> pa.Array:
    """The digests of the keys in these files."""
    return pa.concat_arrays(chunk for entries, _ in _read(table_uri, files) for chunk in entries["digest"].chunks)


def _read(table_uri: str, files: Sequence[DataFile]) -> list[tuple[pa.Table, int]]:
    """The entries of each file and the bytes read."""
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return list(pool.map(partial(_entries, table_uri), files))


def _entries(table_uri: str, file: DataFile) -> tuple[pa.Table, int]:
    """The entries of a file and the bytes read: from its index, or from the file itself if it has none."""
    indexed = key_index.read(table_uri, file.path, file.n_rows)
    if indexed is not None:
        return indexed
    rows, n_bytes = data_files.read_counted(table_uri, _LAYOUT, file, key_index.COLUMNS)
    return key_index.entries(rows.filter(_has_key(rows))), n_bytes


def _has_key(rows: pa.Table) -> pa.ChunkedArray:
    """Whether a row has both parts of the key, which other programs may have left out."""
    return pc.and_(*(rows[name].is_valid() for name in KEY))
