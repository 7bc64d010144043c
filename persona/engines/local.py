"""The `local` engine: transformers in this process, on a GPU or CPU, for encoder-decoder and decoder-only LLMs.

Shapes: B prompts of a batch, S soft tokens, D LLM width.
"""

from collections.abc import Iterator, Sequence

import torch

from persona.engines import probe
from persona.engines.base import Answer, Engine, EngineSettings, Prompt
from persona.engines.decoding import DecodingSteps, SeededSampling, beam_search, sample
from persona.engines.kv_cache import start_steps
from persona.engines.rules import answer_rules, check_rules
from persona.engines.static_probe import static_llm
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder
from persona.options import Decoding

N_CALLS = 1


def check(folder: ModelFolder, settings: EngineSettings, decoding: Decoding) -> None:
    """Nothing to refuse: `persona.models.llm_kinds` and `persona.engines.rules` judge the LLM for every engine."""


def identity(decoding: Decoding) -> str:
    """Nothing: the search algorithms are those of transformers, and a seed gives the same draws."""
    del decoding
    return ""


def load(folder: ModelFolder, settings: EngineSettings) -> Engine:
    """Loads the LLM of a folder, on a GPU if there is one. Raises InputError if it would not answer rightly."""
    llm = FrozenLLM.load(
        folder,
        max_input_tokens=settings.max_input_tokens,
        prompt=settings.prompt,
        precision=settings.precision,
        quantization=settings.quantization,
        device=settings.device,
    )
    probe.check_llm(llm)
    return LocalEngine(llm, batch_size=settings.batch_size)


class LocalEngine:
    """Answers with a loaded LLM, `batch_size` prompts at a time.

    Args:
        llm: the LLM.
        batch_size: prompts per forward pass.
        static: whether steps have few shapes, each with a CUDA graph, if that is possible; by default on a GPU.
    """

    def __init__(self, llm: FrozenLLM, *, batch_size: int, static: bool | None = None) -> None:
        self.llm = llm
        self.tokenizer = llm.tokenizer
        self.width = llm.width
        self.batch_size = batch_size
        config = llm.model.generation_config
        check_rules(config, is_encoder_decoder=llm.is_encoder_decoder)
        self.eos_ids = llm.tokenizer.eos_ids(config)
        self.start_ids = [] if llm.start_id is None else [llm.start_id]
        is_static = llm.device.type == "cuda" if static is None else static
        self.static = static_llm(llm) if is_static else None

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
        seeded = list(zip(prompts, seeds, strict=True))
        answers: dict[int, Answer] = {}
        for batch in self._batches(prompts):
            generated = self._generate([seeded[i] for i in batch], decoding)
            found = [Answer.of(tokens, self.tokenizer, self.eos_ids) for tokens in generated]
            answers |= zip(batch, found, strict=True)
        return [answers[i] for i in range(len(prompts))]

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Numbers of at most `batch_size` prompts with as many soft tokens, and of one length if padding counts."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, prompt in enumerate(prompts):
            length = 0 if self.llm.can_mask_padding else len(prompt.ids)
            groups.setdefault((len(prompt.soft_SD), length), []).append(i)
        for group in groups.values():
            yield from (group[start : start + self.batch_size] for start in range(0, len(group), self.batch_size))

    def _generate(self, batch: Sequence[tuple[Prompt, int]], decoding: Decoding) -> list[list[int]]:
        """The tokens of each answer, the end-of-sequence token included."""
        soft_BSD = torch.stack([prompt.soft_SD for prompt, _ in batch]).to(self.device)
        prompts = [prompt.ids for prompt, _ in batch]
        if self.static is None:
            steps: DecodingSteps = start_steps(self.llm, soft_BSD, prompts)
        else:
            steps = self.static.start_steps(soft_BSD, prompts, n_new=decoding.max_new_tokens, beams=decoding.beams)
        rules = answer_rules(
            self.llm.model.generation_config,
            eos_ids=self.eos_ids,
            start_ids=self.start_ids,
            max_new_tokens=decoding.max_new_tokens,
            device=self.device,
        )
        if decoding.beams > 1:
            return beam_search(steps, rules, beams=decoding.beams)
        sampling = SeededSampling(decoding, [seed for _, seed in batch], self.device) if decoding.sample else None
        return sample(steps, rules, sampling)
