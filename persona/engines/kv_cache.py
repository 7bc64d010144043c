"""An LLM that decodes step by step and keeps the key-value cache of what it has read and generated.

Shapes: B requests, R running rows, L prompt tokens, T generated tokens, D LLM width, V vocabulary.
"""

from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from persona.models.batching import position_ids


class CausalSteps:
    """A decoder-only LLM: prompt and answer are one row, and prompts are padded on the left."""

    def __init__(self, model: PreTrainedModel, embeds_BLD: Tensor, mask_BL: Tensor) -> None:
        self.model = model
        self.prompt_BLD = embeds_BLD
        self.mask_RL = mask_BL.long()
        self.kv_cache: Cache | None = None

    def start(self) -> Tensor:
        """Scores (B, V) of the first token of each answer."""
        return self._scores(inputs_embeds=self.prompt_BLD, position_ids=position_ids(self.mask_RL))

    def step(self, tokens_R: Tensor) -> Tensor:
        """Appends a token to each row; returns the scores (R, V) of the next one."""
        self.mask_RL = torch.cat([self.mask_RL, self.mask_RL.new_ones(len(tokens_R), 1)], dim=1)
        position_R1 = self.mask_RL.sum(1, keepdim=True) - 1
        return self._scores(input_ids=tokens_R.unsqueeze(1), position_ids=position_R1)

    def reorder_cache(self, rows_R: Tensor) -> None:
        """Continues with these rows, in this order; a row may occur several times."""
        if self.kv_cache is None:
            raise ValueError("call start before reorder_cache")
        self.mask_RL = self.mask_RL[rows_R]
        self.kv_cache.reorder_cache(cast(LongTensor, rows_R))

    def _scores(self, **inputs: Tensor) -> Tensor:
        output = self.model(
            attention_mask=self.mask_RL, past_key_values=self.kv_cache, use_cache=True, logits_to_keep=1, **inputs
        )
        self.kv_cache = output.past_key_values
        scores_RV: Tensor = output.logits[:, -1]
        return scores_RV


class Seq2SeqSteps:
    """An encoder-decoder LLM: prompts are padded on the right and encoded once; the decoder generates the answer."""

    def __init__(self, model: PreTrainedModel, embeds_BLD: Tensor, mask_BL: Tensor) -> None:
        self.model = model
        encoded = model.get_encoder()(inputs_embeds=embeds_BLD, attention_mask=mask_BL)
        self.encoded_RLD: Tensor = encoded.last_hidden_state
        self.mask_RL = mask_BL
        self.kv_cache: EncoderDecoderCache | None = None
        self.requests_R = torch.arange(len(mask_BL), device=mask_BL.device)

    def start(self) -> Tensor:
        """Scores (B, V) of the first token of each answer."""
        return self.step(torch.full_like(self.requests_R, self.model.config.decoder_start_token_id))

    def step(self, tokens_R: Tensor) -> Tensor:
        """Appends a token to each row; returns the scores (R, V) of the next one."""
        output = self.model(
            encoder_outputs=(self.encoded_RLD,),
            attention_mask=self.mask_RL,
            decoder_input_ids=tokens_R.unsqueeze(1),
            past_key_values=self.kv_cache,
            use_cache=True,
        )
        self.kv_cache = output.past_key_values
        scores_RV: Tensor = output.logits[:, -1]
        return scores_RV

    def reorder_cache(self, rows_R: Tensor) -> None:
        """Continues with these rows, in this order; a row may occur several times."""
        if self.kv_cache is None:
            raise ValueError("call start before reorder_cache")
        requests_R = self.requests_R[rows_R]
        self.kv_cache.self_attention_cache.reorder_cache(cast(LongTensor, rows_R))
        # Beams of one request share its encoded prompt, which is large: reorder it only if requests changed rows.
        if not torch.equal(requests_R, self.requests_R):
            self.kv_cache.cross_attention_cache.reorder_cache(cast(LongTensor, rows_R))
            self.encoded_RLD, self.mask_RL = self.encoded_RLD[rows_R], self.mask_RL[rows_R]
            self.requests_R = requests_R
