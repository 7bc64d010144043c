"""Rules of a `generation_config.json`: answers follow them as `transformers.generate` does, or are refused."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from persona.engines import local
from persona.engines.base import Prompt
from persona.engines.local import LocalEngine
from persona.engines.rules import check_rules
from persona.errors import InputError
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptText
from persona.options import Decoding
from tests.plugs import random_soft_tokens

INPUTS = ["the movie is", "", "a paper with a title " * 5, "i like it", "rating one"]
ENDS = list(range(1, 31))  # so many that some answers end early
COMMON, EARLY = list(range(31, 90)), list(range(41, 111))
OF_BEAMS = {"length_penalty", "early_stopping"}  # rules that greedy answers do not follow
CASES = [
    {"forced_bos_token_id": 40},
    {"forced_eos_token_id": 2, "min_new_tokens": 11},
    {"begin_suppress_tokens": EARLY},
    {"begin_suppress_tokens": EARLY, "forced_bos_token_id": 40},
    {"min_new_tokens": 11},
    {"repetition_penalty": 0.2},
    {"repetition_penalty": 0.2, "no_repeat_ngram_size": 2},
    {"bad_words_ids": [*([token] for token in COMMON), [91, 92]]},
    {"sequence_bias": [[[45], 4.0], [[45, 45], -9.0]]},
    {"suppress_tokens": COMMON},
    {"exponential_decay_length_penalty": [1, 1.5]},
    {"length_penalty": 9.0},
    {"length_penalty": -4.0},
    {"length_penalty": 4.0, "early_stopping": "never"},
    {"early_stopping": True},
    {"no_repeat_ngram_size": 1, "min_new_tokens": 4, "length_penalty": 2.0, "early_stopping": True},
]


@pytest.fixture
def generated(monkeypatch) -> list[list[int]]:
    """Fills with the tokens of every answer."""
    answers: list[list[int]] = []

    def recording(decode):
        def record(*given, **others):
            found = decode(*given, **others)
            answers.extend(found)
            return found

        return record

    for name in ("sample", "beam_search"):
        monkeypatch.setattr(local, name, recording(getattr(local, name)))
    return answers


def prompts_of(llm: FrozenLLM) -> list[Prompt]:
    ids = llm.tokenizer.prompts([PromptText(input=text) for text in INPUTS])
    soft_BSD = random_soft_tokens(llm, len(ids))
    return [Prompt(ids=row, soft_SD=soft_SD) for row, soft_SD in zip(ids, soft_BSD, strict=True)]


def plain_answers(llm: FrozenLLM, prompts: list[Prompt], decoding: Decoding) -> list[list[int]]:
    """Those of `transformers.generate`, one by one."""
    found = []
    for prompt in prompts:
        parts = [torch.tensor(ids, dtype=torch.long) for ids in (prompt.ids.before, prompt.ids.after)]
        embeds = torch.cat([llm.embed(parts[0]), prompt.soft_SD, llm.embed(parts[1])]).unsqueeze(0)
        config = copy.deepcopy(llm.model.generation_config)
        config.max_new_tokens, config.num_beams, config.do_sample = decoding.max_new_tokens, decoding.beams, False
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        [row] = llm.model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config).tolist()
        found.append(row[1:] if llm.is_encoder_decoder else row)
    return found


def until_end(row: list[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in ENDS), None)]


RULES_AND_BEAMS = [(rules, beams) for rules in CASES for beams in (1, 3) if beams > 1 or not rules.keys() <= OF_BEAMS]


@pytest.mark.parametrize(
    ("rules", "beams"), RULES_AND_BEAMS, ids=[f"{' '.join(rules)}-{beams}" for rules, beams in RULES_AND_BEAMS]
)
@pytest.mark.filterwarnings("ignore:Passing .* with .inputs_embeds:UserWarning")  # the prompt has no ids, as here
def test_answers_follow_the_rules_as_those_of_transformers(llm, generated, rules, beams):
    llm.model.generation_config.update(eos_token_id=ENDS, pad_token_id=0)
    decoding, prompts = Decoding(max_new_tokens=12, beams=beams), prompts_of(llm)
    LocalEngine(llm, batch_size=5).answer(prompts, decoding, range(5))
    without = [until_end(row) for row in generated]
    generated.clear()
    llm.model.generation_config.update(**rules)
    LocalEngine(llm, batch_size=5).answer(prompts, decoding, range(5))
    assert [until_end(row) for row in generated] == [until_end(row) for row in plain_answers(llm, prompts, decoding)]
    assert [until_end(row) for row in generated] != without


def test_the_length_rules_of_an_encoder_decoder_llm_count_its_first_token(t5_folder, generated):
    llm = FrozenLLM.load(t5_folder, precision="fp32", device="cpu")
    llm.model.generation_config.update(eos_token_id=ENDS, pad_token_id=0, min_length=5)
    prompts, decoding = prompts_of(llm), Decoding(max_new_tokens=12, beams=1)
    LocalEngine(llm, batch_size=5).answer(prompts, decoding, range(5))
    assert [until_end(row) for row in generated] == [until_end(row) for row in plain_answers(llm, prompts, decoding)]
    assert min(len(until_end(row)) for row in generated) == 5


@pytest.mark.parametrize(
    "setting",
    [
        {"guidance_scale": 1.5},
        {"encoder_no_repeat_ngram_size": 3},
        {"encoder_repetition_penalty": 1.2},
        {"watermarking_config": {"bias": 2.5}},
        {"stop_strings": ["."]},
        {"max_time": 3.0},
        {"token_healing": True},
        {"penalty_alpha": 0.6},
        {"dola_layers": "high"},
        {"num_beam_groups": 2},
        {"diversity_penalty": 0.5},
        {"cache_implementation": "quantized"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_are_not_followed_are_refused_by_name(llm, setting):
    llm.model.generation_config.update(**setting)
    with pytest.raises(InputError, match=f"--llm: .*{next(iter(setting))}"):
        LocalEngine(llm, batch_size=1)


def test_a_least_length_that_includes_the_prompt_is_refused():
    config = GenerationConfig(min_length=5)
    with pytest.raises(InputError, match="set min_new_tokens instead"):
        check_rules(config, is_encoder_decoder=False)
    check_rules(config, is_encoder_decoder=True)


def test_settings_of_sampling_length_and_beams_are_those_of_the_flags(llm):
    prompts = prompts_of(llm)
    plain = LocalEngine(llm, batch_size=5).answer(prompts, Decoding(max_new_tokens=8, beams=2), range(5))
    llm.model.generation_config.update(do_sample=True, temperature=0.1, top_k=3, top_p=0.5, num_beams=4, max_length=3)
    assert LocalEngine(llm, batch_size=5).answer(prompts, Decoding(max_new_tokens=8, beams=2), range(5)) == plain
