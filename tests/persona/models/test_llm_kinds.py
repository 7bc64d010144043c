"""Kinds of LLMs that are refused by name, and what single kinds need."""

import pytest
from transformers import AutoConfig

from persona.errors import InputError
from persona.models.llm_kinds import check_kind, embedding_scale


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "cache"),
        ("rwkv", "cache"),
        ("openai-gpt", "cache"),
        ("recurrent_gemma", "cache"),
        ("xlnet", "any order"),
        ("prophetnet", "several tokens"),
        ("switch_transformers", "experts"),
        ("mbart", "language"),
        ("bert", "encoder"),
        ("xlm-roberta", "encoder"),
        ("llama4", "images or sound"),
        ("whisper", "no language model"),
        ("gemma3n_text", "look up token ids"),
        ("vit", "no language model"),
    ],
)
def test_kinds_that_cannot_be_right_are_refused_with_the_reason(kind, reason):
    with pytest.raises(InputError, match=f"--llm: 'a folder' is of the kind '{kind}'.*{reason}.*choose another LLM"):
        check_kind("a folder", AutoConfig.for_model(kind))


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "gpt2",
        "mistral",
        "qwen3",
        "gemma3_text",
        "gemma3",
        "gpt_oss",
        "dbrx",
        "mpt",
        "lfm2",
        "t5",
        "bart",
        "t5gemma",
    ],
)
def test_other_kinds_are_left_to_the_probe(kind):
    check_kind("a folder", AutoConfig.for_model(kind))


def test_the_scale_of_embeddings_is_that_outside_the_embedding_module():
    assert embedding_scale(AutoConfig.for_model("pegasus", d_model=64, scale_embedding=True)) == 8
    assert embedding_scale(AutoConfig.for_model("pegasus", d_model=64, scale_embedding=False)) == 1
    assert embedding_scale(AutoConfig.for_model("bart", d_model=64, scale_embedding=True)) == 1  # inside its module
    assert embedding_scale(AutoConfig.for_model("falcon_h1", embedding_multiplier=5.65)) == 5.65
