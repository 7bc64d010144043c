"""The `local` engine: transformers in this process, on a GPU or CPU, for encoder-decoder and decoder-only LLMs.

Shapes: B prompts of a batch, S soft tokens, D LLM width.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, islice

import torch

from persona.engines.base import Answer, Engine, Prompt
from persona.engines.decoding import SeededSampling, beam_search, sample
from persona.engines.kv_cache import CausalSteps, Seq2SeqSteps
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder
from persona.options import Decoding, Precision


def load(folder: ModelFolder, *, max_input_tokens: int, precision: Precision, batch_size: int) -> Engine:
    """Loads the LLM of a folder, on a GPU if there is one."""
    llm = FrozenLLM.load(folder, max_input_tokens=max_input_tokens, precision=precision)
    return LocalEngine(llm, batch_size=batch_size)


class LocalEngine:
    """Answers with a loaded LLM, `batch_size` prompts at a time."""

    def __init__(self, llm: FrozenLLM, *, batch_size: int) -> None:
        self.llm = llm
        self.tokenizer = llm.tokenizer
        self.width = llm.width
        self.batch_size = batch_size
        self.eos_ids = llm.tokenizer.eos_ids(llm.model.generation_config)

    @property
    def device(self) -> torch.device:
        """The LLM's device."""
        return self.llm.device

    @property
    def dtype(self) -> torch.dtype:
        """The LLM's precision."""
        return self.llm.dtype

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int]) -> list[Answer]:
        """Answers to prompts, in their order; `seeds` are one per prompt."""
        answers: list[Answer] = []
        for batch in _batches(prompts, seeds, self.batch_size):
            answers += [self._answer(generated) for generated in self._generate(batch, decoding)]
        return answers

    def _generate(self, batch: Sequence[tuple[Prompt, int]], decoding: Decoding) -> list[list[int]]:
        """The tokens of each answer, the end-of-sequence token included."""
        prompts = [prompt for prompt, _ in batch]
        soft_BSD = torch.stack([prompt.soft_SD for prompt in prompts]).to(self.device)
        embeds_BLD, mask_BL = self.llm.embed_prompts(soft_BSD, [prompt.ids for prompt in prompts])
        steps_of_kind = Seq2SeqSteps if self.llm.is_encoder_decoder else CausalSteps
        steps = steps_of_kind(self.llm.model, embeds_BLD, mask_BL)
        if decoding.beams > 1:
            return beam_search(
                steps, beams=decoding.beams, max_new_tokens=decoding.max_new_tokens, eos_ids=self.eos_ids
            )
        sampling = SeededSampling(decoding, [seed for _, seed in batch], self.device) if decoding.sample else None
        return sample(steps, max_new_tokens=decoding.max_new_tokens, eos_ids=self.eos_ids, sampling=sampling)

    def _answer(self, generated: list[int]) -> Answer:
        end = next((i for i, token in enumerate(generated) if token in self.eos_ids), None)
        tokens = generated[:end]
        text = self.tokenizer.decode(tokens)
        return Answer(text=text, n_tokens=len(tokens), finish_reason="length" if end is None else "stop")


def _batches(prompts: Sequence[Prompt], seeds: Sequence[int], batch_size: int) -> Iterator[list[tuple[Prompt, int]]]:
    """Consecutive prompts with their seeds; all prompts of a batch have the same number of soft tokens."""
    for _, group in groupby(zip(prompts, seeds, strict=True), key=lambda one: len(one[0].soft_SD)):
        while batch := list(islice(group, batch_size)):
            yield batch
