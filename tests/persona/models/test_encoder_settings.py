"""How an encoder is used: what flags override, what folders decide, and what is refused before any work."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from persona.errors import InputError, UsageError
from persona.models.encoder import TextEncoder
from persona.models.encoder_settings import settle, settle_query
from persona.models.resolve import ModelFolder, resolve
from persona.models.sentence_transformer import read
from persona.options import VectorOptions
from tests.encoders import WIDTH, edit, reference, sentence_transformer, transformer

PROMPTS = {"query": "query: ", "document": "passage: "}


def found(path: Path) -> ModelFolder:
    return resolve(str(path), flag="--encoder")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two prompts and a dense layer, as sentence-transformers saves it."""
    return sentence_transformer(tmp_path_factory.mktemp("saved"), dense=[(24, nn.Tanh())], prompts=PROMPTS)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_plain_bert_takes_cls_and_its_own_width(encoder_folder):
    settings = settle(encoder_folder)
    assert (settings.pooling, settings.width, settings.max_tokens, settings.prompt) == ("cls", 32, 512, "")


def test_the_folder_decides_and_flags_override(saved):
    settings = settle(found(saved))
    assert (settings.pooling, settings.width, settings.prompt) == ("mean", 24, "passage: ")
    settings = settle(found(saved), VectorOptions(pooling="max", width=7, document_prompt=""), max_tokens=9)
    assert (settings.pooling, settings.width, settings.prompt, settings.max_tokens) == ("max", 7, "", 9)
    assert settle_query(found(saved), max_tokens=64).prompt == "query: "
    assert settle_query(found(saved), prompt="other: ", max_tokens=64).prompt == "other: "


def test_a_given_width_is_that_of_sentence_transformers(saved):
    encoder = TextEncoder(found(saved), pooling="mean", max_tokens=64, width=7, precision="fp32", device="cpu")
    expected = reference(saved).encode(["a walk"], truncate_dim=7, normalize_embeddings=True)
    assert encoder.width == 7
    assert abs(encoder.encode(["a walk"]).vectors - expected).max() < 2.0**-11


def test_a_width_beyond_the_vectors_is_refused(saved):
    with pytest.raises(UsageError, match=r"--width 25: the vectors of .* have only 24 components"):
        settle(found(saved), VectorOptions(width=25))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "mean"),  # sentence-transformers' default
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls+mean"),
    ],
)
def test_the_old_form_of_pooling_is_read(copy, flags, expected):
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **flags}))
    assert read(found(copy)).pooling == expected


def test_the_shorter_length_wins(copy):
    edit(copy / "sentence_bert_config.json", max_seq_length=40)
    assert settle(found(copy), max_tokens=512).max_tokens == 40
    assert settle(found(copy), max_tokens=20).max_tokens == 20
    assert settle_query(found(copy), max_tokens=276).max_tokens == 40


@pytest.mark.parametrize("plain", [False, True])
def test_the_length_in_tokenizer_config_counts_where_there_is_no_other(copy, plain):
    edit(copy / "tokenizer_config.json", model_max_length=33)
    if plain:
        for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
            (copy / name).unlink()
        shutil.rmtree(copy / "1_Pooling")
    assert settle(found(copy), max_tokens=512).max_tokens == 33
    assert reference(copy).max_seq_length == 33


@pytest.mark.parametrize(("kind", "most"), [("bert", 128), ("roberta", 127), ("mpnet", 126)])
def test_positions_that_start_behind_the_padding_id_are_not_tokens(tmp_path, kind, most):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    folder = found(transformer(tmp_path, kind, max_position_embeddings=128, **size))
    assert settle(folder, max_tokens=most).max_tokens == most
    with pytest.raises(UsageError, match=f"at most {most} tokens of a text, not {most + 1}"):
        settle(folder, max_tokens=most + 1)
    encoder = TextEncoder(folder, pooling="mean", max_tokens=most, precision="fp32", device="cpu")
    assert encoder.encode(["a paper " * 100]).n_tokens == most


def test_a_token_beyond_the_embedding_is_refused(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens([f"[new {number}]" for number in range(20)])
    tokenizer.save_pretrained(copy)
    with pytest.raises(InputError, match=r"its tokenizer gives \d+ for '\[new 19\]'; resize"):
        settle(found(copy))


def test_a_tokenizer_without_padding_works(copy):
    expected = TextEncoder(found(copy), pooling="mean", max_tokens=64, precision="fp32", device="cpu")
    texts = ["a walk by the river", "it"]
    vectors = expected.encode(texts).vectors
    edit(copy / "tokenizer_config.json", pad_token=None)
    without = TextEncoder(found(copy), pooling="mean", max_tokens=64, precision="fp32", device="cpu")
    assert without.tokenizer.pad_token_id is None
    assert (without.encode(texts).vectors == vectors).all()


def test_lower_casing_that_is_declared_is_applied(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))

    def vectors_differ() -> bool:
        encoder = TextEncoder(found(copy), pooling="mean", max_tokens=64, precision="fp32", device="cpu")
        upper, lower = encoder.encode(["THE MOVIE", "the movie"]).vectors
        return bool((upper != lower).any())

    assert vectors_differ()
    edit(copy / "sentence_bert_config.json", do_lower_case=True)
    assert not vectors_differ()


def test_a_prompt_must_be_chosen_where_sentence_transformers_passes_over_one(copy):
    edit(
        copy / "config_sentence_transformers.json",
        prompts={"passage": "passage: ", "default": "text: ", "query": ""},
        default_prompt_name="default",
    )
    with pytest.raises(UsageError, match=r"no prompt named 'document', but has passage \('passage: '\), default"):
        settle(found(copy))
    with pytest.raises(UsageError, match=r"no prompt named 'query', but has default .*--query-prompt TEXT"):
        settle_query(found(copy), max_tokens=64)
    assert settle(found(copy), VectorOptions(document_prompt="passage: ")).prompt == "passage: "
    assert settle_query(found(copy), prompt="", max_tokens=64).prompt == ""


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 8}}}, "processing_kwargs"),
        ("sentence_bert_config.json", {"query_length": 8}, "query_length 8 is not supported"),
        ("sentence_bert_config.json", {"model_args": {"rope_scaling": 2}}, "model_args.rope_scaling 2"),
        ("sentence_bert_config.json", {"new_key": 1}, "new_key 1 is not supported"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length 'long' must be 1 or more"),
        ("1_Pooling/config.json", {"temperature": 2}, "temperature 2 is not supported"),
        ("2_Dense/config.json", {"activation_function": "my.code.Swish"}, "activation_function 'my.code.Swish'"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
        ("2_Dense/config.json", {"in_features": 64}, "in_features is 64, but what comes before has width 32"),
        ("2_Dense/config.json", {"out_features": 5}, "model.safetensors does not fit config.json"),
        ("config_sentence_transformers.json", {"default_prompt_name": "absent"}, "default_prompt_name one of these"),
        ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim 0 must be 1 or more"),
    ],
)
def test_a_declaration_that_is_not_applied_is_refused_by_name(copy, file: str, changes: dict[str, Any], message: str):
    edit(copy / file, **changes)
    with pytest.raises(InputError, match="copy|encoder|supported|must|fit|before") as refusal:
        settle(found(copy))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "the modules (none) are not supported"),
        (["Transformer"], "the modules Transformer are not supported"),
        (["Transformer", "Dense", "Pooling"], "Transformer → Dense → Pooling"),
        (["Transformer", "Pooling", "LayerNorm"], "modules of type sentence_transformers.models.LayerNorm"),
        (["WordEmbeddings", "Pooling"], "modules of type sentence_transformers.models.WordEmbeddings"),
        (["StaticEmbedding"], "modules of type sentence_transformers.models.StaticEmbedding"),
        (["Router"], "modules of type sentence_transformers.models.Router"),
        (["CLIPModel"], "modules of type sentence_transformers.models.CLIPModel"),
    ],
)
def test_other_modules_are_refused_by_name(copy, modules, message):
    folders = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    entries = [
        {"idx": number, "name": str(number), "path": folders.get(kind, f"{number}_{kind}"), "type": kind}
        for number, kind in enumerate(modules)
    ]
    for entry in entries:
        entry["type"] = f"sentence_transformers.models.{entry['type']}"
    (copy / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(InputError) as refusal:
        settle(found(copy))
    assert message in str(refusal.value)


def test_the_dense_layers_of_a_folder_are_part_of_its_fingerprint(saved, copy):
    from safetensors.torch import load_file, save_file

    assert found(copy).fingerprint == found(saved).fingerprint
    weights = load_file(copy / "2_Dense" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, copy / "2_Dense" / "model.safetensors")
    assert found(copy).fingerprint != found(saved).fingerprint


def test_a_query_encoder_of_deberta_stays_in_float32(tmp_path):
    from persona.models import encoder_model

    assert encoder_model.runs_in("deberta", torch.bfloat16) is torch.float32
    assert encoder_model.runs_in("bert", torch.bfloat16) is torch.bfloat16
