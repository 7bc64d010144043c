"""The one place where the matrix calls this project's LLM code."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from jobs.runtime import plugs
from persona.engines import probe
from persona.engines.base import Prompt
from persona.engines.local import LocalEngine
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptText
from persona.models.resolve import resolve
from persona.options import Decoding, Precision, PromptOptions
from tests.matrix.requests import Request

_ALL_TEXTS = 10_000


class OurLLM:
    """An LLM of a folder as the jobs check and load it, with its engine for answers.

    Raises PersonaError when it is refused.
    """

    def __init__(self, folder: Path, *, precision: Precision = "fp32", soft_first: bool = False) -> None:
        found = resolve(str(folder), flag="--llm")
        prompt = PromptOptions(soft_position="start" if soft_first else "input")
        limits = {"max_input_tokens": 64, "max_target_tokens": 64, "retrieved_tokens": 64, "max_new_tokens": 32}
        plugs.check_llm(found, prompt=prompt, n_soft=3, **limits)
        self.llm = FrozenLLM.load(found, prompt=prompt, precision=precision, device="cpu")
        probe.check_llm(self.llm)
        self.engine = LocalEngine(self.llm, batch_size=8)
        # Answers are compared by their tokens: different tokens may have the same text.
        self.engine.tokenizer.decode = lambda ids: " ".join(map(str, ids))

    @property
    def needs_one_prompt_length(self) -> bool:
        """Whether prompts of different lengths are answered in different batches."""
        return not self.llm.can_mask_padding

    def checkpoint_activations(self) -> None:
        """Recomputes activations from now on."""
        self.llm.checkpoint_activations()

    def soft_tokens(self, requests: Sequence[Request]) -> Tensor:
        """The embeddings (B, S, D) of the requests' words."""
        ids = torch.tensor([list(request.soft_ids) for request in requests], dtype=torch.long)
        return self.llm.embed(ids).detach()

    def losses(
        self, requests: Sequence[Request], soft_BSD: Tensor | None = None, *, cache_before: bool = False
    ) -> Tensor:
        """The summed negative log-likelihood (B,) of each target; with a cache of what is in front of soft tokens."""
        soft_BSD = self.soft_tokens(requests) if soft_BSD is None else soft_BSD
        targets = self.llm.tokenizer.targets([request.target for request in requests])
        return self.llm.nll(soft_BSD, self._prompts(requests), targets, cache_before=cache_before)

    def gradient(self, requests: Sequence[Request]) -> Tensor:
        """The gradient (B, S, D) of the sum of losses."""
        soft_BSD = self.soft_tokens(requests).requires_grad_()
        self.losses(requests, soft_BSD).sum().backward()
        return soft_BSD.grad

    def answers(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> list[list[int]]:
        """The tokens of each answer, up to the end."""
        prompts = [
            Prompt(ids=ids, soft_SD=soft_SD)
            for ids, soft_SD in zip(self._prompts(requests), self.soft_tokens(requests), strict=True)
        ]
        decoding = Decoding(beams=beams, max_new_tokens=max_new_tokens)
        answers = self.engine.answer(prompts, decoding, seeds=[0] * len(prompts))
        return [[int(token) for token in answer.text.split()] for answer in answers]

    def _prompts(self, requests):
        texts = [PromptText(input=request.input, retrieved=request.texts) for request in requests]
        return self.llm.tokenizer.prompts(texts, retrieved_tokens=_ALL_TEXTS)
