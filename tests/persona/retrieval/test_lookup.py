"""Texts of stored behaviors: only an unchanged text is used."""

import pyarrow as pa

from persona.retrieval.lookup import TextLookup


def test_a_text_is_used_only_with_the_stored_hash() -> None:
    columns = ("user_id", "behavior_id", "text_hash", "text")
    rows = [("u", "a", "1", "first"), ("u", "b", "2", "second"), ("v", "a", "3", "another's")]
    lookup = TextLookup(pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows]))
    stored = [("u", "b", "2"), ("u", "a", "edited since"), ("v", "b", "2"), ("v", "a", "3")]
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=False)) for row in stored])
    assert lookup.texts(table) == ["second", None, None, "another's"]
