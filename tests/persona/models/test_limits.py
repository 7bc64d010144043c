"""Requests that an LLM has no positions or no embeddings for are refused before any work."""

import pytest
from transformers import AutoConfig, AutoTokenizer

from persona.errors import InputError, UsageError
from persona.models.limits import check_positions, check_vocabulary
from persona.models.prompts import PromptTokenizer

# `tiny_llama` adds <s> in front, which counts as input, and a separator behind.
REQUEST = 20 + 1


def positions(folder, config, *, retrieved_tokens=0, **others):
    tokenizer = PromptTokenizer.load(folder, max_input_tokens=20)
    sizes = {
        "n_soft": 3,
        "retrieved_tokens": retrieved_tokens,
        "answer_tokens": 20,
        "answer_flag": "--max-target-tokens",
    }
    sizes |= others
    check_positions("a folder", config, tokenizer, **sizes)


def test_a_row_of_a_decoder_only_llm_holds_request_soft_tokens_texts_and_answer(llama_folder):
    needed = REQUEST + 3 + 20
    positions(llama_folder, AutoConfig.for_model("gpt2", n_positions=needed))
    with pytest.raises(
        UsageError, match=f"{needed - 1} positions, but 21 tokens .* would need {needed}; lower --max-i"
    ):
        positions(llama_folder, AutoConfig.for_model("gpt2", n_positions=needed - 1))
    positions(llama_folder, AutoConfig.for_model("gpt2", n_positions=needed + 8), retrieved_tokens=8)
    with pytest.raises(UsageError, match="8 of retrieved texts .* lower --max-input-tokens or --retrieve-tokens"):
        positions(llama_folder, AutoConfig.for_model("gpt2", n_positions=needed + 7), retrieved_tokens=8)
    with pytest.raises(UsageError, match="or --max-new-tokens"):
        positions(
            llama_folder,
            AutoConfig.for_model("llama", max_position_embeddings=99),
            answer_tokens=90,
            answer_flag="--max-new-tokens",
        )


def test_encoder_and_decoder_are_checked_separately(t5_folder):
    needed = 20 + 3  # without a separator
    positions(t5_folder, AutoConfig.for_model("bart", max_position_embeddings=needed))
    with pytest.raises(UsageError, match=f"would need {needed}"):
        positions(t5_folder, AutoConfig.for_model("bart", max_position_embeddings=needed - 1))
    with pytest.raises(UsageError, match="has 30 positions, but 40 of an answer would need 40; lower --max-new-tokens"):
        positions(
            t5_folder,
            AutoConfig.for_model("bart", max_position_embeddings=30),
            answer_tokens=40,
            answer_flag="--max-new-tokens",
        )


def test_relative_positions_have_no_limit(t5_folder):
    positions(t5_folder, AutoConfig.for_model("t5"), answer_tokens=10_000)


def test_tokens_beyond_the_vocabulary_are_refused_unless_no_prompt_has_them(llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder.path)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    check_vocabulary("a folder", config, PromptTokenizer(tokenizer, is_encoder_decoder=False))
    tokenizer.add_tokens(["persona"])
    with pytest.raises(
        InputError, match=r"has 1 beyond it \('persona'\); tokenizer and weights do not belong together"
    ):
        check_vocabulary("a folder", config, PromptTokenizer(tokenizer, is_encoder_decoder=False))
