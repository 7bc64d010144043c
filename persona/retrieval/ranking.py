"""The user's own texts in front of the prompt: the baseline of PAPER section 3 and, beside the persona, its equation r.

The store has hashes, not texts. A text is taken only where its hash is the stored one, so that what is retrieved is
what was encoded, and only behaviors that the request may see are searched. Shapes: N texts, d encoder width.
"""

from collections.abc import Sequence

import bm25s
import numpy as np
import pyarrow as pa

from persona.options import Retriever

_WORD = r"(?u)\w+"


class TextLookup:
    """The texts of a bucket by behavior."""

    def __init__(self, texts: pa.Table) -> None:
        columns = (texts[name].to_pylist() for name in ("user_id", "behavior_id", "text_hash", "text"))
        self._texts = {(user, behavior, hashed): text for user, behavior, hashed, text in zip(*columns, strict=True)}

    def texts(self, rows: pa.Table) -> list[str | None]:
        """The texts of rows of the store (user_id, behavior_id, text_hash); None where there is none of that hash."""
        keys = zip(*(rows[name].to_pylist() for name in ("user_id", "behavior_id", "text_hash")), strict=True)
        return [self._texts.get(key) for key in keys]


def best_texts(
    texts: Sequence[str | None],
    n: int,
    retriever: Retriever,
    *,
    query: str,
    query_d: np.ndarray | None = None,
    vectors_Nd: np.ndarray | None = None,
) -> list[str]:
    """Up to `n` of a request's visible texts (oldest first, None is unknown), the best first.

    `recency` takes the latest, `bm25` those with the words of `query`, `dense` those whose vectors have the largest
    product with that of the query, for which both must be given. Of equals the later one is better.
    """
    known = [i for i, text in enumerate(texts) if text is not None]
    words = [texts[i] or "" for i in known]
    if retriever == "dense":
        if vectors_Nd is None or query_d is None or len(vectors_Nd) != len(texts):
            raise ValueError("dense retrieval needs the vector of the query and one of each text")
        scores = vectors_Nd[known] @ query_d
    elif retriever == "bm25":
        scores = _bm25(words, query)
    else:
        scores = np.zeros(len(known))
    order = sorted(range(len(known)), key=lambda i: (-scores[i], -i))
    return [words[i] for i in order[:n]]


def _bm25(texts: Sequence[str], query: str) -> np.ndarray:
    """How well each text fits the words of the query, among the texts of this one user."""
    asked, *split = bm25s.tokenize(
        [query, *texts], token_pattern=_WORD, stopwords=[], return_ids=False, show_progress=False
    )
    if not asked or not any(split):
        return np.zeros(len(texts))  # the library divides by the mean length, and wants a word
    index = bm25s.BM25()
    index.index(split, show_progress=False)
    scores: np.ndarray = index.get_scores(asked)
    return scores
