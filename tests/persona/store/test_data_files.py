"""Data files: rows in order, written with one row group in memory."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from persona.inputs.histories import text_hash
from persona.store import data_files
from persona.store.schema import LAYOUTS

N_ROWS, VECTOR_BYTES = 100_000, 512


def test_a_file_is_written_in_order_with_one_row_group_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(N_ROWS)
    vectors = np.frombuffer(rng.bytes(N_ROWS * VECTOR_BYTES), f"S{VECTOR_BYTES}")
    columns = {
        "bucket": np.full(N_ROWS, 3),
        "user_id": [f"u{i // 100:04}" for i in order],
        "behavior_id": [f"b{i}" for i in order],
        "timestamp": order,
        "text_hash": text_hash([""]).take(pa.array(np.zeros(N_ROWS, int))),
        "vector": pa.FixedSizeBinaryArray.from_buffers(pa.binary(VECTOR_BYTES), N_ROWS, [None, pa.py_buffer(vectors)]),
        "embedded_at": order,
    }
    layout = LAYOUTS["behaviors"]
    rows = pa.table(
        {name: pa.array(columns[name]).cast(layout.schema.field(name).type) for name in layout.schema.names}
    )
    default = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(default)
    pa.set_memory_pool(counted)
    try:
        file = data_files.write(str(tmp_path), layout, rows)
    finally:
        pa.set_memory_pool(default)
    assert (counted.max_memory() or 0) < rows.nbytes / 2
    assert pq.read_metadata(tmp_path / file.path).num_row_groups == 7
    assert file.n_rows == N_ROWS and file.stats["user_id"] == ("u0000", "u0999")
    found = data_files.read(str(tmp_path), layout, file)
    assert found["timestamp"].cast(pa.int64()).to_pylist() == list(range(N_ROWS))
    expected = rows.take(pa.array(np.argsort(order)))["vector"].cast(pa.large_binary())
    assert found["vector"].combine_chunks() == expected.combine_chunks()
