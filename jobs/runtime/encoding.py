"""The encoder of a store: its identity, how workers load it, and how behaviors become vectors."""

import time
from typing import TYPE_CHECKING

from persona.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

    from persona.models.encoder import Encoded, TextEncoder
    from persona.models.resolve import ModelFolder
    from persona.options import Precision, VectorOptions
    from persona.store.identity import Identity

_TEXT_RULE = "text as given, cut to max_tokens"


def identity_of(
    encoder: "ModelFolder", options: "VectorOptions", *, max_tokens: int, precision: "Precision"
) -> "Identity":
    """What a store records of its encoder. Raises InputError and UsageError as `encoder_settings.settle` does."""
    from persona.models.encoder_settings import settle
    from persona.store.identity import Identity

    settings = settle(encoder, options, max_tokens=max_tokens, precision=precision)
    return Identity(
        encoder=encoder.name,
        revision=encoder.revision,
        fingerprint=encoder.fingerprint,
        width=settings.width,
        pooling=settings.pooling,
        max_tokens=settings.max_tokens,
        text_rule=_TEXT_RULE,
        document_prompt=settings.prompt,
    )


def load_encoder(
    name: str, revision: str, identity: "Identity", *, token_budget: int | None, precision: "Precision"
) -> "TextEncoder":
    """The encoder on this node. Raises InputError if it is another model than where the job was started."""
    from persona.models import resolve as models
    from persona.models.encoder import TextEncoder

    folder = models.resolve(name, revision=revision, flag="--encoder")
    if folder.fingerprint != identity.fingerprint:
        raise InputError(
            f"--encoder {name!r} has fingerprint {folder.fingerprint[:12]} on this node, but "
            f"{identity.fingerprint[:12]} where the job was started; pin it with --revision, or give every node the "
            "same folder"
        )
    return TextEncoder(
        folder,
        pooling=identity.pooling,
        max_tokens=identity.max_tokens,
        prompt=identity.document_prompt,
        width=identity.width,
        token_budget=token_budget,
        precision=precision,
    )


def encode(
    encoder: "TextEncoder", behaviors: "pa.Table", *, tell: "Callable[[int], None]"
) -> "tuple[pa.BinaryArray, Encoded]":
    """A column of vectors, 2·d bytes of little-endian float16 each and null where there is no text.

    Also returns what the encoder returned for the behaviors that have a text. `tell` hears how many of them are done:
    once a second at most, since a GPU does hundreds of batches in that time, and at the end.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from persona.store import vectors

    has_text = behaviors["text"].is_valid()
    texts = behaviors["text"].filter(has_text).to_pylist()
    encoded = encoder.encode(texts, on_batch=_once_a_second(tell, len(texts)))
    column = vectors.to_column(encoded.vectors)
    if len(texts) < behaviors.num_rows:
        number = pc.cumulative_sum(has_text.cast(pa.int64()))  # of texts up to each row
        column = column.take(pc.if_else(has_text, pc.subtract(number, 1), None).combine_chunks())
    return column, encoded


def _once_a_second(tell: "Callable[[int], None]", n_all: int) -> "Callable[[int], None]":
    told_at = time.perf_counter()

    def on_batch(n_done: int) -> None:
        nonlocal told_at
        if n_done == n_all or time.perf_counter() - told_at >= 1:
            tell(n_done)
            told_at = time.perf_counter()

    return on_batch
