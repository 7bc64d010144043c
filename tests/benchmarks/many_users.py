"""Made-up histories of any number of users, and an encoder that costs next to nothing: the rest is the data path."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import embed
from jobs.runtime.session import Threads
from persona.models.encoder import Encoded

WIDTH = 384
_START_S = 1_700_000_000
_ROWS_A_FILE = 250_000


class CheapEncoder:
    """A unit vector that depends on nothing but the text: its hash, thrown into d dimensions."""

    def __init__(self) -> None:
        self.throw = np.random.default_rng(0).standard_normal((16, WIDTH), dtype=np.float32)

    def encode(self, texts: list[str]) -> Encoded:
        """As `persona.models.encoder.TextEncoder.encode`; a token is a character."""
        from persona.inputs.histories import text_hash

        digests = text_hash(texts).to_pylist()
        raw = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 16)
        vectors = (raw.astype(np.float32) - 127.5) @ self.throw
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        n = sum(map(len, texts))
        return Encoded(vectors=vectors.astype(np.float16), n_tokens=n, n_padded=n, tokenize_s=0.0)


class CheapEncode(embed.Encode):
    """The actor of `embed` with that encoder."""

    def __init__(self, config: embed.Config, identity: Any, tally: Any, threads: Threads) -> None:
        del config, identity, threads
        self.may_be_alone = False
        self.encoder = CheapEncoder()  # type: ignore[assignment]
        self.tally = tally
        self.idle_since = time.perf_counter()


def histories(n_users: int, n_each: int, *, first: int = 0, edition: int = 0) -> Iterator[pa.Table]:
    """Behaviors of users `first` and on, some files' worth at a time; another `edition` has other texts."""
    users_at_once = max(1, _ROWS_A_FILE // n_each)
    for start in range(first, first + n_users, users_at_once):
        users = np.arange(start, min(start + users_at_once, first + n_users))
        user = np.repeat(users, n_each)
        number = np.tile(np.arange(n_each), len(users))
        name = pc.utf8_lpad(pa.array(user).cast(pa.string()), 9, "0")
        which = pa.array(number).cast(pa.string())
        words = pa.array((user * 31 + number * 7 + edition * 13) % 9973).cast(pa.string())
        text = pc.binary_join_element_wise("note", which, "of user", name, "about subject", words, str(edition), " ")
        yield pa.table(
            {
                "user_id": pc.binary_join_element_wise("user", name, "-"),
                "behavior_id": pc.binary_join_element_wise("b", which, ""),
                "text": text,
                "timestamp": pa.array((_START_S + number * 86_400) * 10**6).cast(pa.timestamp("us", "UTC")),
            }
        )


def write(folder: Path, tables: Iterator[pa.Table]) -> int:
    """Tables as Parquet files of a folder; returns how many rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = 0
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number:05d}.parquet")
        rows += table.num_rows
    return rows
