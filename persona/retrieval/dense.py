"""The `dense` retriever: texts whose vectors are nearest to the query's, by the store's encoder."""

import numpy as np

from persona.retrieval.ranking import Candidates

NEEDS_VECTORS = True


def scores(candidates: Candidates) -> np.ndarray:
    """Dot products (N,) of the texts' vectors and the query's. Raises ValueError without vectors."""
    if candidates.vectors_Nd is None or candidates.query_d is None:
        raise ValueError("dense retrieval needs the vector of the query and of each text")
    found: np.ndarray = candidates.vectors_Nd @ candidates.query_d
    return found
