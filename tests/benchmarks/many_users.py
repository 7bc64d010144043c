"""Generated histories of any number of users, and an encoder that costs almost nothing, to measure the data path."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import embed
from persona.models.encoder import Encoded, TextEncoder

WIDTH = 384
"""Width of the vectors, that of MiniLM."""
_START_S = 1_700_000_000
_ROWS_PER_FILE = 250_000


class CheapEncoder(TextEncoder):
    """Encodes a text as a random projection of its hash, a unit vector of this width."""

    def __init__(self, width: int) -> None:
        self.projection = np.random.default_rng(0).standard_normal((16, width), dtype=np.float32)

    def encode(self, texts: Sequence[str], *, on_batch: Callable[[int], None] | None = None) -> Encoded:
        """Like `TextEncoder.encode`; counts characters as tokens."""
        from persona.inputs.histories import text_hash

        digests = text_hash(texts).to_pylist()
        raw = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 16)
        vectors = (raw.astype(np.float32) - 127.5) @ self.projection
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        n = sum(map(len, texts))
        if on_batch is not None:
            on_batch(len(texts))
        return Encoded(vectors=vectors.astype(np.float16), n_tokens=n, n_padded=n, tokenize_s=0.0)


class CheapEncode(embed.Encode):
    """The actor of `jobs.embed` with a `CheapEncoder`."""

    def __init__(self, config: embed.Config, identity: Any, tally: Any, n_threads: int, n_tokenizing: int) -> None:
        del config, n_threads, n_tokenizing
        self.encoder = CheapEncoder(identity.width)
        self.tally = tally
        self.idle_since = time.perf_counter()


def histories(n_users: int, n_each: int) -> Iterator[pa.Table]:
    """`n_each` behaviors of each user, in tables of about `_ROWS_PER_FILE` rows with whole users."""
    users_per_table = max(1, _ROWS_PER_FILE // n_each)
    for start in range(0, n_users, users_per_table):
        users = np.arange(start, min(start + users_per_table, n_users))
        user = np.repeat(users, n_each)
        number = np.tile(np.arange(n_each), len(users))
        name = pc.utf8_lpad(pa.array(user).cast(pa.string()), 9, "0")
        which = pa.array(number).cast(pa.string())
        subject = pa.array((user * 31 + number * 7) % 9973).cast(pa.string())
        yield pa.table(
            {
                "user_id": pc.binary_join_element_wise("user", name, "-"),
                "behavior_id": pc.binary_join_element_wise("b", which, ""),
                "text": pc.binary_join_element_wise("note", which, "of user", name, "about subject", subject, " "),
                "timestamp": pa.array((_START_S + number * 86_400) * 10**6).cast(pa.timestamp("us", "UTC")),
            }
        )


def write(folder: Path, tables: Iterator[pa.Table]) -> int:
    """Write each table as a Parquet file in `folder`; returns the number of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = 0
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number:05d}.parquet")
        rows += table.num_rows
    return rows
