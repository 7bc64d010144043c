"""The dense retriever."""

import numpy as np
import pytest

from persona.retrieval.ranking import best_texts, needs_vectors

TEXTS = [None, "a corpus of essays", "trees and more trees", "speech", "a corpus"]
VECTORS = np.array([[1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6], [-1, 0]], np.float32)
QUERY = np.array([1, 0], np.float32)


def test_the_nearest_texts_come_first_and_unknown_ones_are_skipped() -> None:
    found = best_texts(TEXTS, 2, "dense", query="", query_d=QUERY, vectors_Nd=VECTORS)
    assert found == [TEXTS[3], TEXTS[1]]


def test_missing_vectors_are_refused() -> None:
    assert needs_vectors("dense")
    with pytest.raises(ValueError, match="expected one vector per text, got 2 vectors for 5 texts"):
        best_texts(TEXTS, 2, "dense", query="", query_d=QUERY, vectors_Nd=VECTORS[:2])
    for vectors in ({"query_d": QUERY}, {"vectors_Nd": VECTORS}):
        with pytest.raises(ValueError, match="dense retrieval needs the vector of the query and of each text"):
            best_texts(TEXTS, 2, "dense", query="", **vectors)
