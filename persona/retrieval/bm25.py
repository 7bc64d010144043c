"""The `bm25` retriever: texts that share rare words with the query."""

import bm25s
import numpy as np

from persona.retrieval.ranking import Candidates

NEEDS_VECTORS = False
_WORD = r"(?u)\w+"


def scores(candidates: Candidates) -> np.ndarray:
    """BM25 scores (N,), with word frequencies counted over the texts of this one user."""
    query_words, *words = bm25s.tokenize(
        [candidates.query, *candidates.texts], token_pattern=_WORD, stopwords=[], return_ids=False, show_progress=False
    )
    if not query_words or not any(words):
        # The library divides by the mean length of the texts and needs a query.
        return np.zeros(len(candidates.texts))
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    found: np.ndarray = index.get_scores(query_words)
    return found
