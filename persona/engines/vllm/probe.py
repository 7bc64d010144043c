"""Compares prompts of embeddings with prompts of token ids in vLLM, before it answers requests.

Some LLMs scale embeddings. Where vLLM does it at another place than transformers, soft tokens would be too long or too
short.

Shapes: N tokens, D LLM width.
"""

from functools import partial

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.inputs import EngineInput, embeds_input, tokens_input
from vllm.sampling_params import RequestOutputKind

from persona.engines.probe import some_ids, tolerance
from persona.engines.vllm.client import Client, Request
from persona.errors import InputError
from persona.models.embedding_rows import embedding_rows
from persona.models.loading import load_config
from persona.models.prompts import PromptIds, PromptTokenizer
from persona.models.resolve import ModelFolder

_COMPARED_TOKENS = 64


def check_embeddings(client: Client, folder: ModelFolder, tokenizer: PromptTokenizer, dtype: torch.dtype) -> None:
    """Raises InputError unless a text given as embeddings has the next token of the same text given as ids."""
    n_tokens = min(load_config(folder).get_text_config().vocab_size, len(tokenizer.pretrained))
    first, second = (_all_ids(ids) for ids in some_ids(tokenizer, n_tokens))
    embeds_ND = embedding_rows(folder, first, dtype=dtype)
    compared = torch.linspace(0, n_tokens - 1, min(n_tokens, _COMPARED_TOKENS)).long().tolist()
    by_ids, other, by_embeddings = _log_probabilities(
        client, [tokens_input(first), tokens_input(second), embeds_input(embeds_ND)], compared
    )
    difference = float((by_embeddings - by_ids).abs().mean() / (by_ids - other).abs().mean())
    if not difference <= tolerance(dtype):
        raise InputError(
            f"--engine vllm: {folder.name!r} reads embeddings in another way than with transformers (the scores differ "
            f"by {difference:.1%} of the effect of another text), so soft tokens would not mean what the plug has "
            "learned; take --engine local"
        )


def _log_probabilities(client: Client, prompts: list[EngineInput], tokens: list[int]) -> list[Tensor]:
    """Of some tokens (N,) behind each prompt."""
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprob_token_ids=tokens,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    found = client.generate([Request(inputs=partial(dict, prompt), params=params) for prompt in prompts])
    rows = [output.logprobs[0] if output.logprobs else {} for output in found]
    return [torch.tensor([row[token].logprob for token in tokens]) for row in rows]


def _all_ids(ids: PromptIds) -> list[int]:
    return [*ids.before, *ids.after]
