"""Which of a user's texts are retrieved: the latest, the best by words, the nearest; and only those that are known."""

import numpy as np
import pyarrow as pa
import pytest

from persona.retrieval.ranking import TextLookup, best_texts

TEXTS = ["the parser of trees", "a corpus of essays", "trees and more trees", "speech", "a corpus"]


def test_recency_takes_the_latest_first() -> None:
    assert best_texts(TEXTS, 2, "recency", query="trees") == ["a corpus", "speech"]
    assert best_texts(TEXTS, 9, "recency", query="") == TEXTS[::-1]


def test_bm25_takes_those_with_the_rarest_words_of_the_query() -> None:
    assert best_texts(TEXTS, 2, "bm25", query="Trees?") == ["trees and more trees", "the parser of trees"]
    # "speech" stands in one text, "corpus" in two.
    assert best_texts(TEXTS, 1, "bm25", query="corpus of speech") == ["speech"]
    # Of two that have the word once, the shorter one is more about it.
    assert best_texts(TEXTS, 2, "bm25", query="corpus") == ["a corpus", "a corpus of essays"]


def test_of_equals_the_later_is_better() -> None:
    assert best_texts(TEXTS, 2, "bm25", query="nothing like it") == ["a corpus", "speech"]
    assert best_texts(["cat one", "dog", "cat two"], 2, "bm25", query="cat") == ["cat two", "cat one"]


@pytest.mark.parametrize("query", ["", "?!", "x"])
@pytest.mark.parametrize("texts", [[], ["..."], ["", "!"], [None, "word"], [None]])
def test_texts_and_queries_without_a_word_break_nothing(texts: list[str | None], query: str) -> None:
    known = [text for text in texts if text is not None]
    assert best_texts(texts, 3, "bm25", query=query) == known[::-1]


def test_dense_takes_the_nearest_and_skips_the_unknown() -> None:
    vectors_Nd = np.array([[1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6], [-1, 0]], np.float32)
    query_d = np.array([1, 0], np.float32)
    texts = [None, *TEXTS[1:]]
    found = best_texts(texts, 2, "dense", query="", query_d=query_d, vectors_Nd=vectors_Nd)
    assert found == [TEXTS[3], TEXTS[1]]
    with pytest.raises(ValueError, match="dense retrieval needs"):
        best_texts(texts, 2, "dense", query="", query_d=query_d, vectors_Nd=vectors_Nd[:2])


def test_a_text_counts_only_with_the_stored_hash() -> None:
    columns = ("user_id", "behavior_id", "text_hash", "text")
    rows = [("u", "a", "1", "first"), ("u", "b", "2", "second"), ("v", "a", "3", "another's")]
    lookup = TextLookup(pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows]))
    stored = [("u", "b", "2"), ("u", "a", "edited since"), ("v", "b", "2"), ("v", "a", "3")]
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=False)) for row in stored])
    assert lookup.texts(table) == ["second", None, None, "another's"]
