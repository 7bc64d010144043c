"""The user's own texts as a baseline, or beside the persona: which of them are put into the prompt.

The store has hashes, not texts. A text is taken only where its hash is the stored one, so that what is retrieved is
what was encoded.
"""

import pyarrow as pa


class TextLookup:
    """The texts of a bucket by behavior."""

    def __init__(self, texts: pa.Table) -> None:
        columns = (texts[name].to_pylist() for name in ("user_id", "behavior_id", "text_hash", "text"))
        self._texts = {(user, behavior, hashed): text for user, behavior, hashed, text in zip(*columns, strict=True)}

    def texts(self, rows: pa.Table) -> list[str | None]:
        """The texts of rows of the store (user_id, behavior_id, text_hash); None where there is none of that hash."""
        keys = zip(*(rows[name].to_pylist() for name in ("user_id", "behavior_id", "text_hash")), strict=True)
        return [self._texts.get(key) for key in keys]
