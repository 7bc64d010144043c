"""Ranks a user's own texts for a request, to put the best ones in front of the prompt.

Without a plug, retrieval is the baseline that PPlug (arXiv 2409.11901) compares with; the two can be combined.

To add a retriever, write `persona/retrieval/NAME.py` as in `Retriever`, and add NAME to `persona.options.Retriever`.
Shapes: N texts, d encoder width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from persona import options
from persona.extensions import find


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The texts that a request may see, oldest first, and what to compare them with."""

    texts: Sequence[str]
    query: str
    query_d: np.ndarray | None
    """Vector of the query, for retrievers that need vectors."""
    vectors_Nd: np.ndarray | None
    """Vectors of the texts, likewise."""


class Retriever(Protocol):
    """What `persona/retrieval/NAME.py` defines."""

    NEEDS_VECTORS: bool

    def scores(self, candidates: Candidates) -> np.ndarray:
        """How well each text fits (N,); greater is better."""


def needs_vectors(retriever: options.Retriever) -> bool:
    """Whether a retriever compares vectors, which must then be read and passed to `best_texts`."""
    return _retriever(retriever).NEEDS_VECTORS


def best_texts(
    texts: Sequence[str | None],
    n: int,
    retriever: options.Retriever,
    *,
    query: str,
    query_d: np.ndarray | None = None,
    vectors_Nd: np.ndarray | None = None,
) -> list[str]:
    """Up to `n` of the texts that a request may see, the best first; of equally good ones, the later first.

    Args:
        texts: oldest first; None is an unknown text, which is skipped.
        n: how many to return.
        retriever: how to rank them.
        query: the request's query.
        query_d: its vector; only for retrievers that need vectors.
        vectors_Nd: the vectors of `texts`, likewise.

    Raises:
        UsageError: there is no such retriever.
        ValueError: the retriever needs vectors, and some are missing.
    """
    if vectors_Nd is not None and len(vectors_Nd) != len(texts):
        raise ValueError(f"expected one vector per text, got {len(vectors_Nd)} vectors for {len(texts)} texts")
    known = [i for i, text in enumerate(texts) if text is not None]
    words = [texts[i] or "" for i in known]
    known_vectors_Nd = None if vectors_Nd is None else vectors_Nd[known]
    scores = _retriever(retriever).scores(
        Candidates(texts=words, query=query, query_d=query_d, vectors_Nd=known_vectors_Nd)
    )
    order = sorted(range(len(known)), key=lambda i: (-scores[i], -i))
    return [words[i] for i in order[:n]]


def _retriever(name: str) -> Retriever:
    return cast(Retriever, find("persona.retrieval", name, required="scores"))
