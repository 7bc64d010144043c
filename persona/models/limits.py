"""Checks that requests fit an LLM: its positions and its vocabulary. Needs no weights."""

from typing import Any

from transformers import PreTrainedConfig

from persona.errors import InputError, UsageError
from persona.models.prompts import PromptText, PromptTokenizer

_SHOWN = 3


def check_positions(
    name: str,
    config: PreTrainedConfig,
    tokenizer: PromptTokenizer,
    *,
    n_soft: int,
    retrieved_tokens: int,
    answer_tokens: int,
    answer_flag: str,
) -> None:
    """Raises UsageError when the longest request needs more positions than the LLM has.

    Args:
        name: of the LLM.
        config: of the LLM.
        tokenizer: writes the prompts.
        n_soft: soft tokens of a request.
        retrieved_tokens: tokens of its retrieved texts.
        answer_tokens: most tokens of an answer or target.
        answer_flag: the flag that says so.
    """
    [longest] = tokenizer.prompts([PromptText(input="a " * 2 * tokenizer.max_input_tokens)])
    prompt = len(longest) + n_soft + retrieved_tokens
    parts = f"{len(longest)} tokens of a request + {n_soft} soft tokens"
    parts += f" + {retrieved_tokens} of retrieved texts" * (retrieved_tokens > 0)
    flags = "--max-input-tokens" + " or --retrieve-tokens" * (retrieved_tokens > 0)
    answer = f"{answer_tokens} of an answer"
    if config.is_encoder_decoder:
        needs = [(prompt, "encoder", parts, flags), (answer_tokens, "decoder", answer, answer_flag)]
    else:
        needs = [(prompt + answer_tokens, "decoder", f"{parts} + {answer}", f"{flags} or {answer_flag}")]
    for needed, part, what, flag in needs:
        limit = _positions(config, part)
        if limit is not None and needed > limit:
            raise UsageError(f"--llm {name!r} has {limit} positions, but {what} would need {needed}; lower {flag}")


def check_vocabulary(name: str, config: PreTrainedConfig, tokenizer: PromptTokenizer) -> None:
    """Raises InputError when a text can have tokens that the LLM has no embedding of.

    Special tokens that no prompt contains, such as one for padding, may be beyond the vocabulary.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None:
        return
    pretrained = tokenizer.pretrained
    special = {token for token, added in pretrained.added_tokens_decoder.items() if added.special}
    [prompt], [target] = tokenizer.prompts([PromptText(input="a")]), tokenizer.targets(["a"])
    used = {*prompt.before, *prompt.after, *target, *pretrained.get_vocab().values()} - (
        special - {*prompt.before, *prompt.after, *target}
    )
    if beyond := sorted(token for token in used if token >= size):
        shown = ", ".join(repr(pretrained.convert_ids_to_tokens(token)) for token in beyond[:_SHOWN])
        raise InputError(
            f"--llm {name!r} has a vocabulary of {size} tokens, but its tokenizer has {len(beyond)} beyond it "
            f"({shown}); tokenizer and weights do not belong together: copy the whole folder again, or choose another "
            "LLM"
        )


def _positions(config: PreTrainedConfig, part: str) -> int | None:
    """Positions that a configuration declares for its encoder or decoder; None for relative positions."""
    settings: Any = config
    found = getattr(settings, f"max_{part}_position_embeddings", None)
    for owner in (settings, getattr(settings, part, None), settings.get_text_config()):
        found = found or getattr(owner, "max_position_embeddings", None)
    return int(found) if found else None
