"""A store of a tiny encoder, rows for it, and how they get in without Ray."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from persona.inputs import histories
from persona.inputs.histories import bucket_of, text_hash
from persona.store.store import Identity, Store

IDENTITY = Identity(
    encoder="tiny", revision="abc", fingerprint="f00d", width=4, pooling="mean", max_tokens=16, text_rule="text"
)
NASTY = ["it's", 'a "b"', "x/y", "{}", "é", "👍", " lead", "\\", "a\nb", "%20", "--", ";"]


def behaviors(*rows: tuple[str, str, str, int | None], n_buckets: int = 4) -> pa.Table:
    """(user_id, behavior_id, text, timestamp in microseconds) as `histories.validate` gives them."""
    users, names, texts, times = zip(*rows, strict=True)
    columns = {
        "user_id": users,
        "behavior_id": names,
        "text": texts,
        "timestamp": pa.array(times, pa.timestamp("us", "UTC")),
        "bucket": bucket_of(users, n_buckets),
        "text_hash": text_hash(texts),
    }
    return pa.table(columns, schema=histories.SCHEMA)


def encode(rows: pa.Table) -> pa.Table:
    """A vector that tells its text: the text's length, four times."""
    texts = rows["text"].to_pylist()
    vectors = [None if text is None else np.full(4, len(text), "<f2").tobytes() for text in texts]
    return rows.append_column("vector", pa.array(vectors, pa.binary()))


def refresh(store: Store, rows: pa.Table, *, sync: bool = False) -> dict[str, int]:
    """What `embed` does, without Ray and without an encoder."""
    total: dict[str, int] = {}
    for bucket in set(rows["bucket"].to_pylist()):
        mine = rows.filter(pa.compute.equal(rows["bucket"], bucket))
        to_encode, counts = store.missing(bucket, mine, sync=sync)
        store.write("behaviors", encode(to_encode))
        total = {name: total.get(name, 0) + n for name, n in counts.items()}
    return total


def everything(store: Store) -> list[tuple[str, str, float]]:
    tables = [store.read_histories(bucket) for bucket in range(store.n_buckets)]
    return [
        (row["user_id"], row["behavior_id"], float(np.frombuffer(row["vector"], "<f2")[0]))
        for table in tables
        for row in table.to_pylist()
    ]


def answers(
    *ids: str,
    variant: str = "own",
    fingerprint: str = "f",
    output: str = "o",
    changes: Sequence[str] = (),
    users: Sequence[str] = (),
) -> pa.Table:
    """Rows of the generations table; a request is its user's, who has its name unless told otherwise."""
    n = len(ids)
    users = users or ids
    return pa.table(
        {
            "request_id": ids,
            "user_id": users,
            "output": [output] * n,
            "variant": [variant] * n,
            "plug": ["p"] * n,
            "llm": ["l"] * n,
            "n_behaviors": pa.array([1] * n, pa.int32()),
            "n_tokens": pa.array([2] * n, pa.int32()),
            "finish_reason": ["stop"] * n,
            "fingerprint": [fingerprint] * n,
            "bucket": bucket_of(users, 4),
            "change": list(changes) or ["new"] * n,
        }
    )
