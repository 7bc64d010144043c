"""Token ids are those of transformers for any text, whichever way they are made."""

import json

import pytest
from hypothesis import given, strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from persona.models import packaged
from persona.models.encoder_model import token_rows
from persona.models.tokenizing import TextTokenizer
from tests import models
from tests.nasty import NASTY

TEXTS = [
    *(text for text in NASTY if isinstance(text, str)),
    *("", " ", "A walk\nby the\tRiver", "the [MASK] of [SEP] and [sep]", "</s> <pad> [PAD]", "é" * 50, "one " * 40),
    *("naïve café", "北京 is a city", "don't (stop), 3.14!", "a\x00b\x7fc\x0bd", "I\u0307stanbul ΑΣ", "~`{}|^_"),
]
# Letters that a normalizer changes, removes or sets apart, characters that split, and parts of special tokens.
LETTERS = st.sampled_from([*"aZ é́北ß’–,.'#~ \t\n\r\x0b\x00\x7f\u00a0\u200b\u2028", "[SEP]", "[sep]", "[", "]", "İ"])


def expected(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> list[list[int]]:
    ids = tokenizer(["to: " + text for text in texts], truncation=True, max_length=max_tokens)["input_ids"]
    return [list(row) for row in ids]


@pytest.mark.parametrize("make", [models.tiny_encoder, models.tiny_llama, models.tiny_t5, None])
@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_are_those_of_transformers(make, side, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(packaged.minilm() if make is None else make(tmp_path))
    tokenizer.truncation_side = side
    for split_special_tokens in (False, True):
        tokenizer.split_special_tokens = split_special_tokens
        rows = expected(tokenizer, TEXTS, 24)
        assert max(map(len, rows)) == 24
        assert token_rows(tokenizer, TEXTS, prompt="to: ", max_tokens=24) == rows
        ours = TextTokenizer(tokenizer, prompt="to: ", max_tokens=24)
        assert ours.rows(TEXTS) == rows
        assert (ours.plain is not None) == (make in (models.tiny_encoder, None))


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def minilm(request, tmp_path_factory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    AutoTokenizer.from_pretrained(packaged.minilm()).save_pretrained(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["normalizer"]["lowercase"] = request.param
    file.write_text(json.dumps(tokenizer))
    return AutoTokenizer.from_pretrained(folder)


@given(st.lists(st.lists(LETTERS, max_size=12).map("".join) | st.text(max_size=12), max_size=4))
def test_tokens_of_made_up_texts_are_those_of_transformers(minilm, texts):
    ours = TextTokenizer(minilm, prompt="to: ", max_tokens=16)
    assert ours.rows(texts) == (expected(minilm, texts, 16) if texts else [])


def test_only_plain_texts_skip_the_normalizer(minilm):
    plain = TextTokenizer(minilm, prompt="", max_tokens=16).plain
    found = ["Plain, (English) text\nin 2 lines.", "naïve", "[SEP]", "a\x00b", "a\u00a0b"]
    assert [plain.other.search(text) is None for text in found] == [True, False, False, False, False]


def test_an_added_token_of_letters_is_found(minilm, tmp_path):
    minilm.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["Zurich lake"])
    texts = ["the Zurich lake", "the zurich lake", "ZURICH LAKE", "lake"]
    assert TextTokenizer(tokenizer, prompt="to: ", max_tokens=16).rows(texts) == expected(tokenizer, texts, 16)
