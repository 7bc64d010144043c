"""Compares answers with a static key-value cache with those with a growing one, before the first request.

Shapes: B prompts, S soft tokens, R rows, V vocabulary, D LLM width.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from persona.engines.decoding import DecodingSteps
from persona.engines.kv_cache import start_steps
from persona.engines.probe import some_prompts, tolerance
from persona.engines.static_steps import StaticLLM, can_be_static
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptIds

_SOFT_TOKENS = 2


def static_llm(llm: FrozenLLM) -> StaticLLM | None:
    """Static decoding of an LLM; None if it does not know this kind, or after a warning if it is not right."""
    if not can_be_static(llm):
        return None
    static = StaticLLM(llm)
    try:
        difference = static_difference(static)
        problem = "" if difference <= tolerance(llm.dtype) else f"scores differ by {difference:.1%}"
    except Exception as error:  # noqa: BLE001 - graphs fail in many ways, and there is another path
        problem = f"{type(error).__name__}: {error}"
    if problem:
        logging.getLogger(__name__).warning(
            "answers of %s take longer than they could: no static key-value cache (%s)", llm.model.name_or_path, problem
        )
    return None if problem else static


@torch.inference_mode()
def static_difference(static: StaticLLM) -> float:
    """The largest difference of a step's scores, as a share of the difference that another text makes."""
    llm = static.llm
    first, second = some_prompts(llm)
    prompts = [first, PromptIds(before=second.before, after=second.after[::2])]
    draw = torch.Generator().manual_seed(0)
    soft_BSD = torch.randn(len(prompts), _SOFT_TOKENS, llm.width, generator=draw) * llm.token_norm() / llm.width**0.5
    soft_BSD = soft_BSD.to(llm.device, llm.dtype)
    expected = _scores(partial(start_steps, llm, soft_BSD, prompts), first)
    found = _scores(partial(static.start_steps, soft_BSD, prompts, n_new=len(expected), beams=2), first)
    typical = (expected[0][0] - expected[0][1]).abs().mean()
    return max(float((one - other).abs().mean() / typical) for one, other in zip(found, expected, strict=True))


def _scores(start: Callable[[], DecodingSteps], text: PromptIds) -> list[Tensor]:
    """Log-probabilities (R, V) after each step of a search by two beams that change places, and of one that is left."""
    steps = start()
    scores = [steps.start().float().log_softmax(-1)]
    rows_R = torch.tensor([0, 0, 1, 1], device=scores[0].device)
    steps.reorder_cache(rows_R)
    some_R, others_R = (torch.tensor(text.after[i : i + 2], device=rows_R.device).repeat(2) for i in (0, 2))
    for tokens_R in (some_R, others_R):
        scores.append(steps.step(tokens_R).float().log_softmax(-1))
        steps.reorder_cache(torch.tensor([1, 0, 3, 2], device=rows_R.device), within_requests=True)
    steps.reorder_cache(torch.tensor([2], device=rows_R.device))
    scores.append(steps.step(some_R[:1]).float().log_softmax(-1))
    return scores
