"""The plug in front of the frozen LLM: requests with their histories become soft tokens and losses.

A row is a mapping with the columns of `persona.store.join`: `request_id`, `input`, `query`, `target`, `system`
(for chats), `history` (n·2·d bytes of little-endian float16), and `retrieved` (texts) if there is retrieval.

Shapes: B requests, M behaviors of all requests together, S soft tokens, d encoder width, D LLM width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona.models import attention, encoder_model
from persona.models.batching import pad
from persona.models.device import to_device
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptIds, PromptText
from persona.options import PersonaKind
from persona.plug.module import Plug
from persona.store import vectors

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class QueryText:
    """How queries are tokenized for the query encoder; `prompt` is in front of each."""

    tokenizer: PreTrainedTokenizerBase
    prompt: str = ""
    max_tokens: int = 276

    def tokens(self, queries: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both (B, T)."""
        rows = encoder_model.token_rows(self.tokenizer, list(queries), prompt=self.prompt, max_tokens=self.max_tokens)
        return pad(rows, encoder_model.pad_id(self.tokenizer), device)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlugInputs:
    """What the plug reads for requests of one kind of persona; histories are packed without padding."""

    history_Md: Tensor
    lengths_B: Tensor
    query: tuple[Tensor, Tensor] | None
    """Token ids and mask, both (B, T); None if the queries are not needed."""
    persona: PersonaKind
    strength: float = 1.0
    """Of the persona, as in `persona.strengths`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch(PlugInputs):
    """Requests with targets: what the plug reads, and the token ids for the LLM."""

    prompts: list[PromptIds]
    targets: list[list[int]]

    @property
    def n_target_tokens(self) -> int:
        """Target tokens of the batch, the denominator of the loss."""
        return sum(map(len, self.targets))


def pack_histories(histories: Sequence[bytes], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Histories as stored to float32 vectors (M, d), one history after the other, and their lengths (B,)."""
    parts = [vectors.from_bytes(history, width) for history in histories]
    packed_Md = np.concatenate([vectors.from_bytes(b"", width), *parts])
    lengths_B = torch.tensor([len(part) for part in parts])
    return to_device(torch.from_numpy(packed_Md.astype(np.float32)), device), to_device(lengths_B, device)


def plug_inputs(
    plug: Plug,
    query_text: QueryText | None,
    rows: Sequence[Row],
    persona: PersonaKind,
    device: torch.device,
    *,
    strength: float = 1.0,
) -> PlugInputs:
    """Rows of one kind of persona, on `device`; `query_text` is None for a plug that reads no queries."""
    history_Md, lengths_B = pack_histories([row["history"] for row in rows], plug.width, device)
    query = None
    is_read = plug.query_encoder is not None and (persona is not PersonaKind.MEAN or plug.options.query_token)
    if query_text is not None and is_read:
        query = query_text.tokens([row["query"] for row in rows], device)
    return PlugInputs(history_Md=history_Md, lengths_B=lengths_B, query=query, persona=persona, strength=strength)


def prompt_texts(rows: Sequence[Row]) -> list[PromptText]:
    """What the LLM reads of each row."""
    return [
        PromptText(input=row["input"], retrieved=row.get("retrieved") or (), system=row.get("system")) for row in rows
    ]


def soft_tokens(plug: Plug, inputs: PlugInputs) -> Tensor:
    """What `Plug.forward` makes of each request, (B, S, D); S is 0 for `PersonaKind.BARE`."""
    if inputs.persona is PersonaKind.BARE:
        return torch.empty(len(inputs.lengths_B), 0, plug.llm_width, device=inputs.lengths_B.device)
    soft_BSD: Tensor = plug(
        inputs.history_Md,
        inputs.lengths_B,
        inputs.query,
        uniform_weights=inputs.persona is PersonaKind.MEAN,
        strength=inputs.strength,
    )
    return soft_BSD


def prepare_for_inference(plug: Plug, *, dtype: torch.dtype, device: torch.device) -> Plug:
    """Moves the plug to `device`, puts it in eval mode and its query encoder in `dtype`, in place; returns it.

    `dtype` is the LLM's: a query encoder in float32 takes a tenth of the time of short answers on a CPU.
    """
    plug.to(device)
    encoder: Any = plug.query_encoder
    if encoder is not None:
        kind = encoder.config.model_type
        encoder.to(encoder_model.runs_in(kind, dtype))
        if kernel := attention.encoder_attention(kind, dtype=dtype, device=device):
            encoder.set_attn_implementation(kernel)
    return plug.eval()


class PersonalizedLLM(nn.Module):
    """Plug and frozen LLM as one module that computes losses, as DeepSpeed expects it.

    Args:
        plug: on the LLM's device.
        llm: the frozen LLM.
        query_text: how queries are tokenized; None for a plug that reads none.
        retrieved_tokens: tokens of each row's `retrieved` texts; 0 without retrieval.
    """

    def __init__(self, plug: Plug, llm: FrozenLLM, query_text: QueryText | None, *, retrieved_tokens: int = 0) -> None:
        super().__init__()
        self.plug = plug
        self.llm = llm
        self.query_text = query_text
        self.retrieved_tokens = retrieved_tokens

    def collate(self, rows: Sequence[Row], *, persona: PersonaKind = PersonaKind.OWN, strength: float = 1.0) -> Batch:
        """A batch of rows with targets, all of one kind of persona at one strength, on the LLM's device."""
        tokenizer = self.llm.tokenizer
        of_plug = plug_inputs(self.plug, self.query_text, rows, persona, self.llm.device, strength=strength)
        return Batch(
            history_Md=of_plug.history_Md,
            lengths_B=of_plug.lengths_B,
            query=of_plug.query,
            persona=persona,
            strength=strength,
            prompts=tokenizer.prompts(prompt_texts(rows), retrieved_tokens=self.retrieved_tokens),
            targets=tokenizer.targets([row["target"] for row in rows]),
        )

    def forward(self, batch: Batch) -> Tensor:
        """PPlug eq. 6 per request: the summed negative log-likelihood (B,) of the targets, in nats."""
        # A short text in front would cost more in a pass of its own.
        long_before = self.retrieved_tokens > 0 and self.llm.tokenizer.options.soft_position == "input"
        return self.llm.nll(self.soft_tokens(batch), batch.prompts, batch.targets, cache_before=long_before)

    def soft_tokens(self, batch: Batch) -> Tensor:
        """The soft tokens (B, S, D) of a batch."""
        return soft_tokens(self.plug, batch)
