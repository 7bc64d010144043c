"""How next-token scores become answers: greedy, sampled, or by beams; who has finished leaves the batch.

`transformers.generate` goes on with every row until the last one has ended, runs the prompt once for each beam, and
draws all rows of a batch from one random stream. Here a finished row costs nothing more, the prompt runs once, and a
request gets the same answer in any batch. Scores, ties and the end of a search are those of `transformers.generate`.

Shapes: B requests, R rows that still run, k beams of each, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import TopPLogitsWarper

from persona.options import Decoding

_NEVER = -1e9


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Generated text; `finish_reason` is `stop` (the LLM ended it) or `length` (cut at `max_new_tokens`)."""

    text: str
    n_tokens: int
    finish_reason: Literal["stop", "length"]


class NextToken(Protocol):
    """An LLM that has read its prompts, and remembers what it has said to each."""

    def start(self) -> Tensor:
        """Scores (B, V) of the first token of each answer."""

    def step(self, tokens_R: Tensor) -> Tensor:
        """Scores (R, V) of the next token, after one token more of each row."""

    def keep(self, rows_R: Tensor) -> None:
        """Goes on with these rows, in this order; one may be there several times."""


class SeededSampling:
    """Sampling by the Gumbel-max trick: the arg max of log p + Gumbel noise is a draw from p.

    Each request has a random stream of its own, so that its draws do not depend on its neighbours. The streams are the
    device's, which draws other numbers than another kind of device: drawn on a CPU, a GPU would wait for them.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = decoding.sampling_temperature
        self.warper = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, scores_RV: Tensor, requests: Sequence[int]) -> Tensor:
        """Scores of rows that belong to these requests, to noisy ones whose arg max is the draw."""
        scores_RV = scores_RV.float() / self.temperature
        if self.warper is not None:
            scores_RV = self.warper(torch.empty(0), scores_RV)
        drawn_RV = torch.empty_like(scores_RV)
        for row_V, request in zip(drawn_RV, requests, strict=True):
            row_V.exponential_(generator=self.streams[request])
        return scores_RV - drawn_RV.log_()


def follow(
    llm: NextToken, *, max_new_tokens: int, eos_ids: Sequence[int], sampling: SeededSampling | None = None
) -> list[list[int]]:
    """The likeliest next token each time, or a drawn one; returns each request's tokens, its end included."""
    scores_RV = llm.start()
    requests = list(range(len(scores_RV)))
    said: list[list[int]] = [[] for _ in requests]
    ends = torch.tensor(sorted(eos_ids), device=scores_RV.device)
    for n_said in range(1, max_new_tokens + 1):
        if sampling is not None:
            scores_RV = sampling(scores_RV, requests)
        tokens_R = scores_RV.argmax(dim=-1)
        for request, token in zip(requests, tokens_R.tolist(), strict=True):
            said[request].append(token)
        goes_on = (~torch.isin(tokens_R, ends)).nonzero()[:, 0]
        if not len(goes_on) or n_said == max_new_tokens:
            break
        if len(goes_on) < len(requests):
            llm.keep(goes_on)
            requests = [requests[row] for row in goes_on.tolist()]
            tokens_R = tokens_R[goes_on]
        scores_RV = llm.step(tokens_R)
    return said


def search(llm: NextToken, *, beams: int, max_new_tokens: int, eos_ids: Sequence[int]) -> list[list[int]]:
    """Beam search for the answer with the greatest log-likelihood a token; returns each request's tokens.

    A request leaves as soon as its best running beam is no better than the worst of its k finished ones.
    """
    scores_RV = llm.start()
    n, device = len(scores_RV), scores_RV.device
    ends = torch.tensor(sorted(eos_ids), device=device)
    # So many that k of them go on even when every beam could end in every way.
    n_candidates = (len(eos_ids) + 1) * beams
    may_end_C = torch.arange(n_candidates, device=device) < beams  # the others are there so that k go on
    requests = list(range(n))
    found: list[list[int]] = [[] for _ in requests]
    running, finished = (_Beams.none(n, beams, max_new_tokens, device) for _ in range(2))
    running.scores_Rk[:, 0] = 0.0  # the k beams of a request are still alike: one of them stands for all
    llm.keep(torch.arange(n, device=device).repeat_interleave(beams))
    scores_RV = scores_RV.repeat_interleave(beams, dim=0)
    for n_said in range(1, max_new_tokens + 1):
        log_p_RkV = nn.functional.log_softmax(scores_RV.float(), dim=-1).view(len(requests), beams, -1)
        scores_RC, places_RC = (log_p_RkV + running.scores_Rk.unsqueeze(-1)).flatten(1).topk(n_candidates)
        parents_RC, tokens_RC = places_RC // log_p_RkV.shape[-1], places_RC % log_p_RkV.shape[-1]
        candidates = _Beams(running.take(parents_RC).tokens_RkT, scores_RC)
        candidates.tokens_RkT[:, :, n_said - 1] = tokens_RC

        ended_RC = torch.isin(tokens_RC, ends) | (n_said == max_new_tokens)
        best_Rk = (scores_RC + _NEVER * ended_RC).topk(beams).indices
        running = candidates.take(best_Rk)
        candidates.scores_Rk = torch.where(ended_RC & may_end_C, scores_RC / n_said, _NEVER)
        finished = finished.joined(candidates).best(beams)

        hopeful_R = running.scores_Rk[:, 0] / n_said > finished.scores_Rk[:, -1]
        goes_on = (hopeful_R & (n_said < max_new_tokens)).nonzero()[:, 0]
        for row in set(range(len(requests))) - set(goes_on.tolist()):
            found[requests[row]] = finished.tokens_RkT[row, 0].tolist()
        if not len(goes_on):
            break
        before_Rk = torch.arange(len(requests), device=device).unsqueeze(1) * beams + parents_RC.gather(1, best_Rk)
        llm.keep(before_Rk[goes_on].flatten())
        requests = [requests[row] for row in goes_on.tolist()]
        running, finished = running.rows(goes_on), finished.rows(goes_on)
        scores_RV = llm.step(running.tokens_RkT[:, :, n_said - 1].flatten())
    return found


@dataclass
class _Beams:
    """Beginnings of answers (R, k, T), filled from the left, and what they are worth (R, k)."""

    tokens_RkT: Tensor
    scores_Rk: Tensor

    @classmethod
    def none(cls, n: int, beams: int, length: int, device: torch.device) -> "_Beams":
        tokens_RkT = torch.zeros(n, beams, length, dtype=torch.long, device=device)
        return cls(tokens_RkT, torch.full((n, beams), _NEVER, device=device))

    def take(self, beams_Rk: Tensor) -> "_Beams":
        index_RkT = beams_Rk.unsqueeze(-1).expand(-1, -1, self.tokens_RkT.shape[-1])
        return _Beams(self.tokens_RkT.gather(1, index_RkT), self.scores_Rk.gather(1, beams_Rk))

    def best(self, beams: int) -> "_Beams":
        return self.take(self.scores_Rk.topk(beams).indices)

    def joined(self, others: "_Beams") -> "_Beams":
        tokens_RkT = torch.cat([self.tokens_RkT, others.tokens_RkT], dim=1)
        return _Beams(tokens_RkT, torch.cat([self.scores_Rk, others.scores_Rk], dim=1))

    def rows(self, rows: Tensor) -> "_Beams":
        return _Beams(self.tokens_RkT[rows], self.scores_Rk[rows])
