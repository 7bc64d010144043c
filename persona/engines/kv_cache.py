"""An LLM that decodes step by step and keeps the key-value cache of what it has read and generated.

Shapes: B requests, R running rows, L prompt tokens, T generated tokens, D LLM width, V vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptIds


def start_steps(llm: FrozenLLM, soft_BSD: Tensor, prompts: Sequence[PromptIds]) -> "CausalSteps | Seq2SeqSteps":
    """An LLM in front of these prompts; they have the same length unless `llm.can_mask_padding`."""
    embeds_BLD, mask_BL = llm.embed_prompts(soft_BSD, prompts, pad_left=not llm.is_encoder_decoder)
    if llm.is_encoder_decoder:
        return Seq2SeqSteps(llm, embeds_BLD, mask_BL)
    return CausalSteps(llm, embeds_BLD, mask_BL)


class CausalSteps:
    """A decoder-only LLM: prompt and answer are one row, and prompts are padded on the left."""

    is_static = False

    def __init__(self, llm: FrozenLLM, embeds_BLD: Tensor, mask_BL: Tensor) -> None:
        self.llm = llm
        self.prompt_BLD = embeds_BLD
        self.mask_RL = mask_BL
        self.kv_cache: Cache | None = None

    def start(self) -> Tensor:
        """Scores (B, V) of the first token of each answer."""
        n, length = self.mask_RL.shape
        last_B = torch.arange(1, n + 1, device=self.mask_RL.device) * length - 1
        scores_BV, self.kv_cache = self.llm.forward_at(
            last_B,
            inputs_embeds=self.prompt_BLD,
            past_key_values=self.kv_cache,
            use_cache=True,
            **self.llm.mask_arguments(self.mask_RL),
        )
        return scores_BV

    def step(self, tokens_R: Tensor) -> Tensor:
        """Appends a token to each row; returns the scores (R, V) of the next one."""
        self.mask_RL = torch.cat([self.mask_RL, self.mask_RL.new_ones(len(tokens_R), 1)], dim=1)
        output = self.llm.model(
            input_ids=tokens_R.unsqueeze(1),
            past_key_values=self.kv_cache,
            use_cache=True,
            **self.llm.mask_arguments(self.mask_RL, n_new=1),
        )
        self.kv_cache = output.past_key_values
        scores_RV: Tensor = output.logits[:, -1]
        return scores_RV

    def reorder_cache(self, rows_R: Tensor, *, within_requests: bool = False) -> None:  # noqa: ARG002
        """Continues with these rows, in this order; see `DecodingSteps`."""
        if self.kv_cache is None:
            raise ValueError("call start before reorder_cache")
        self.mask_RL = self.mask_RL[rows_R]
        self.kv_cache.reorder_cache(cast(LongTensor, rows_R))


class Seq2SeqSteps:
    """An encoder-decoder LLM: prompts are padded on the right and encoded once; the decoder generates the answer."""

    is_static = False

    def __init__(self, llm: FrozenLLM, embeds_BLD: Tensor, mask_BL: Tensor) -> None:
        self.model = llm.model
        assert llm.start_id is not None
        self.start_id = llm.start_id
        self.mask_RL = mask_BL.long()
        encoded = self.model.get_encoder()(inputs_embeds=embeds_BLD, attention_mask=self.mask_RL)
        self.encoded_RLD: Tensor = encoded.last_hidden_state
        self.kv_cache: EncoderDecoderCache | None = None

    def start(self) -> Tensor:
        """Scores (B, V) of the first token of each answer."""
        return self.step(self.mask_RL.new_full((len(self.mask_RL),), self.start_id))

    def step(self, tokens_R: Tensor) -> Tensor:
        """Appends a token to each row; returns the scores (R, V) of the next one."""
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.encoded_RLD),
            attention_mask=self.mask_RL,
            decoder_input_ids=tokens_R.unsqueeze(1),
            past_key_values=self.kv_cache,
            use_cache=True,
        )
        self.kv_cache = output.past_key_values
        scores_RV: Tensor = output.logits[:, -1]
        return scores_RV

    def reorder_cache(self, rows_R: Tensor, *, within_requests: bool = False) -> None:
        """Continues with these rows, in this order; see `DecodingSteps`."""
        if self.kv_cache is None:
            raise ValueError("call start before reorder_cache")
        self.kv_cache.self_attention_cache.reorder_cache(cast(LongTensor, rows_R))
        # Beams of one request share its encoded prompt, which is large.
        if not within_requests:
            self.kv_cache.cross_attention_cache.reorder_cache(cast(LongTensor, rows_R))
            self.encoded_RLD, self.mask_RL = self.encoded_RLD[rows_R], self.mask_RL[rows_R]
