"""Finds the texts of stored behaviors in the histories.

The store holds hashes, not texts. A text is used only if its hash is the stored one, so what is retrieved is what was
encoded.
"""

import pyarrow as pa


class TextLookup:
    """The texts of a bucket, by behavior."""

    def __init__(self, texts: pa.Table) -> None:
        columns = (texts[name].to_pylist() for name in ("user_id", "behavior_id", "text_hash", "text"))
        self._texts = {(user, behavior, hashed): text for user, behavior, hashed, text in zip(*columns, strict=True)}

    def texts(self, rows: pa.Table) -> list[str | None]:
        """The text of each stored row (user_id, behavior_id, text_hash); None if there is none with its hash."""
        keys = zip(*(rows[name].to_pylist() for name in ("user_id", "behavior_id", "text_hash")), strict=True)
        return [self._texts.get(key) for key in keys]
