"""How well an encoder alone, without any LLM, tells an author's title from another one by its similarity to a history.

Shapes: N behaviors of a history, R requests, d encoder width.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from persona.evaluation.intervals import Interval, bootstrap
from persona.inputs.histories import bucket_of
from persona.models.encoder import TextEncoder
from persona.store import vectors
from persona.store.join import seen_rows
from persona.store.store import Store

_TITLES = re.compile(r'\[1\]: "(.*)" \[2\]: "(.*)"$', re.DOTALL)


def candidates(question: str, target: str) -> tuple[str, str]:
    """The author's title and the other title of a `which` question."""
    found = _TITLES.search(question)
    if found is None:
        raise SystemExit(f"no two titles in {question!r}")
    return (found[1], found[2]) if target == "[1]" else (found[2], found[1])


def rank(
    requests: pa.Table, titles: Sequence[tuple[str, str]], store: Store, encoder: TextEncoder, *, max_behaviors: int
) -> dict[str, Interval]:
    """By method, how often the first of each request's two titles is more similar to the history than the second."""
    buckets = bucket_of(requests["user_id"].combine_chunks(), store.n_buckets)
    right: defaultdict[str, list[bool]] = defaultdict(list)
    users: list[str] = []
    for bucket in np.unique(buckets).tolist():
        numbers = np.flatnonzero(buckets == bucket)
        part = requests.take(numbers)
        histories = seen_rows(part, store, bucket, max_behaviors=max_behaviors, with_vectors=True)
        both = [title for number in numbers for title in titles[number]]
        titles_R2d = encoder.encode(both).vectors.reshape(len(numbers), 2, -1).astype(np.float32)
        for pair_2d, history in zip(titles_R2d, histories, strict=True):
            behaviors_Nd = vectors.from_column(history["vector"], pair_2d.shape[1]).astype(np.float32)
            for method, similarity_2 in _similarities(behaviors_Nd, pair_2d).items():
                right[method].append(bool(similarity_2[0] > similarity_2[1]))
        users += part["user_id"].to_pylist()
    return {method: bootstrap(values, users) for method, values in right.items()}


def _similarities(behaviors_Nd: np.ndarray, titles_2d: np.ndarray) -> dict[str, np.ndarray]:
    """The similarity of a history, oldest behavior first, to two titles by each method."""
    cosines_N2 = behaviors_Nd @ titles_2d.T
    recency_N = 1 / np.arange(len(behaviors_Nd), 0, -1)
    return {
        "mean": cosines_N2.mean(0),
        "mean by recency": np.average(cosines_N2, axis=0, weights=recency_N),
        "nearest": cosines_N2.max(0),
    }
