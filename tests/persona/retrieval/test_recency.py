"""The recency retriever."""

from persona.retrieval.ranking import best_texts, needs_vectors

TEXTS = ["the parser of trees", "a corpus of essays", "trees and more trees", "speech", "a corpus"]


def test_the_latest_text_comes_first() -> None:
    assert best_texts(TEXTS, 2, "recency", query="trees") == ["a corpus", "speech"]
    assert best_texts(TEXTS, 9, "recency", query="") == TEXTS[::-1]


def test_it_needs_no_vectors() -> None:
    assert not needs_vectors("recency")
