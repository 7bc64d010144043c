"""What the matrix asks of every LLM: requests whose soft tokens are words, so that plain token ids say the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request. `soft_ids` are words whose embeddings take the places of the soft tokens."""

    input: str
    target: str
    soft_ids: Sequence[int] = ()
    texts: Sequence[str] = ()

    def bare(self) -> "Request":
        """The input alone."""
        return replace(self, soft_ids=(), texts=())

    def without_texts(self) -> "Request":
        """Soft tokens and input."""
        return replace(self, texts=())


def sample_requests(word_ids: Sequence[int], n_soft: int = 3) -> list[Request]:
    """Three requests of different lengths in all their parts; one has no texts in front."""
    drawn = torch.randperm(len(word_ids), generator=torch.Generator().manual_seed(0))[: 3 * n_soft].tolist()
    soft_ids = [[word_ids[i] for i in drawn[row * n_soft : (row + 1) * n_soft]] for row in range(3)]
    return [
        Request(input="the movie is", target="like", soft_ids=soft_ids[0], texts=["i like it"]),
        Request(
            input="a paper and a title of the review of the movie",
            target="it is a rating",
            soft_ids=soft_ids[1],
            texts=["review of the movie", "like it"],
        ),
        Request(input="a title", target="the paper", soft_ids=soft_ids[2]),
    ]
