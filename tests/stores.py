"""A store for a tiny encoder, rows for it, and how tests write them without Ray."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from persona.inputs import histories
from persona.inputs.histories import bucket_of, text_hash
from persona.inputs.place import PLACES
from persona.store.identity import Identity
from persona.store.store import Store
from persona.store.writer import Writer, rewrite

IDENTITY = Identity(
    encoder="tiny", revision="abc", fingerprint="f00d", width=4, pooling="mean", max_tokens=16, text_rule="text"
)
NASTY = ["it's", 'a "b"', "x/y", "{}", "é", "👍", " lead", "\\", "a\nb", "%20", "--", ";"]


def places_of_bucket(bucket: int) -> tuple[int, int]:
    """The range [low, high) of the places of a bucket."""
    return bucket * PLACES, (bucket + 1) * PLACES


def behaviors(*rows: tuple[str, str, str, int | None], n_buckets: int = 4) -> pa.Table:
    """(user_id, behavior_id, text, timestamp in microseconds) as a table of `histories.SCHEMA`."""
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
    """Add a vector that identifies the text: its length, four times."""
    texts = rows["text"].to_pylist()
    vectors = [None if text is None else np.full(4, len(text), "<f2").tobytes() for text in texts]
    return rows.append_column("vector", pa.array(vectors, pa.binary()))


def changed(rows: pa.Table, change: str) -> pa.Table:
    """Encoded rows, all with the same change."""
    return encode(rows).append_column("change", pa.array([change] * rows.num_rows, pa.string()))


def commit_staged(writer: Writer, staged: pa.Table) -> None:
    """Commit staged files in one commit, rewriting the files they touch in this process."""
    writer.replace(staged, [pair for touched in writer.touched(staged) for pair in rewrite(writer.table, *touched)])


def write_rows(store: Store, table: str, rows: pa.Table) -> None:
    """Stage and commit rows, as the jobs do with many workers."""
    if rows.num_rows:
        with store.writer(table, job="test") as writer:
            commit_staged(writer, store.stage(table, rows))


def refresh(store: Store, rows: pa.Table, *, sync: bool = False) -> dict[str, int]:
    """What `embed` does, without Ray or an encoder; returns the counts of behaviors of `Store.missing`."""
    total: dict[str, int] = {}
    for bucket in set(rows["bucket"].to_pylist()):
        in_bucket = rows.filter(pa.compute.equal(rows["bucket"], bucket))
        to_encode, counts = store.missing(bucket, in_bucket, absent=places_of_bucket(bucket) if sync else None)
        write_rows(store, "behaviors", encode(to_encode))
        del counts["store_bytes"]
        total = {name: total.get(name, 0) + n for name, n in counts.items()}
    return total


def everything(store: Store) -> list[tuple[str, str, float]]:
    """(user_id, behavior_id, first component of the vector) of all behaviors."""
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
    """Rows of the generations table. Each request's user has the request's id unless `users` is given."""
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
