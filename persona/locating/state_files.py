"""Hidden states as files: a part is a block of rows, with a Parquet file for each layer and one for its index.

    <folder>/hidden/layer=07/part-<digest>.parquet    group, row_id, label, block, rank, hidden
    <folder>/index/part-<digest>.parquet              the same rows without the states

The index is written last, so a part that has one is complete. The digest is that of the part's keys: a task that is
retried writes the same files again. In the file of a layer, each row group has the rows of one group.

Shapes: N rows, H states (blocks + 1), D LLM width.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from persona import storage

ROWS = pa.schema(
    [
        ("group", pa.string()),
        ("row_id", pa.string()),
        ("label", pa.int8()),  # null for a request
        ("block", pa.int64()),
        ("rank", pa.uint64()),
    ]
)
"""A row of a part: `group` and `row_id` are its key; `block` is that of `Sample`; rows are sampled by `rank`."""
KEY = pa.binary(16)
_GROUPS, _SHAPE = b"groups", b"shape"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A complete part: its name, and the number and width of its states."""

    name: str
    n_states: int
    width: int


def rows_of(
    groups: Sequence[str], row_ids: Sequence[str], labels: Sequence[int | None], owners: Sequence[str]
) -> pa.Table:
    """Rows (`ROWS`). Rows of one owner, such as a user, form a block; the rank depends on the row id alone."""
    columns = [groups, row_ids, labels, [_hash(one) >> 1 for one in owners], [_hash(one) for one in row_ids]]
    return pa.table([pa.array(values, field.type) for values, field in zip(columns, ROWS, strict=True)], schema=ROWS)


def keys_of(groups: Sequence[str], row_ids: Sequence[str]) -> pa.Array:
    """The key of each row as 16 bytes."""
    pairs = (f"{len(group)}:{group}{row_id}" for group, row_id in zip(groups, row_ids, strict=True))
    return pa.array([hashlib.blake2b(pair.encode(), digest_size=16).digest() for pair in pairs], KEY)


def write_part(folder: str, rows: pa.Table, hidden_NHD: NDArray[np.float32]) -> Part:
    """Write a part; several writers may do so for the same rows."""
    keys = sorted(keys_of(rows["group"].to_pylist(), rows["row_id"].to_pylist()).to_pylist())
    name = f"part-{hashlib.blake2b(b''.join(keys), digest_size=16).hexdigest()}.parquet"
    order = pc.sort_indices(rows, [("group", "ascending"), ("row_id", "ascending")])
    rows, hidden_NHD = rows.take(order), hidden_NHD[order.to_numpy()]
    _, n_states, width = hidden_NHD.shape
    names, starts = np.unique(rows["group"].to_numpy(zero_copy_only=False), return_index=True)
    ends = [*starts[1:], rows.num_rows]
    for layer in range(n_states):
        flat = pa.array(np.ascontiguousarray(hidden_NHD[:, layer]).ravel(), pa.float32())
        table = rows.append_column("hidden", pa.FixedSizeListArray.from_arrays(flat, width))
        schema = table.schema.with_metadata({_GROUPS: json.dumps(names.tolist())})
        with (
            storage.write_file(_layer_uri(folder, layer, name)) as path,
            pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=["group"]) as file,
        ):
            for start, end in zip(starts, ends, strict=True):
                file.write_table(table.slice(start, end - start), row_group_size=end - start)
    schema = rows.schema.with_metadata({_SHAPE: json.dumps([n_states, width])})
    with storage.write_file(storage.join(folder, "index", name)) as path:
        pq.write_table(rows.cast(schema), path)
    return Part(name=name, n_states=n_states, width=width)


def parts(folder: str) -> Iterator[tuple[Part, pa.Table]]:
    """The complete parts and their rows (`ROWS`), in the order of their names."""
    for entry in storage.list_files(storage.join(folder, "index"), (".parquet",)):
        table = storage.retried(partial(_read, entry.uri), f"cannot read {entry.uri}")
        n_states, width = json.loads(table.schema.metadata[_SHAPE])
        yield Part(name=entry.uri.rpartition("/")[2], n_states=n_states, width=width), table


def sample(
    folder: str, names: Sequence[str], *, layer: int, group: str, label: int | None, most: int
) -> tuple[pa.Table, NDArray[np.float32]]:
    """The rows of a group and label with the lowest ranks, at most `most`, and their states (n, D) in one layer.

    Holds these and the rows of one row group. Each key counts once.
    """
    kept: pa.Table | None = None
    for name in names:
        uri = _layer_uri(folder, layer, name)
        found = storage.retried(partial(_read_group, uri, group), f"cannot read {uri}")
        if found is None:
            continue
        if label is not None:
            found = found.filter(pc.equal(found["label"], label))
        kept = _lowest(found if kept is None else pa.concat_tables([kept, found]), most)
    if kept is None:
        return ROWS.empty_table(), np.empty((0, 0), np.float32)
    hidden = kept["hidden"].combine_chunks()
    hidden_ND = hidden.flatten().to_numpy().reshape(kept.num_rows, hidden.type.list_size)
    return kept.drop_columns(["hidden"]), hidden_ND


def _lowest(table: pa.Table, most: int) -> pa.Table:
    order = np.lexsort((table["row_id"].to_numpy(zero_copy_only=False).astype(str), table["rank"].to_numpy()))
    ids = table["row_id"].take(order).to_numpy(zero_copy_only=False)
    is_first = np.ones(len(ids), bool)
    is_first[1:] = ids[1:] != ids[:-1]
    return table.take(pa.array(order[is_first][:most]))


def _read_group(uri: str, group: str) -> pa.Table | None:
    filesystem, path = storage.open_filesystem(uri)
    with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as file:
        groups = json.loads(file.schema_arrow.metadata[_GROUPS])
        return file.read_row_group(groups.index(group)) if group in groups else None


def _read(uri: str) -> pa.Table:
    filesystem, path = storage.open_filesystem(uri)
    with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as file:
        return file.read()


def _layer_uri(folder: str, layer: int, name: str) -> str:
    return storage.join(folder, "hidden", f"layer={layer:03}", name)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
