"""The LLM one token at a time, with the memory (key-value cache) of what it has read and said.

Shapes: B requests, R rows that run, L prompt tokens, T tokens said, D LLM width, V vocabulary.
"""

from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedModel


def places(mask_BL: Tensor) -> Tensor:
    """The place (B, L) of each token among those of its row, padding on the left not counted."""
    return (mask_BL.long().cumsum(1) - 1).clamp(min=0)


class CausalSteps:
    """A decoder-only LLM: prompt and answer in one row, prompts padded on the left."""

    def __init__(self, model: PreTrainedModel, embeds_BLD: Tensor, mask_BL: Tensor) -> None:
        self.model = model
        self.prompt_BLD = embeds_BLD
        self.mask_RL = mask_BL.long()
        self.memory: Cache | None = None

    def start(self) -> Tensor:
        """Scores (B, V) of the first token of each answer."""
        return self._scores(inputs_embeds=self.prompt_BLD, position_ids=places(self.mask_RL))

    def step(self, tokens_R: Tensor) -> Tensor:
        """Scores (R, V) of the next token, after one token more of each row."""
        self.mask_RL = torch.cat([self.mask_RL, self.mask_RL.new_ones(len(tokens_R), 1)], dim=1)
        places_R1 = self.mask_RL.sum(1, keepdim=True) - 1
        return self._scores(input_ids=tokens_R.unsqueeze(1), position_ids=places_R1)

    def keep(self, rows_R: Tensor) -> None:
        """Goes on with these rows, in this order; one may be there several times."""
        if self.memory is None:
            raise ValueError("start comes before keep")
        self.mask_RL = self.mask_RL[rows_R]
        self.memory.reorder_cache(cast(LongTensor, rows_R))

    def _scores(self, **reading: Tensor) -> Tensor:
        output = self.model(
            attention_mask=self.mask_RL, past_key_values=self.memory, use_cache=True, logits_to_keep=1, **reading
        )
        self.memory = output.past_key_values
        scores_RV: Tensor = output.logits[:, -1]
        return scores_RV


class Seq2SeqSteps:
    """An encoder-decoder LLM: the prompt is encoded once, padded on the right; the answer is the decoder's row."""

    def __init__(self, model: PreTrainedModel, embeds_BLD: Tensor, mask_BL: Tensor) -> None:
        self.model = model
        encoded = model.get_encoder()(inputs_embeds=embeds_BLD, attention_mask=mask_BL)
        self.encoded_RLD: Tensor = encoded.last_hidden_state
        self.mask_RL = mask_BL
        self.memory: EncoderDecoderCache | None = None
        self.requests_R = torch.arange(len(mask_BL), device=mask_BL.device)

    def start(self) -> Tensor:
        """Scores (B, V) of the first token of each answer."""
        return self.step(torch.full_like(self.requests_R, self.model.config.decoder_start_token_id))

    def step(self, tokens_R: Tensor) -> Tensor:
        """Scores (R, V) of the next token, after one token more of each row."""
        output = self.model(
            encoder_outputs=(self.encoded_RLD,),
            attention_mask=self.mask_RL,
            decoder_input_ids=tokens_R.unsqueeze(1),
            past_key_values=self.memory,
            use_cache=True,
        )
        self.memory = output.past_key_values
        scores_RV: Tensor = output.logits[:, -1]
        return scores_RV

    def keep(self, rows_R: Tensor) -> None:
        """Goes on with these rows, in this order; one may be there several times."""
        if self.memory is None:
            raise ValueError("start comes before keep")
        requests_R = self.requests_R[rows_R]
        self.memory.self_attention_cache.reorder_cache(cast(LongTensor, rows_R))
        if not torch.equal(requests_R, self.requests_R):
            # Not for beams of the same requests: what they read of the prompt is the same, and large.
            self.memory.cross_attention_cache.reorder_cache(cast(LongTensor, rows_R))
            self.encoded_RLD, self.mask_RL = self.encoded_RLD[rows_R], self.mask_RL[rows_R]
            self.requests_R = requests_R
