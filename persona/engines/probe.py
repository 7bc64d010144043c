"""Compares a loaded LLM with plain transformers code on a few tokens, before it trains a plug or answers requests.

Shapes: N positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from persona.engines.kv_cache import start_steps
from persona.errors import InputError
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptIds, PromptTokenizer

_PROMPT_TOKENS, _TARGET_TOKENS = 7, 3
# Rounding in bf16 causes some percent; a wrong position, mask or scale causes much more.
_TOLERANCE = {torch.float32: 0.005}
_COARSE_TOLERANCE = 0.15


@torch.no_grad()
def check_llm(llm: FrozenLLM) -> None:
    """Raises InputError unless losses and answers of this LLM are those of plain transformers code on the same input.

    Makes a handful of passes over ten tokens. Under ZeRO-3 all workers call it together.
    """
    name, kind = llm.model.name_or_path, llm.model.config.model_type
    llm.eval()  # a cache and recomputed activations exclude each other
    try:
        for what, difference in _differences(llm):
            if not difference <= tolerance(llm.dtype):
                precision = "; try --precision fp32" if llm.dtype is not torch.float32 else ""
                raise InputError(
                    f"--llm {name} ({kind}): the scores of {what} differ from those of plain transformers, by "
                    f"{difference:.1%} of the effect of another text, so results would be wrong{precision}; choose "
                    "another LLM"
                )
    except InputError:
        raise
    except Exception as error:  # models fail in many ways
        raise InputError(
            f"--llm {name} ({kind}) cannot be used: {type(error).__name__}: {error}; choose another LLM"
        ) from error
    finally:
        llm.train()


@torch.no_grad()
def check_reading_ahead(llm: FrozenLLM) -> str | None:
    """Compares the scores of a text in one row with those behind a cache, of a decoder-only LLM that recomputes.

    Returns None, or what is wrong with the latter; `llm.reads_ahead` is then off. Under ZeRO-3 all workers call it.
    """
    first, second = some_prompts(llm)
    targets = [first.after[:_TARGET_TOKENS]] * 2
    no_soft_B0D = torch.empty(2, 0, llm.width, device=llm.device)
    try:
        whole_NV, ahead_NV = (
            llm.target_logits(no_soft_B0D, [first, second], targets, cache_before=cache_before).float().log_softmax(-1)
            for cache_before in (False, True)
        )
    except Exception as error:  # noqa: BLE001 - models fail in many ways, and the plain way remains
        reason: str | None = f"{type(error).__name__}: {error}"
    else:
        of_first_NV, of_second_NV = whole_NV.chunk(2)
        difference = float((ahead_NV - whole_NV).abs().mean() / (of_first_NV - of_second_NV).abs().mean())
        reason = None if difference <= tolerance(llm.dtype) else f"the scores differ by {difference:.1%}"
    llm.reads_ahead = llm.reads_ahead and reason is None
    return reason


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference that rounding causes, as a share of the difference that another text makes."""
    return _TOLERANCE.get(dtype, _COARSE_TOLERANCE)


def some_ids(tokenizer: PromptTokenizer, n_tokens: int) -> tuple[PromptIds, PromptIds]:
    """Two prompts of ordinary tokens from all over a vocabulary of `n_tokens`."""
    special = {*tokenizer.pretrained.all_special_ids, 0}
    spread = torch.linspace(0, n_tokens - 1, min(n_tokens, 8 * _PROMPT_TOKENS)).long().tolist()
    ids = [token for token in dict.fromkeys(spread) if token not in special]
    rows = [ids[start :: max(len(ids) // _PROMPT_TOKENS, 1)][:_PROMPT_TOKENS] for start in (0, 1)]
    first, second = (PromptIds(before=row[:2], after=row[2:]) for row in rows)
    return first, second


def some_prompts(llm: FrozenLLM) -> tuple[PromptIds, PromptIds]:
    """Two made-up prompts of this LLM's tokens; see `some_ids`."""
    n_tokens = min(llm.model.get_input_embeddings().num_embeddings, len(llm.tokenizer.pretrained))
    return some_ids(llm.tokenizer, n_tokens)


def _differences(llm: FrozenLLM) -> Iterator[tuple[str, float]]:
    """What was compared, and how different it is."""
    first, second = some_prompts(llm)
    short = PromptIds(before=second.before, after=second.after[: _PROMPT_TOKENS // 2])
    target = [*first.after[:_TARGET_TOKENS]]
    plain = {id(prompt): _plain_logits(llm, prompt, target) for prompt in (first, second, short)}
    typical = (plain[id(first)] - plain[id(second)]).abs().mean()

    def compare(found_NV: Tensor, expected_NV: Tensor) -> float:
        return float((found_NV.float().log_softmax(-1) - expected_NV).abs().mean() / typical)

    no_soft_B0D = torch.empty(2, 0, llm.width, device=llm.device)
    alone_NV = llm.target_logits(no_soft_B0D[:1], [first], [target])
    yield "a text given as embeddings", compare(alone_NV, plain[id(first)])
    for cache_before in (False, True):
        both_NV = llm.target_logits(no_soft_B0D, [short, first], [target] * 2, cache_before=cache_before)
        yield "a text beside a longer one", compare(both_NV, torch.cat([plain[id(short)], plain[id(first)]]))

    pair = [short if llm.can_mask_padding else second, first]
    steps = start_steps(llm, no_soft_B0D, pair)
    expected_BNV = torch.stack([plain[id(prompt)] for prompt in pair])
    yield "the first token of an answer", compare(steps.start(), expected_BNV[:, 0])
    rows = torch.tensor([1, 0, 1], device=llm.device)  # as in beam search
    steps.reorder_cache(rows)
    for i, token in enumerate(target[:-1]):
        scores_RV = steps.step(torch.full_like(rows, token))
        yield "a later token of an answer", compare(scores_RV, expected_BNV[rows, i + 1])


def _plain_logits(llm: FrozenLLM, prompt: PromptIds, target: Sequence[int]) -> Tensor:
    """Log-probabilities (N, V) at the target's positions, by transformers from token ids alone."""
    text = [*prompt.before, *prompt.after]
    if llm.is_encoder_decoder:
        inputs = {"input_ids": [text], "decoder_input_ids": [[llm.start_id, *target[:-1]]]}
    else:
        inputs = {"input_ids": [[*text, *target[:-1]]]}
    logits_1LV = llm.model(**{name: torch.tensor(ids, device=llm.device) for name, ids in inputs.items()}).logits
    logits_NV: Tensor = logits_1LV[0, -len(target) :]
    return logits_NV.float().log_softmax(-1)
