"""The `recency` retriever: the latest texts, whatever the request is about."""

import numpy as np

from persona.retrieval.ranking import Candidates

NEEDS_VECTORS = False


def scores(candidates: Candidates) -> np.ndarray:
    """Equal scores (N,): of equally good texts, the later is ranked first."""
    return np.zeros(len(candidates.texts))
