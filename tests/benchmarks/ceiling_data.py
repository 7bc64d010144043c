"""The requests and vectors of `tests.benchmarks.ceiling`, in one process without Ray.

Shapes: N behaviors, R requests, d encoder width.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.runtime import encoding
from persona.inputs import histories
from persona.inputs.histories import bucket_of, text_hash
from persona.models.encoder import TextEncoder
from persona.models.resolve import ModelFolder
from persona.options import PersonaKind, VectorOptions
from persona.store import vectors
from persona.store.join import join_histories
from persona.store.store import Store
from tests.benchmarks.authors import with_rejected

_BUCKETS = 16
_DRAWS = 2**31 - 1
_TYPICAL_REQUESTS, _TYPICAL_EACH = 128, 8
_ABSTRACT = "Write the title of the paper with this abstract.\n"
TASKS = ("next", "abstract")


def requests(acl: Path, *, task: str, train_rows: int, split: str, every: int) -> tuple[pa.Table, pa.Table]:
    """The training requests, a random sample, and every N-th request of the split with a column `rejected`.

    They are the requests of `tests.benchmarks.authors` with the same numbers. The task `next` asks for the author's
    next title, `abstract` for the title of an abstract.
    """
    train, held_out = (pq.read_table(acl / f"next_title_{name}.parquet") for name in ("train", split))
    drawn = np.random.default_rng(0).choice(train.num_rows, min(train_rows, train.num_rows), replace=False)
    held_out = with_rejected(held_out, pq.read_table(acl / f"which_{split}.parquet"), label=False)
    parts = train.take(np.sort(drawn)), held_out.take(np.arange(0, held_out.num_rows, every))
    if task == "next":
        return parts
    texts = pq.read_table(acl / "histories.parquet", columns=["user_id", "text"]).to_pylist()
    return _with_abstracts(parts[0], texts), _with_abstracts(parts[1], texts)


def _with_abstracts(rows: pa.Table, texts: Sequence[dict[str, str]]) -> pa.Table:
    """The requests with an input that has the abstract of the paper whose title is asked for."""
    titles: dict[str, set[str]] = {}
    for user, title in zip(rows["user_id"].to_pylist(), rows["target"].to_pylist(), strict=True):
        titles.setdefault(user, set()).add(title)
    found = {}
    for text in texts:
        begun = [title for title in titles.get(text["user_id"], ()) if text["text"].startswith(f"{title} ")]
        if begun:
            # A title may be the beginning of another.
            title = max(begun, key=len)
            found[text["user_id"], title] = text["text"].removeprefix(title).strip()
    pairs = zip(rows["user_id"].to_pylist(), rows["target"].to_pylist(), strict=True)
    inputs = pa.array([_ABSTRACT + found[pair] for pair in pairs])
    return rows.set_column(rows.column_names.index("input"), "input", inputs)


def embed(
    acl: Path, seen_by: Sequence[pa.Table], uri: Path, folder: ModelFolder, *, max_tokens: int
) -> tuple[Store, TextEncoder]:
    """The store with all behaviors that these requests see, and its encoder; what the store has is not encoded again.

    Behaviors of the other authors are left out, so another author's persona is that of one of these authors.
    """
    identity = encoding.identity_of(folder, VectorOptions(), max_tokens=max_tokens, precision="auto")
    store = Store.find(str(uri), identity, _BUCKETS) or Store.create(str(uri), identity, _BUCKETS)
    encoder = encoding.load_encoder(folder.name, folder.revision, identity, token_budget=None, precision="auto")
    behaviors = _behaviors(acl, seen_by)
    for bucket in range(_BUCKETS):
        missing, _ = store.missing(bucket, behaviors.filter(pc.equal(behaviors["bucket"], bucket)))
        if missing.num_rows:
            encoded = encoder.encode(missing["text"].to_pylist()).vectors
            staged = store.stage("behaviors", missing.append_column("vector", vectors.to_column(encoded)))
            with store.writer("behaviors", job="tests.benchmarks.ceiling") as writer:
                writer.add(staged)
            print(f"encoded {missing.num_rows} behaviors of bucket {bucket + 1} of {_BUCKETS}", flush=True)
    return Store.open(str(uri)), encoder


def _behaviors(acl: Path, seen_by: Sequence[pa.Table]) -> pa.Table:
    """The behaviors that some request sees, as `histories.SCHEMA`."""
    latest: dict[str, int] = {}
    for table in seen_by:
        for user, as_of in zip(table["user_id"].to_pylist(), table["as_of"].cast(pa.int64()).to_pylist(), strict=True):
            latest[user] = max(latest.get(user, as_of), as_of)
    rows = pq.read_table(acl / "histories.parquet")
    pairs = zip(rows["user_id"].to_pylist(), rows["timestamp"].cast(pa.int64()).to_pylist(), strict=True)
    rows = rows.filter(pa.array([time < latest.get(user, time) for user, time in pairs]))
    bucket = pa.array(bucket_of(rows["user_id"].combine_chunks(), _BUCKETS))
    columns = {name: rows[name] for name in rows.column_names}
    return pa.table({**columns, "bucket": bucket, "text_hash": text_hash(rows["text"].to_pylist())}).cast(
        histories.SCHEMA
    )


def joined(rows: pa.Table, store: Store, personas: Sequence[PersonaKind], *, max_behaviors: int) -> pa.Table:
    """The requests with the history that each sees under each kind of persona, and the kind in the column `persona`."""
    buckets = bucket_of(rows["user_id"].combine_chunks(), store.n_buckets)
    parts = []
    for persona in personas:
        for bucket in np.unique(buckets).tolist():
            part = rows.filter(pa.array(buckets == bucket))
            part = join_histories(part, store, bucket, persona=persona, max_behaviors=max_behaviors)
            parts.append(part.append_column("persona", pa.array([persona.value] * part.num_rows)))
    return pa.concat_tables(parts).combine_chunks()


def typical_behaviors(train: pa.Table, width: int) -> np.ndarray:
    """Vectors (N, d) of behaviors that some of the joined training requests see, the same as `jobs.train` takes."""
    ids = train["request_id"].to_pylist()
    is_drawn = bucket_of([f"draw {name}" for name in ids], _DRAWS) < _TYPICAL_REQUESTS / len(ids) * _DRAWS
    found = []
    for row in sorted(train.filter(pa.array(is_drawn)).to_pylist(), key=lambda row: row["request_id"]):
        seen_Nd = vectors.from_bytes(row["history"], width)
        found.append(seen_Nd[np.linspace(0, len(seen_Nd) - 1, min(len(seen_Nd), _TYPICAL_EACH)).astype(int)])
    return np.concatenate(found)


def seen_behaviors(train: pa.Table, width: int) -> np.ndarray:
    """Vectors (N, d) of all behaviors that the joined training requests see, user after user, each once."""
    longest: dict[str, bytes] = {}
    for user, history in zip(train["user_id"].to_pylist(), train["history"].to_pylist(), strict=True):
        # Histories of one user are the same behaviors up to different times.
        longest[user] = max(history, longest.get(user, b""), key=len)
    return np.concatenate([vectors.from_bytes(history, width) for _, history in sorted(longest.items())])


def title_vectors(rows: pa.Table, encoder: TextEncoder, typical_Nd: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """A column `history` with the vector of each row's title, and one with that vector near the typical behavior.

    It is then as far from there as the mean of a history, on average over the rows.
    """
    center_d = typical_Nd.astype(np.float32).mean(0)
    histories = [vectors.from_bytes(history, len(center_d)) for history in rows["history"].to_pylist()]
    means_Rd = np.stack([history.astype(np.float32).mean(0) for history in histories])
    titles_Rd = encoder.encode(rows["target"].to_pylist()).vectors.astype(np.float32)
    share = np.linalg.norm(means_Rd - center_d, axis=1).mean() / np.linalg.norm(titles_Rd - center_d, axis=1).mean()
    near_Rd = center_d + share * (titles_Rd - center_d)
    told, near = (pa.array([vectors.to_bytes(one) for one in each], pa.large_binary()) for each in (titles_Rd, near_Rd))
    return told, near
