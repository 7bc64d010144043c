"""What an LLM's `generation_config.json` demands of its answers, as `transformers.generate` follows it.

Length limit, beams and sampling are not among it: they are flags of jobs.generate.

Shapes: R running rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from persona.errors import InputError
from persona.models.loading import load_config
from persona.models.resolve import ModelFolder

# Settings that change answers and are not followed, with the values that change nothing.
_REFUSED = {
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "watermarking_config": None,
    "stop_strings": None,
    "max_time": None,
    "token_healing": False,
    "penalty_alpha": 0,
    "dola_layers": None,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "constraints": None,
    "force_words_ids": None,
}


@dataclass(frozen=True, kw_only=True)
class AnswerRules:
    """Rules for answers of at most `max_new_tokens` tokens.

    Attributes:
        max_new_tokens: an answer is cut at this length.
        processors: change the scores (R, V) of the next token, given the tokens (R, T) before it.
        start_ids: tokens in front of each answer that the processors see: the decoder's first one, if it has one.
        eos_ids: tokens that end an answer.
        length_penalty: beam search divides the log-likelihood of an answer by its length to this power.
        early_stopping: when beam search gives up; see `transformers.GenerationConfig`.
    """

    max_new_tokens: int
    eos_ids: Sequence[int]
    start_ids: Sequence[int] = ()
    processors: LogitsProcessorList
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def first_tokens(self, n: int, device: torch.device) -> Tensor:
        """`start_ids` of n rows, (n, T)."""
        tokens_RT = torch.empty(n, len(self.start_ids), dtype=torch.long, device=device)
        for i, token in enumerate(self.start_ids):
            tokens_RT[:, i] = token  # a copy from the CPU would wait for the device
        return tokens_RT

    def __call__(self, tokens_RT: Tensor, scores_RV: Tensor) -> Tensor:
        """The scores as the rules leave them."""
        if not self.processors:
            return scores_RV
        changed_RV: Tensor = self.processors(cast(LongTensor, tokens_RT), cast(FloatTensor, scores_RV.float()))
        return changed_RV


def check_rules(config: GenerationConfig, *, is_encoder_decoder: bool, flag: str = "--llm") -> None:
    """Raises InputError for settings that change answers and that this program does not follow."""
    given = {name: getattr(config, name, None) for name in _REFUSED}
    refused = [name for name, value in given.items() if value not in (None, False, _REFUSED[name])]
    if config.cache_implementation == "quantized":
        refused.append("cache_implementation")
    if refused:
        raise InputError(
            f"{flag}: its generation_config.json sets {', '.join(refused)}, which would change its answers and is not "
            "supported; remove it from a copy of the folder, if answers without it will do"
        )
    if config.min_length and not config.min_new_tokens and not is_encoder_decoder:
        raise InputError(
            f"{flag}: its generation_config.json sets min_length {config.min_length}, which includes the prompt; set "
            "min_new_tokens instead in a copy of the folder, which counts the answer alone"
        )


def check_folder(folder: ModelFolder) -> None:
    """Raises InputError as `check_rules` does, for the LLM in a folder, without its weights."""
    check_rules(generation_config(folder), is_encoder_decoder=bool(load_config(folder).is_encoder_decoder))


def generation_config(folder: ModelFolder) -> GenerationConfig:
    """What the LLM in a folder demands of its answers."""
    if (folder.path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder.path, local_files_only=True)
    return GenerationConfig.from_model_config(load_config(folder))


def answer_rules(
    config: GenerationConfig,
    *,
    eos_ids: Sequence[int],
    start_ids: Sequence[int],
    max_new_tokens: int,
    device: torch.device,
) -> AnswerRules:
    """The rules in a generation configuration that `check_rules` accepts."""
    return AnswerRules(
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        start_ids=start_ids,
        processors=LogitsProcessorList(_processors(config, eos_ids, len(start_ids), max_new_tokens, device)),
        length_penalty=1.0 if config.length_penalty is None else config.length_penalty,
        early_stopping=config.early_stopping or False,
    )


def _processors(
    config: GenerationConfig, eos_ids: Sequence[int], n_start: int, max_new_tokens: int, device: torch.device
) -> list[LogitsProcessor]:
    """In the order of `transformers.generate`."""
    eos, on = list(eos_ids), str(device)
    found: list[LogitsProcessor] = []
    if config.sequence_bias:
        found.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        found.append(NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    if config.min_new_tokens:
        found.append(MinNewTokensLengthLogitsProcessor(n_start, config.min_new_tokens, eos, device=on))
    elif config.min_length:
        found.append(MinLengthLogitsProcessor(config.min_length, eos, device=on))
    if config.forced_bos_token_id is not None:
        found.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        found.append(ForcedEOSTokenLogitsProcessor(n_start + max_new_tokens, config.forced_eos_token_id, device=on))
    if config.remove_invalid_values:
        found.append(InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty:
        found.append(ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, eos, n_start))
    if config.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=on))
    if config.begin_suppress_tokens:
        begin = n_start + (n_start <= 1 and config.forced_bos_token_id is not None)
        found.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device=on))
    if config.renormalize_logits:
        found.append(LogitNormalization())
    return found
