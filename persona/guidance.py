"""Answers that say more of what the user's history changes: classifier-free guidance (Sanchez et al., 2306.17806).

The LLM is asked twice, under the user's persona and under nobody's, and goes further in the direction from the one to
the other: log p = log p_nobody + scale · (log p_own - log p_nobody), up to a constant. Greedy answers need it most: the
likeliest words are the same for many users even where their probabilities are not.

Shapes: R rows that run, V vocabulary.
"""

import torch
from torch import Tensor, nn

from persona.decoding import NextToken


class Guided:
    """A `NextToken` of R rows, out of one of 2R: first all rows as they are, then the same rows for nobody."""

    def __init__(self, llm: NextToken, scale: float) -> None:
        self.llm = llm
        self.scale = scale
        self.n_rows = 0

    def start(self) -> Tensor:
        """Guided scores (B, V) of the first token of each answer."""
        scores_BV = self._guided(self.llm.start())
        self.n_rows = len(scores_BV)
        return scores_BV

    def step(self, tokens_R: Tensor) -> Tensor:
        """Guided scores (R, V) of the next token, after one token more of each row, the same for nobody."""
        return self._guided(self.llm.step(tokens_R.repeat(2)))

    def keep(self, rows_R: Tensor) -> None:
        """Goes on with these rows, in this order; one may be there several times."""
        self.llm.keep(torch.cat([rows_R, rows_R + self.n_rows]))
        self.n_rows = len(rows_R)

    def _guided(self, scores: Tensor) -> Tensor:
        own_RV, nobodys_RV = nn.functional.log_softmax(scores.float(), dim=-1).chunk(2)
        return nobodys_RV + self.scale * (own_RV - nobodys_RV)
