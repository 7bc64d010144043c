"""Prompts with soft tokens as requests to vLLM, and what it generates as answers.

A prompt is a row of token ids with a mask of where soft tokens are. vLLM embeds the ids itself, so they are scaled as
the LLM scales them. Its prefix cache stays off: the key of a cached block leaves out that mask (vLLM issue 56655).

Shapes: S soft tokens, L tokens of a prompt with them, D LLM width.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from vllm import AsyncEngineArgs, SamplingParams
from vllm.inputs import EngineInput, embeds_input, tokens_input
from vllm.sampling_params import RequestOutputKind

from persona.engines import rules
from persona.engines.base import Answer, EngineSettings, Prompt
from persona.engines.vllm import probe
from persona.engines.vllm.client import Client, Request
from persona.engines.vllm.rules import engine_arguments
from persona.errors import InputError
from persona.models.device import choose_device, choose_precision
from persona.models.loading import load_config
from persona.models.prompts import PromptTokenizer
from persona.models.resolve import ModelFolder
from persona.options import Decoding

# The id at the place of a soft token. It is never embedded, but must be one of the vocabulary.
_PLACEHOLDER = 0


class VLLMEngine:
    """Answers with an LLM in vLLM's processes. Several threads may call `answer` at the same time."""

    def __init__(self, client: Client, folder: ModelFolder, settings: EngineSettings) -> None:
        self.client = client
        self.tokenizer = PromptTokenizer.load(
            folder, max_input_tokens=settings.max_input_tokens, prompt=settings.prompt
        )
        self.eos_ids = self.tokenizer.eos_ids(rules.generation_config(folder))
        self.width: int = load_config(folder).get_text_config().hidden_size
        self.device = choose_device()
        self.dtype = choose_precision(settings.precision, self.device)

    @classmethod
    def start(cls, folder: ModelFolder, settings: EngineSettings) -> "VLLMEngine":
        """Raises InputError if vLLM does not start, or would not answer rightly."""
        engine = cls(Client(_arguments(folder, settings)), folder, settings)
        probe.check_embeddings(engine.client, folder, engine.tokenizer, engine.dtype)
        return engine

    def answer(self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int]) -> list[Answer]:
        """Answers to prompts, in their order; `seeds` are one per prompt."""
        self._check_length(prompts, decoding)
        requests = [
            Request(inputs=partial(self._inputs, prompt), params=self._params(decoding, seed))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        generated = [list(output.token_ids) for output in self.client.generate(requests)]
        return [Answer.of(tokens, self.tokenizer, self.eos_ids) for tokens in generated]

    def _check_length(self, prompts: Sequence[Prompt], decoding: Decoding) -> None:
        """Raises InputError for a prompt that leaves too little room for its answer, which vLLM would cut silently."""
        longest = max((len(prompt.ids) + len(prompt.soft_SD) for prompt in prompts), default=0)
        if longest + decoding.max_new_tokens > (limit := self.client.max_model_len):
            raise InputError(
                f"--engine vllm: a prompt of {longest} tokens and {decoding.max_new_tokens} new ones do not fit "
                f"{limit} tokens, for which there is memory; give --max-model-len "
                f"{longest + decoding.max_new_tokens} and more memory (--gpu-memory-utilization, --tensor-parallel), "
                "or train a plug with a smaller --max-input-tokens"
            )

    def _params(self, decoding: Decoding, seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.sampling_temperature if decoding.sample else 0.0,
            top_p=decoding.top_p,
            seed=seed if decoding.sample else None,
            stop_token_ids=self.eos_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _inputs(self, prompt: Prompt) -> EngineInput:
        before, after, soft_SD = list(prompt.ids.before), list(prompt.ids.after), prompt.soft_SD
        if not len(soft_SD):
            return tokens_input([*before, *after])
        n_soft = len(soft_SD)
        embeds_LD: Tensor = torch.zeros(len(prompt.ids) + n_soft, self.width, dtype=self.dtype)
        embeds_LD[len(before) : len(before) + n_soft] = soft_SD.to(embeds_LD)
        return embeds_input(
            embeds_LD,
            prompt_token_ids=[*before, *[_PLACEHOLDER] * n_soft, *after],
            is_token_ids=[*[True] * len(before), *[False] * n_soft, *[True] * len(after)],
        )


def _arguments(folder: ModelFolder, settings: EngineSettings) -> AsyncEngineArgs:
    device, options = choose_device(), settings.options
    return AsyncEngineArgs(
        model=str(folder.path),
        skip_tokenizer_init=True,
        trust_remote_code=False,
        dtype=str(choose_precision(settings.precision, device)).removeprefix("torch."),
        enable_prompt_embeds=True,
        enable_prefix_caching=False,
        generation_config="vllm",  # ignores the folder's, which `rules` follows
        **engine_arguments(rules.generation_config(folder)),
        max_model_len=options.max_model_len or -1,  # -1: as much as the memory allows
        gpu_memory_utilization=options.gpu_memory_utilization,
        tensor_parallel_size=options.tensor_parallel,
        pipeline_parallel_size=options.pipeline_parallel,
        distributed_executor_backend="mp" if options.n_devices > 1 else None,
        enforce_eager=device.type == "cpu",  # compilation takes minutes there
        disable_log_stats=True,
        enable_log_requests=False,
    )
