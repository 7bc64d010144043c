"""Search algorithms that turn next-token scores into answers: greedy, sampling, beam search.

`transformers.generate` keeps every row until the last one has ended, runs the prompt once per beam, and draws all rows
of a batch from one random stream. Here finished rows leave the batch, the prompt runs once, and a request gets the same
answer in any batch. Scores, ties, rules and stopping are those of `transformers.generate`.

Shapes: B requests, R running rows, k beams of a request, C candidates of a request, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import TopPLogitsWarper

from persona.engines.rules import AnswerRules
from persona.options import Decoding

_NEVER = -1e9


class DecodingSteps(Protocol):
    """An LLM that holds its prompts and what it has generated for each."""

    is_static: bool
    """Whether each number of rows has its price: rows that have ended stay until half of them have."""

    def start(self) -> Tensor:
        """Scores (B, V) of the first token of each answer."""

    def step(self, tokens_R: Tensor) -> Tensor:
        """Appends a token to each row; returns the scores (R, V) of the next one."""

    def reorder_cache(self, rows_R: Tensor, *, within_requests: bool = False) -> None:
        """Continues with these rows, in this order; a row may occur several times.

        `within_requests`: each row continues one of the same request, so prompts stay where they are.
        """


class SeededSampling:
    """Sampling by the Gumbel-max trick: the argmax of log p + Gumbel noise is a draw from p.

    Each request has its own random stream, so its draws do not depend on its neighbors. The streams live on the device,
    because a GPU would have to wait for numbers drawn on the CPU; another kind of device draws other numbers.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = decoding.sampling_temperature
        self.warper = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, scores_RV: Tensor, requests: Sequence[int]) -> Tensor:
        """Adds noise to the scores of these requests' rows, so that the argmax is a draw."""
        scores_RV = scores_RV.float() / self.temperature
        if self.warper is not None:
            scores_RV = self.warper(torch.empty(0), scores_RV)
        noise_RV = torch.empty_like(scores_RV)
        for noise_V, request in zip(noise_RV, requests, strict=True):
            noise_V.exponential_(generator=self.streams[request])
        return scores_RV - noise_RV.log_()


def sample(llm: DecodingSteps, rules: AnswerRules, sampling: SeededSampling | None = None) -> list[list[int]]:
    """Takes the likeliest token at each step (greedy), or with `sampling` a drawn one.

    Returns:
        the tokens of each request's answer, the end-of-sequence token included.
    """
    scores_RV = llm.start()
    n, device, n_start = len(scores_RV), scores_RV.device, len(rules.start_ids)
    requests = list(range(n))
    generated: list[list[int]] = [[] for _ in requests]
    eos = torch.tensor(sorted(rules.eos_ids), device=device)
    tokens_RT = nn.functional.pad(rules.first_tokens(n, device), (0, rules.max_new_tokens))
    ends = _Ends(n, device, is_static=llm.is_static)
    for length in range(n_start, tokens_RT.shape[1]):
        scores_RV = rules(tokens_RT[:, :length], scores_RV)
        if sampling is not None:
            scores_RV = sampling(scores_RV, requests)
        tokens_R = tokens_RT[:, length] = scores_RV.argmax(dim=-1)
        running = ends.running(torch.isin(tokens_R, eos))
        if length == tokens_RT.shape[1] - 1:
            running = []
        if ends.should_leave(running):
            leaving = sorted(set(range(len(requests))) - set(running))
            for row, tokens in zip(leaving, tokens_RT[leaving, n_start : length + 1].tolist(), strict=True):
                generated[requests[row]] = _until_end(tokens, rules.eos_ids)
            if not running:
                break
            rows_R = torch.tensor(running, device=device)
            llm.reorder_cache(rows_R)
            ends.keep(rows_R)
            requests = [requests[row] for row in running]
            tokens_R, tokens_RT = tokens_R[rows_R], tokens_RT[rows_R]
        scores_RV = llm.step(tokens_R)
    return generated


def _until_end(tokens: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends an answer: a row may have been continued behind it."""
    n = next((i + 1 for i, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return list(tokens[:n])


def beam_search(llm: DecodingSteps, rules: AnswerRules, *, beams: int) -> list[list[int]]:
    """Searches for the answer with the greatest log-likelihood per token, or as `rules.length_penalty` weighs length.

    A request ends when its best running beam is no better than the worst of its k finished ones, or earlier or later
    as `rules.early_stopping` says.

    Returns:
        the tokens of each request's answer, the end-of-sequence token included.
    """
    scores_RV = llm.start()
    n, device = len(scores_RV), scores_RV.device
    eos = torch.tensor(sorted(rules.eos_ids), device=device)
    # Enough candidates for k running beams, even if every beam could end in every way. Only the best k may end.
    n_candidates = (len(rules.eos_ids) + 1) * beams
    may_end_C = torch.arange(n_candidates, device=device) < beams
    requests = list(range(n))
    generated: list[list[int]] = [[] for _ in requests]
    running, finished = (_Beams.empty(n, beams, rules.max_new_tokens, device) for _ in range(2))
    ends = _Ends(n, device, is_static=llm.is_static)
    running.scores_Rk[:, 0] = 0.0  # the k beams of a request are still equal, so only the first one counts
    llm.reorder_cache(torch.arange(n, device=device).repeat_interleave(beams))
    scores_RV = scores_RV.repeat_interleave(beams, dim=0)
    for length in range(1, rules.max_new_tokens + 1):
        candidates, parents_RC = _expand(running, scores_RV, n_candidates, length, rules)
        ended_RC = torch.isin(candidates.tokens_RkT[:, :, length - 1], eos) | (length == rules.max_new_tokens)
        best_Rk = (candidates.scores_Rk + _NEVER * ended_RC).topk(beams).indices
        running = candidates.take(best_Rk)
        score_RC = candidates.scores_Rk / length**rules.length_penalty
        candidates.scores_Rk = torch.where(ended_RC & may_end_C, score_RC, _NEVER)
        found = finished.joined(candidates).best(beams)
        # What a search finds after its end does not count.
        finished = found.unless(ends.ended_R, finished) if llm.is_static else found

        searching = ends.running(~_may_improve(running, finished, length, rules))
        if length == rules.max_new_tokens:
            searching = []
        source_Rk = torch.arange(len(requests), device=device).unsqueeze(1) * beams + parents_RC.gather(1, best_Rk)
        if ends.should_leave(searching):
            leaving = sorted(set(range(len(requests))) - set(searching))
            for row, tokens in zip(leaving, finished.tokens_RkT[leaving, 0].tolist(), strict=True):
                generated[requests[row]] = tokens
            if not searching:
                break
            rows_R = torch.tensor(searching, device=device)
            llm.reorder_cache(source_Rk[rows_R].flatten())
            ends.keep(rows_R)
            requests = [requests[row] for row in searching]
            running, finished = running.rows(rows_R), finished.rows(rows_R)
        else:
            llm.reorder_cache(source_Rk.flatten(), within_requests=True)
        scores_RV = llm.step(running.tokens_RkT[:, :, length - 1].flatten())
    return generated


class _Ends:
    """Which of R rows or requests have ended, and which should leave the batch.

    In a static batch the CPU learns it a step late: what ended in one step is copied while the device works on the
    next, so that it never waits for the CPU, and rows leave when half of them have ended.
    """

    def __init__(self, n: int, device: torch.device, *, is_static: bool) -> None:
        self.is_static = is_static
        self.ended_R = torch.zeros(n, dtype=torch.bool, device=device)
        self._on_its_way: _Copy | None = None

    def running(self, ended_R: Tensor) -> list[int]:
        """The rows that run on, as far as the CPU knows, after a step in which these have ended."""
        self.ended_R = self.ended_R | ended_R
        latest = _Copy(self.ended_R)
        arrived, self._on_its_way = (self._on_its_way, latest) if self.is_static else (latest, None)
        ended = arrived.read() if arrived else [False] * len(ended_R)
        return [row for row, is_over in enumerate(ended) if not is_over]

    def should_leave(self, running: Sequence[int]) -> bool:
        """Whether the batch should go on with these rows alone."""
        n = len(self.ended_R)
        return len(running) <= n // 2 if self.is_static else len(running) < n

    def keep(self, rows_R: Tensor) -> None:
        """Goes on with these rows."""
        self.ended_R, self._on_its_way = self.ended_R[rows_R], None


class _Copy:
    """Flags on their way to the CPU."""

    def __init__(self, flags_R: Tensor) -> None:
        is_cuda = flags_R.device.type == "cuda"
        self._flags_R = flags_R.to("cpu", non_blocking=is_cuda)
        self._event = torch.cuda.current_stream(flags_R.device).record_event() if is_cuda else None

    def read(self) -> list[bool]:
        """Waits for them."""
        if self._event is not None:
            self._event.synchronize()
        flags: list[bool] = self._flags_R.tolist()
        return flags


@dataclass
class _Beams:
    """Partial answers (R, k, T), filled from the left, and their scores (R, k)."""

    tokens_RkT: Tensor
    scores_Rk: Tensor

    @classmethod
    def empty(cls, n: int, beams: int, length: int, device: torch.device) -> "_Beams":
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

    def unless(self, is_old_R: Tensor, old: "_Beams") -> "_Beams":
        """These beams, or the old ones of some requests."""
        tokens_RkT = torch.where(is_old_R[:, None, None], old.tokens_RkT, self.tokens_RkT)
        return _Beams(tokens_RkT, torch.where(is_old_R[:, None], old.scores_Rk, self.scores_Rk))

    def rows(self, rows: Tensor) -> "_Beams":
        return _Beams(self.tokens_RkT[rows], self.scores_Rk[rows])


def _expand(
    beams: _Beams, scores_RV: Tensor, n_candidates: int, length: int, rules: AnswerRules
) -> tuple[_Beams, Tensor]:
    """The likeliest continuations of each request's beams to `length` tokens, and the beam (R, C) each comes from."""
    tokens_RT = beams.tokens_RkT[:, :, : length - 1].flatten(0, 1)
    tokens_RT = torch.cat([rules.first_tokens(len(tokens_RT), tokens_RT.device), tokens_RT], dim=1)
    log_p_RV = rules(tokens_RT, nn.functional.log_softmax(scores_RV.float(), dim=-1))
    log_p_RkV = log_p_RV.view(*beams.scores_Rk.shape, -1)
    scores_RC, index_RC = (log_p_RkV + beams.scores_Rk.unsqueeze(-1)).flatten(1).topk(n_candidates)
    parents_RC, tokens_RC = index_RC // log_p_RkV.shape[-1], index_RC % log_p_RkV.shape[-1]
    candidates = _Beams(beams.take(parents_RC).tokens_RkT, scores_RC)
    candidates.tokens_RkT[:, :, length - 1] = tokens_RC
    return candidates, parents_RC


def _may_improve(running: _Beams, finished: _Beams, length: int, rules: AnswerRules) -> Tensor:
    """Which requests (R,) a running beam of `length` tokens may still improve."""
    worst_R = finished.scores_Rk[:, -1]
    if rules.early_stopping == "never" and rules.length_penalty > 0:
        length = rules.max_new_tokens
    may_improve_R: Tensor = running.scores_Rk[:, 0] / length**rules.length_penalty > worst_R
    return may_improve_R & (worst_R <= _NEVER) if rules.early_stopping is True else may_improve_R
