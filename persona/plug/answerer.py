"""The plug in front of an engine: requests with their histories become answers."""

import threading
from collections.abc import Sequence

import torch

from persona.engines.base import Answer, Engine, Prompt
from persona.options import Decoding, PersonaKind
from persona.plug.module import Plug
from persona.plug.personalized import QueryText, Row, plug_inputs, prompt_texts, soft_tokens


class Answerer:
    """Plug and engine.

    Args:
        plug: in eval mode, on the engine's device.
        engine: the LLM.
        query_text: how queries are tokenized; None for a plug that reads none.
        batch_size: requests per forward pass of the plug.
        retrieved_tokens: tokens of each row's `retrieved` texts; 0 without retrieval.
    """

    def __init__(
        self, plug: Plug, engine: Engine, query_text: QueryText | None, *, batch_size: int, retrieved_tokens: int = 0
    ) -> None:
        self.plug = plug
        self.engine = engine
        self.query_text = query_text
        self.batch_size = batch_size
        self.retrieved_tokens = retrieved_tokens
        # Threads overlap in the engine, if it allows that; tokenizers serve one at a time.
        self._tokenizing = threading.Lock()

    def answer(
        self,
        rows: Sequence[Row],
        decoding: Decoding,
        *,
        persona: PersonaKind = PersonaKind.OWN,
        strength: float = 1.0,
    ) -> list[Answer]:
        """Answers to any number of requests of one kind of persona at one strength, in their order."""
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        with self._tokenizing:
            prompts = [prompt for batch in batches for prompt in self._prompts(batch, persona, strength)]
        return self.engine.answer(prompts, decoding, [decoding.row_seed(row["request_id"]) for row in rows])

    @torch.inference_mode()
    def _prompts(self, rows: Sequence[Row], persona: PersonaKind, strength: float) -> list[Prompt]:
        ids = self.engine.tokenizer.prompts(prompt_texts(rows), retrieved_tokens=self.retrieved_tokens)
        inputs = plug_inputs(self.plug, self.query_text, rows, persona, self.engine.device, strength=strength)
        soft_BSD = soft_tokens(self.plug, inputs)
        return [Prompt(ids=row, soft_SD=soft_SD) for row, soft_SD in zip(ids, soft_BSD, strict=True)]
