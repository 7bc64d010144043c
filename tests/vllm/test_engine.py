"""Answers of vLLM equal those of `local` in float32, in any batch, and after it has been killed.

Each engine is real and takes seconds to start, so the tests share a few.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from persona.engines import local
from persona.engines.base import Answer, EngineSettings, Prompt, engine_module
from persona.engines.options import EngineOptions
from persona.engines.vllm.client import MAX_RESTARTS
from persona.errors import InputError
from persona.models.prompts import PromptText
from persona.models.resolve import ModelFolder, resolve
from persona.options import Decoding, PromptOptions
from tests.vllm.models import tiny

GREEDY = Decoding(max_new_tokens=12, beams=1)
SAMPLED = Decoding(max_new_tokens=12, beams=1, sample=True, sampling_temperature=0.8, top_p=0.9)
TEXTS = ["the movie is a comedy", "a", "it is of the title and it is a movie", "the the the", "of it"]
# Plain, with rules in its generation_config.json, with scaled embeddings, with learned positions.
EQUAL = ("Llama 3", "Qwen2.5-Instruct", "Gemma", "GPT-2")


def folder_of(name: str, target: Path) -> ModelFolder:
    return resolve(str(tiny(name, target)), flag="--llm")


def settings(**options: Any) -> EngineSettings:
    return EngineSettings(
        max_input_tokens=64,
        prompt=PromptOptions(prompt_format="plain"),
        precision="fp32",
        batch_size=3,
        options=EngineOptions(engine="vllm", **{"max_model_len": 256, **options}),
    )


def start(folder: ModelFolder, **options: Any) -> Any:
    module = engine_module("vllm")
    module.check(folder, settings(**options), GREEDY)
    return module.load(folder, settings(**options))


def prompts_of(engine: Any, texts: list[str], *, n_soft: int = 3) -> list[Prompt]:
    """Prompts with other soft tokens each, of the size of embeddings; the second one has none."""
    torch.manual_seed(0)
    ids = engine.tokenizer.prompts([PromptText(input=text) for text in texts])
    counts = [0 if i == 1 else n_soft for i in range(len(ids))]
    return [Prompt(ids=row, soft_SD=torch.randn(n, engine.width)) for row, n in zip(ids, counts, strict=True)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return folder_of("Llama 3", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(llama: ModelFolder) -> Iterator[Any]:
    """A Llama in vLLM."""
    started = start(llama)
    yield started
    started.client.close()


@pytest.fixture(scope="module")
def small(llama: ModelFolder) -> Iterator[Any]:
    """The same with so small a cache that running requests are preempted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("persona.engines.vllm.engine.AsyncEngineArgs", _with(num_gpu_blocks_override=6, block_size=32))
        started = start(llama, max_model_len=64)
    yield started
    started.client.close()


def _with(**more: Any) -> Any:
    from vllm import AsyncEngineArgs

    return lambda **arguments: AsyncEngineArgs(**arguments, **more)


@pytest.mark.parametrize("name", EQUAL)
def test_greedy_answers_in_float32_equal_those_of_local(name: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    plain = replace(settings(), options=EngineOptions())
    reference = local.load(folder, plain)
    served = start(folder)
    try:
        prompts = prompts_of(reference, TEXTS)
        expected = reference.answer(prompts, GREEDY, [0] * len(prompts))
        assert served.answer(prompts, GREEDY, [0] * len(prompts)) == expected
        assert len({answer.text for answer in expected}) > 2
        assert (served.width, served.eos_ids) == (reference.width, reference.eos_ids)
    finally:
        served.client.close()


def test_an_llm_that_scales_soft_tokens_in_vllm_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Falcon-H1|reads embeddings in another way than with transformers"):
        start(folder_of("Falcon-H1", tmp_path))


def test_a_sampled_answer_depends_on_its_seed_alone(engine: Any) -> None:
    prompts = prompts_of(engine, TEXTS)
    seeds = list(range(len(prompts)))
    together = engine.answer(prompts, SAMPLED, seeds)
    alone = [engine.answer([prompt], SAMPLED, [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert together == alone == engine.answer(prompts[::-1], SAMPLED, seeds[::-1])[::-1]
    assert together != engine.answer(prompts, SAMPLED, [seed + 10 for seed in seeds])


def test_users_with_the_same_text_get_answers_of_their_own(engine: Any, small: Any) -> None:
    """All at once, with requests that are preempted and read again in parts."""
    prompts = prompts_of(engine, [TEXTS[2]] * 24)
    alone = [engine.answer([prompt], GREEDY, [0])[0] for prompt in prompts]
    assert len(set(alone)) > 4, "soft tokens have no effect"
    for _ in range(2):  # what the first round has left in the cache must not be found
        assert small.answer(prompts, GREEDY, [0] * len(prompts)) == alone
        assert engine.answer(prompts, GREEDY, [0] * len(prompts)) == alone


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(small: Any) -> None:
    prompts = prompts_of(small, ["the movie " * 25])
    length = len(prompts[0].ids) + 3
    said = f"a prompt of {length} tokens and 12 new ones do not fit 64 tokens.*--max-model-len {length + 12}"
    with pytest.raises(InputError, match=said):
        small.answer(prompts, GREEDY, [0])


def test_an_engine_that_is_killed_is_started_again_a_few_times(llama: ModelFolder, engine: Any) -> None:
    served = start(llama)
    prompts = prompts_of(served, TEXTS)
    expected: list[Answer] = engine.answer(prompts, GREEDY, [0] * len(prompts))
    try:
        kill_core(served)
        assert served.answer(prompts, GREEDY, [0] * len(prompts)) == expected
        served.client._n_restarts = MAX_RESTARTS
        kill_core(served)
        with pytest.raises(InputError, match=f"vLLM has died {MAX_RESTARTS + 1} times; finished answers are kept"):
            served.answer(prompts, GREEDY, [0] * len(prompts))
    finally:
        served.client.close()


def kill_core(served: Any) -> None:
    """Kills the process that schedules this engine's requests."""
    for process in served.client._llm.engine_core.resources.engine_manager.processes:
        psutil.Process(process.pid).kill()


def test_two_processes_share_each_layer(llama: ModelFolder, engine: Any) -> None:
    served = start(llama, tensor_parallel=2)
    try:
        prompts = prompts_of(served, TEXTS)
        assert served.answer(prompts, GREEDY, [0] * 5) == engine.answer(prompts, GREEDY, [0] * 5)
    finally:
        served.client.close()
