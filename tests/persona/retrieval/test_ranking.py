"""Ranking retrieved texts: order, ties, unknown texts, and retrievers found by name."""

import sys
from types import ModuleType

import numpy as np
import pytest

from persona.errors import UsageError
from persona.retrieval.ranking import Candidates, best_texts, needs_vectors

TEXTS = ["the parser of trees", "a corpus of essays", "trees and more trees", "speech", "a corpus"]


def test_of_equally_good_texts_the_later_comes_first() -> None:
    assert best_texts(TEXTS, 2, "bm25", query="nothing like it") == ["a corpus", "speech"]
    assert best_texts(["cat one", "dog", "cat two"], 2, "bm25", query="cat") == ["cat two", "cat one"]


def test_a_retriever_is_found_by_its_name_and_gets_the_known_texts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Candidates] = []

    def scores(candidates: Candidates) -> np.ndarray:
        given.append(candidates)
        return np.array([len(text) for text in candidates.texts])

    module = ModuleType("persona.retrieval.longest")
    module.scores, module.NEEDS_VECTORS = scores, True
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vectors_Nd, query_d = np.eye(3, 2, dtype=np.float32), np.ones(2, np.float32)
    found = best_texts(["b", None, "long"], 3, "longest", query="q", query_d=query_d, vectors_Nd=vectors_Nd)
    assert found == ["long", "b"]
    assert needs_vectors("longest")
    [candidates] = given
    assert (candidates.texts, candidates.query) == (["b", "long"], "q")
    np.testing.assert_array_equal(candidates.vectors_Nd, vectors_Nd[[0, 2]])
    np.testing.assert_array_equal(candidates.query_d, query_d)


@pytest.mark.parametrize("name", ["unheard_of", "lookup"])
def test_a_name_that_is_no_retriever_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown name '{name}'"):
        best_texts(TEXTS, 2, name, query="")
