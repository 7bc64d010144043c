"""The BM25 retriever."""

import pytest

from persona.retrieval.ranking import best_texts, needs_vectors

TEXTS = ["the parser of trees", "a corpus of essays", "trees and more trees", "speech", "a corpus"]


def test_texts_with_the_rarest_words_of_the_query_come_first() -> None:
    assert best_texts(TEXTS, 2, "bm25", query="Trees?") == ["trees and more trees", "the parser of trees"]
    # One text contains "speech", two contain "corpus".
    assert best_texts(TEXTS, 1, "bm25", query="corpus of speech") == ["speech"]
    # Of two texts that contain the word once, the shorter one scores higher.
    assert best_texts(TEXTS, 2, "bm25", query="corpus") == ["a corpus", "a corpus of essays"]


@pytest.mark.parametrize("query", ["", "?!", "x"])
@pytest.mark.parametrize("texts", [[], ["..."], ["", "!"], [None, "word"], [None]])
def test_texts_and_queries_without_words_are_ranked_by_recency(texts: list[str | None], query: str) -> None:
    known = [text for text in texts if text is not None]
    assert best_texts(texts, 3, "bm25", query=query) == known[::-1]


def test_it_needs_no_vectors() -> None:
    assert not needs_vectors("bm25")
