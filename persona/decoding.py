"""What an answer is, and sampling in which a request gets the same answer in any batch.

Shapes: B requests, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from persona.options import Decoding


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Generated text; `finish_reason` is `stop` (the LLM ended it) or `length` (cut at `max_new_tokens`)."""

    text: str
    n_tokens: int
    finish_reason: Literal["stop", "length"]


class SeededSampling(LogitsProcessor):
    """Sampling by the Gumbel-max trick: the arg max of log p + Gumbel noise is a draw from p.

    `transformers.generate` has one random stream for the whole batch, so that a row's draw depends on its neighbours.
    Here each row has a stream of its own, and generation itself is greedy.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int]) -> None:
        self.temperature = decoding.sampling_temperature
        self.warper = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities (B, V) to noisy ones whose arg max is the draw."""
        scores_BV = scores.float() / self.temperature
        if self.warper is not None:
            scores_BV = self.warper(input_ids, scores_BV)
        noise = [-torch.empty(scores.shape[-1]).exponential_(generator=stream).log() for stream in self.streams]
        return scores_BV + torch.stack(noise).to(scores.device)
