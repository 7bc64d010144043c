"""The plug in front of the frozen LLM: rows of requests with their histories become losses or answers.

A row is a mapping with the columns of `persona.store.join`: `request_id`, `input`, `query`, `target`, `history` (n·2·d
bytes of little-endian float16). Shapes: B requests, M behaviors of all of them, d encoder width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona.engines.decoding import Answer
from persona.models import attention
from persona.models.encoder import pad
from persona.models.frozen_llm import FrozenLLM
from persona.options import Decoding, PersonaKind
from persona.plug.module import Plug
from persona.store import vectors

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class QueryText:
    """How a request's query becomes tokens for the query encoder (`prefix` is BGE's instruction to queries)."""

    tokenizer: PreTrainedTokenizerBase
    prefix: str = ""
    max_tokens: int = 276

    def tokens(self, queries: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both (B, T)."""
        texts = [self.prefix + query for query in queries]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)
        return pad(encoded["input_ids"], self.tokenizer.pad_token_id or 0, device)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests ready for the model: histories packed without padding, texts as token rows."""

    history_Md: Tensor
    lengths_B: Tensor
    query: tuple[Tensor, Tensor] | None
    inputs: list[list[int]]
    targets: list[list[int]]
    fronts: list[list[int]]
    persona: PersonaKind

    @property
    def n_target_tokens(self) -> int:
        """Target tokens of the batch, the denominator of the loss."""
        return sum(map(len, self.targets))


def packed(histories: Sequence[bytes], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Histories as the store's bytes to float32 vectors (M, d), one after the other, and their lengths (B,)."""
    parts = [vectors.from_bytes(history, width) for history in histories]
    packed_Md = np.concatenate([vectors.from_bytes(b"", width), *parts])
    lengths_B = torch.tensor([len(part) for part in parts], device=device)
    return torch.from_numpy(packed_Md.astype(np.float32)).to(device), lengths_B


class PersonalizedLLM(nn.Module):
    """One module of plug and frozen LLM, as DeepSpeed wants it.

    Of a row's `retrieved` texts `front_tokens` tokens go in front of its prompt (eq. r); with 0 it needs none.
    """

    def __init__(self, plug: Plug, llm: FrozenLLM, query_text: QueryText | None, *, front_tokens: int = 0) -> None:
        super().__init__()
        self.plug = plug
        self.llm = llm
        self.query_text = query_text
        self.front_tokens = front_tokens

    def collate(self, rows: Sequence[Row], *, with_targets: bool, persona: PersonaKind = PersonaKind.OWN) -> Batch:
        """Rows of one kind of persona to a batch on the LLM's device."""
        device = self.llm.device
        history_Md, lengths_B = packed([row["history"] for row in rows], self.plug.width, device)
        query = None
        if self.query_text is not None and self.plug.query_encoder is not None and persona is not PersonaKind.MEAN:
            query = self.query_text.tokens([row["query"] for row in rows], device)
        return Batch(
            history_Md=history_Md,
            lengths_B=lengths_B,
            query=query,
            inputs=self.llm.tokenize_inputs([row["input"] for row in rows]),
            targets=self.llm.tokenize_targets([row["target"] for row in rows]) if with_targets else [],
            fronts=self._fronts(rows),
            persona=persona,
        )

    def _fronts(self, rows: Sequence[Row]) -> list[list[int]]:
        if not self.front_tokens:
            return []
        return self.llm.tokenize_fronts([row["retrieved"] for row in rows], self.front_tokens)

    def forward(self, batch: Batch) -> Tensor:
        """Eq. 6 per request: summed negative log-likelihood (B,) of the targets, in nats."""
        return self.llm.nll(self.soft_tokens(batch), batch.inputs, batch.targets, batch.fronts)

    def soft_tokens(self, batch: Batch) -> Tensor:
        """[I; P] of each request, (B, S, D); S is 0 for a bare LLM."""
        if batch.persona is PersonaKind.BARE:
            return torch.empty(len(batch.inputs), 0, self.llm.width, device=self.llm.device)
        uniform = batch.persona is PersonaKind.MEAN
        soft_BSD: Tensor = self.plug(batch.history_Md, batch.lengths_B, batch.query, uniform_weights=uniform)
        return soft_BSD

    def only_answering(self) -> Self:
        """The same model for work without gradients: the query encoder, too, reads in the precision of the LLM.

        In float32 it takes a tenth of the time of short answers on a CPU.
        """
        encoder: Any = self.plug.query_encoder
        if encoder is not None:
            dtype = self.llm.model.dtype
            encoder.to(dtype)
            if how := attention.register_attention(encoder.config.model_type, dtype=dtype, device=self.llm.device):
                encoder.set_attn_implementation(how)
        return self.eval()

    @torch.inference_mode()
    def answer(
        self, rows: Sequence[Row], decoding: Decoding, *, persona: PersonaKind = PersonaKind.OWN
    ) -> list[Answer]:
        """Answers to a batch of requests of one kind of persona, in their order."""
        batch = self.collate(rows, with_targets=False, persona=persona)
        seeds = [decoding.row_seed(row["request_id"]) for row in rows]
        return self.llm.generate(self.soft_tokens(batch), batch.inputs, decoding, seeds, batch.fronts)
