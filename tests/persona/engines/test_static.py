"""Answers with a static key-value cache are those with a growing one, or the probe keeps to the latter.

A CPU runs the same code as a GPU, but for the graphs.
"""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from persona.engines import static_cache, static_steps
from persona.engines.base import Prompt
from persona.engines.decoding import _Ends
from persona.engines.local import LocalEngine
from persona.engines.static_cache import StaticCache
from persona.engines.static_probe import static_difference, static_llm
from persona.engines.static_steps import KINDS, StaticLLM, _Shape
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptText
from persona.models.resolve import resolve
from persona.options import Decoding
from tests.llms import LLMS, build
from tests.models import tiny_llm
from tests.plugs import random_soft_tokens

GREEDY, BEAMS = Decoding(max_new_tokens=10, beams=1), Decoding(max_new_tokens=10, beams=4)
SAMPLE = Decoding(max_new_tokens=10, beams=1, sample=True, sampling_temperature=0.8, top_p=0.9)
FAMILIES = {family.name: family for family in LLMS}
NAMES = (
    *("Llama 3", "Mistral Instruct", "Qwen2", "Qwen3", "Gemma", "Phi-3 Instruct", "Granite", "SmolLM3"),
    *("T5", "FLAN-T5"),
)
ENDS = list(range(1, 31))
# Some rows end early, so that the batch shrinks twice.
TEXTS = [
    f"{text} {number}" for number in range(7) for text in ("the movie is", "it", "a paper with a title of a title")
]
CAUSAL = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def load(folder: Path) -> FrozenLLM:
    return FrozenLLM.load(resolve(str(folder), flag="--llm"), precision="fp32", device="cpu")


def prompts_of(llm: FrozenLLM, texts: list[str]) -> list[Prompt]:
    ids = llm.tokenizer.prompts([PromptText(input=text) for text in texts])
    rows = zip(ids, random_soft_tokens(llm, len(texts)), strict=True)
    return [Prompt(ids=row, soft_SD=soft_SD) for row, soft_SD in rows]


def engines(llm: FrozenLLM, batch_size: int = 32) -> tuple[LocalEngine, LocalEngine, StaticLLM]:
    """With a growing cache, with a static one, and the latter."""
    engine = LocalEngine(llm, batch_size=batch_size, static=True)
    assert engine.static is not None
    return LocalEngine(llm, batch_size=batch_size, static=False), engine, engine.static


def test_every_kind_is_tested():
    assert {FAMILIES[name].model_type for name in NAMES} == set(KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_every_kind_are_those_with_a_growing_cache(tmp_path, name):
    llm = load(build(FAMILIES[name], tmp_path / "llm"))
    growing, engine, static = engines(llm)
    prompts = prompts_of(llm, TEXTS[:6])
    found = [engine.answer(prompts, decoding, range(6)) for decoding in (GREEDY, BEAMS, SAMPLE)]
    assert found == [growing.answer(prompts, decoding, range(6)) for decoding in (GREEDY, BEAMS, SAMPLE)]
    assert len({answer.text for answers in found for answer in answers}) > 1
    assert static.room.rows == 24


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, SAMPLE], ids=["greedy", "beams", "sample"])
def test_a_batch_shrinks_when_half_of_its_rows_have_ended(llm, decoding):
    llm.model.generation_config.update(eos_token_id=list(range(1, 61 if decoding is BEAMS else 31)))
    decoding = replace(decoding, max_new_tokens=24)
    growing, engine, static = engines(llm)
    prompts, seeds = prompts_of(llm, TEXTS), range(len(TEXTS))
    answers = engine.answer(prompts, decoding, seeds)
    assert answers == growing.answer(prompts, decoding, seeds)
    assert len({answer.n_tokens for answer in answers}) > 3
    most = decoding.beams * len(TEXTS)
    rows = [shape.rows for shape in static._steps]
    assert rows[0] == most
    assert len(rows) > 1
    assert set(rows) <= {most, 64, 32, 16, 8}
    # Again, with the steps and the caches that are there, and alone.
    assert engine.answer(prompts, decoding, seeds) == answers
    assert engine.answer(prompts[4:5], decoding, seeds[4:5]) == answers[4:5]


@pytest.mark.parametrize(
    ("decoding", "rules"),
    [
        (GREEDY, {"repetition_penalty": 1.3}),
        (SAMPLE, {"repetition_penalty": 1.3, "min_new_tokens": 3}),
        (GREEDY, {"no_repeat_ngram_size": 2}),
        (BEAMS, {"repetition_penalty": 1.3}),
        (BEAMS, {"early_stopping": True, "length_penalty": 2.0}),
        (BEAMS, {"early_stopping": "never", "length_penalty": 0.5}),
    ],
    ids=str,
)
def test_rules_for_answers_are_followed(llm, decoding, rules):
    llm.model.generation_config.update(eos_token_id=ENDS, **rules)
    growing, engine, _ = engines(llm)
    prompts, seeds = prompts_of(llm, TEXTS), range(len(TEXTS))
    answers = engine.answer(prompts, decoding, seeds)
    assert answers == growing.answer(prompts, decoding, seeds)


def test_longer_prompts_and_larger_batches_get_a_larger_cache(llm):
    growing, engine, static = engines(llm, batch_size=3)
    for texts in (TEXTS[:2], ["a paper with a title " * 20, *TEXTS[:2]], TEXTS[:3]):
        prompts, seeds = prompts_of(llm, texts), range(len(texts))
        assert engine.answer(prompts, GREEDY, seeds) == growing.answer(prompts, GREEDY, seeds)
    assert static.room.rows == 4  # of the probe
    assert max(static.room[1:]) > 64
    assert engine.answer([], GREEDY, []) == []


def test_the_number_of_graphs_is_bounded(llm):
    static = StaticLLM(llm)
    shapes = [_Shape(1, 64 * n, 64 * llm.is_encoder_decoder) for n in range(1, 20)]
    static._make_room(shapes[-1])
    first = static.step(1, shapes[0])
    assert static.step(1, shapes[0]) is first
    for shape in shapes:
        static.step(1, shape)
    assert len(static._steps) == 16
    assert static.step(1, shapes[0]) is not first


def test_prompts_that_reach_a_layers_window_get_a_growing_cache(tmp_path):
    llm = load(tiny_llm(tmp_path, "mistral", **CAUSAL, sliding_window=40))
    growing, engine, static = engines(llm)
    static._steps.clear()
    for texts, is_static in ((TEXTS[:3], True), (["a paper with a title " * 9], False)):
        prompts = prompts_of(llm, texts)
        assert engine.answer(prompts, GREEDY, range(3)[: len(texts)]) == growing.answer(
            prompts, GREEDY, range(3)[: len(texts)]
        )
        assert bool(static._steps) is is_static
        static._steps.clear()


# The probe --------------------------------------------------------------------------------------------------


def test_the_probe_notices_a_window_that_is_overlooked(tmp_path):
    llm = load(tiny_llm(tmp_path, "mistral", **CAUSAL, sliding_window=4))
    static = StaticLLM(llm)
    assert static_difference(static) == 0  # with a growing cache
    static._window = lambda: 1000  # type: ignore[method-assign]
    assert static_difference(static) > 0.05


def test_an_llm_whose_cache_is_of_another_size_gets_a_growing_one_and_a_warning(llama_folder, caplog):
    llm = FrozenLLM.load(llama_folder, precision="fp32", device="cpu")
    llm.model.config.num_key_value_heads = 4
    assert static_llm(llm) is None
    [record] = caplog.records
    assert "no static key-value cache (RuntimeError: " in record.getMessage()


def test_other_kinds_get_a_growing_cache_without_a_warning(tmp_path, caplog):
    assert LocalEngine(load(build(FAMILIES["Gemma 2"], tmp_path)), batch_size=1, static=True).static is None
    llm = load(tiny_llm(tmp_path / "varying", "llama", **CAUSAL))
    llm.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert static_llm(llm) is None
    assert not caplog.records


def test_a_cpu_has_a_growing_cache_unless_told_otherwise(llm):
    assert LocalEngine(llm, batch_size=1).static is None


def test_too_little_memory_means_a_growing_cache_and_one_warning(llm, monkeypatch, caplog):
    growing, engine, static = engines(llm)

    def full(*_, **__):
        raise torch.OutOfMemoryError

    # Memory runs out for one that is larger than the probe's.
    monkeypatch.setattr(static_steps, "StaticCache", full)
    prompts = prompts_of(llm, TEXTS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert engine.answer(prompts, GREEDY, range(21)) == growing.answer(prompts, GREEDY, range(21))
    [record] = caplog.records
    assert record.getMessage().startswith("too little memory for a static key-value cache of 21 rows and 64 tokens: ")
    assert not static.caches


# Parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied_bytes", [1, 2**20])
def test_rows_move_at_some_places_only(monkeypatch, copied_bytes):
    monkeypatch.setattr(static_cache, "_COPIED_BYTES", copied_bytes)
    cache = StaticCache(2, (5, 3, 8, 4), dtype=torch.float32, device=torch.device("cpu"))
    before = cache.kv_ANhPw.normal_().clone()
    address, rows_R = cache.kv_ANhPw.data_ptr(), torch.tensor([2, 0, 0])
    cache.move_rows(rows_R, 2, 7)
    expected = before.clone()
    expected[:, :3, :, 2:7] = before[:, rows_R, :, 2:7]
    assert torch.equal(cache.kv_ANhPw, expected)
    assert cache.kv_ANhPw.data_ptr() == address


def test_a_static_batch_learns_a_step_late_which_rows_have_ended():
    flags = [torch.tensor(flags) for flags in ([True, False, False], [False, True, False], [False, False, False])]
    ends = _Ends(3, torch.device("cpu"), is_static=True)
    assert [ends.running(ended_R) for ended_R in flags] == [[0, 1, 2], [1, 2], [2]]
    assert [ends.should_leave(rows) for rows in ([1, 2], [2], [])] == [False, True, True]
    ends.keep(torch.tensor([2]))
    assert ends.running(torch.tensor([True])) == [0]
    assert ends.running(torch.tensor([False])) == []
    ends = _Ends(3, torch.device("cpu"), is_static=False)
    assert [ends.running(ended_R) for ended_R in flags] == [[1, 2], [2], [2]]
    assert [ends.should_leave(rows) for rows in ([0, 1, 2], [1, 2], [])] == [False, True, True]
