"""Prompts as token ids: lengths, separators and special tokens, the same with and without the LLM."""

import pytest
from transformers import GenerationConfig

from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptTokenizer

TARGETS = ["good", "a longer target in two lines\nof text", "", "three", "x"]


@pytest.fixture
def prompts(llm_folder) -> PromptTokenizer:
    return PromptTokenizer.load(llm_folder)


def test_the_tokenizer_of_a_folder_is_that_of_its_llm(prompts, llm):
    texts = ["the movie is", "", "a paper " * 300]
    assert prompts.inputs(texts) == llm.tokenizer.inputs(texts)
    assert prompts.targets(texts) == llm.tokenizer.targets(texts)
    assert prompts.prefixes([texts], 12) == llm.tokenizer.prefixes([texts], 12)
    assert (prompts.eos_id, prompts.pad_id) == (llm.tokenizer.eos_id, llm.tokenizer.pad_id)


@pytest.mark.parametrize("source", ["tokenizer", "llm"])
def test_texts_are_cut_to_the_limit(llm_folder, source):
    if source == "tokenizer":
        prompts = PromptTokenizer.load(llm_folder, max_input_tokens=8, max_target_tokens=5)
    else:
        limits = {"max_input_tokens": 8, "max_target_tokens": 5}
        prompts = FrozenLLM.load(llm_folder, **limits, precision="fp32", device="cpu").tokenizer
    text, target = prompts.inputs(["x" * 100])[0], prompts.targets(["y" * 100])[0]
    assert len(text) == 8 + len(prompts.separator)
    assert len(target) == 5
    assert target[-1] == prompts.pretrained.eos_token_id


def test_a_target_is_its_text_and_the_end_of_sequence(prompts):
    for target, ids in zip(TARGETS, prompts.targets(TARGETS), strict=True):
        assert ids[-1] == prompts.pretrained.eos_token_id
        assert prompts.pretrained.bos_token_id not in ids
        assert prompts.pretrained.decode(ids[:-1]).split() == target.split()


def test_a_separator_ends_the_input_of_a_decoder_only_llm(prompts, llm):
    [text] = prompts.inputs(["the movie"])
    assert prompts.pretrained.decode(text).endswith("movie</s>" if llm.is_encoder_decoder else "movie\n")


def test_retrieved_texts_share_their_tokens_equally(prompts):
    text = "the movie is a paper in a title of it "
    one, two, three = prompts.prefixes([[text], [text, text], [text] * 3], 6)
    ids = prompts.pretrained(text, add_special_tokens=False)["input_ids"]
    n, end = len(prompts.separator), prompts.separator
    assert one == ids[: 6 - n] + end
    assert two == (ids[: 3 - n] + end) * 2
    assert three == (ids[: 2 - n] + end) * 3
    # Without room for one token of each, only separators are left, never more tokens than requested.
    assert all(len(prefix) <= 3 * max(n, 1) for prefix in prompts.prefixes([[text] * 3], 3))


def test_no_texts_give_no_rows(prompts):
    assert prompts.inputs([]) == prompts.targets([]) == prompts.prefixes([], 8) == []


def test_every_declared_end_of_sequence_counts_and_the_tokenizers_own(prompts):
    own = prompts.eos_id
    assert prompts.eos_ids(None) == [own]
    assert prompts.eos_ids(GenerationConfig(eos_token_id=9)) == sorted([own, 9])
    assert prompts.eos_ids(GenerationConfig(eos_token_id=[9, own, 7])) == sorted([own, 7, 9])
