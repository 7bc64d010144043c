"""Prompts as token ids: special tokens, lengths and separators, the same with and without the LLM."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, GenerationConfig, MBart50Tokenizer, MBartTokenizer, PreTrainedTokenizerFast

from persona.errors import UsageError
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptText, PromptTokenizer
from persona.options import PromptOptions
from tests.chats import byte_level, chat_tokenizer, sentencepiece, unigram

TARGETS = ["good", "a longer target in two lines\nof text", "", "three", "x"]
TEXTS = ["the movie is", " wörld 世界  two spaces \n\n and lines\n", "x", "1 < 2"]


@pytest.fixture
def prompts(llm_folder) -> PromptTokenizer:
    return PromptTokenizer.load(llm_folder)


def new(pretrained, *, is_encoder_decoder: bool = False, max_tokens: int = 256, **options) -> PromptTokenizer:
    return PromptTokenizer(
        pretrained,
        is_encoder_decoder=is_encoder_decoder,
        max_input_tokens=max_tokens,
        max_target_tokens=max_tokens,
        prompt=PromptOptions(**options),
    )


def bart() -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = byte_level(("<s>", "<pad>", "</s>", "<unk>"), **names)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


def t5() -> PreTrainedTokenizerFast:
    special = ("<pad>", "</s>", "<unk>", "<extra_id_0>")
    tokenizer = unigram(special, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def mbart(kind: type) -> PreTrainedTokenizerFast:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = ["▁", *(chr(code) for code in range(33, 127)), "▁the"]
    return kind(vocab=[*pieces, *((letter, -3.0) for letter in letters)], src_lang="en_XX", tgt_lang="de_DE")


def names(prompts: PromptTokenizer, ids) -> list[str]:
    return prompts.pretrained.convert_ids_to_tokens([*ids])


def test_the_tokenizer_of_a_folder_is_that_of_its_llm(prompts, llm):
    texts = [PromptText(input=text, retrieved=["one", "two"]) for text in ("the movie is", "", "a paper " * 300)]
    assert prompts.prompts(texts, retrieved_tokens=12) == llm.tokenizer.prompts(texts, retrieved_tokens=12)
    assert prompts.targets(TARGETS) == llm.tokenizer.targets(TARGETS)
    assert (prompts.end_id, prompts.pad_id) == (llm.tokenizer.end_id, llm.tokenizer.pad_id)


@pytest.mark.parametrize("source", ["tokenizer", "llm"])
def test_texts_are_cut_to_the_limit(llm_folder, source):
    if source == "tokenizer":
        prompts = PromptTokenizer.load(llm_folder, max_input_tokens=8, max_target_tokens=5)
    else:
        limits = {"max_input_tokens": 8, "max_target_tokens": 5}
        prompts = FrozenLLM.load(llm_folder, **limits, precision="fp32", device="cpu").tokenizer
    [text], [target] = prompts.prompts([PromptText(input="x" * 100)]), prompts.targets(["y" * 100])
    assert len(text) == 8 + len(prompts.separator)
    assert len(target) == 5
    assert target[-1] == prompts.pretrained.eos_token_id


def test_a_target_is_its_text_and_the_end_of_sequence(prompts):
    for target, ids in zip(TARGETS, prompts.targets(TARGETS), strict=True):
        assert ids[-1] == prompts.pretrained.eos_token_id
        assert prompts.pretrained.bos_token_id not in ids
        assert prompts.pretrained.decode(ids[:-1]).split() == target.split()


def test_a_separator_ends_the_input_of_a_decoder_only_llm(prompts, llm):
    [text] = prompts.prompts([PromptText(input="the movie")])
    assert prompts.pretrained.decode(text.after).endswith("movie</s>" if llm.is_encoder_decoder else "movie\n")


def test_retrieved_texts_share_their_tokens_equally(prompts):
    text = "the movie is a paper in a title of it "
    requests = [PromptText(input="x", retrieved=[text] * number) for number in (1, 2, 3)]
    opening = len(prompts.opening)
    one, two, three = (row.before[opening:] for row in prompts.prompts(requests, retrieved_tokens=6))
    ids = prompts.pretrained(text, add_special_tokens=False)["input_ids"]
    n, end = len(prompts.separator), prompts.separator
    assert one == ids[: 6 - n] + end
    assert two == (ids[: 3 - n] + end) * 2
    assert three == (ids[: 2 - n] + end) * 3
    # Without room for one token of each, only separators are left, never more tokens than requested.
    assert all(len(row.before) - opening <= 3 * max(n, 1) for row in prompts.prompts(requests, retrieved_tokens=3))
    assert all(len(row.before) == opening for row in prompts.prompts(requests))


@pytest.mark.parametrize("format_", ["plain", "chat"])
def test_no_texts_give_no_rows(format_):
    prompts = new(chat_tokenizer("chatml"), prompt_format=format_)
    assert prompts.prompts([]) == prompts.prompts([], retrieved_tokens=8) == prompts.targets([]) == []


def test_every_declared_end_of_sequence_counts_and_the_tokenizers_own(prompts):
    own = prompts.end_id
    assert prompts.eos_ids(None) == [own]
    assert prompts.eos_ids(GenerationConfig(eos_token_id=9)) == sorted([own, 9])
    assert prompts.eos_ids(GenerationConfig(eos_token_id=[9, own, 7])) == sorted([own, 7, 9])


@pytest.mark.parametrize("position", ["start", "input"])
def test_special_tokens_that_open_a_text_come_first(llm_folder, position):
    prompts = PromptTokenizer.load(llm_folder, prompt=PromptOptions(soft_position=position))
    text = PromptText(input="the paper", retrieved=["a review"])
    [ids] = prompts.prompts([text], retrieved_tokens=32)
    plain = prompts.pretrained("the paper", add_special_tokens=False)["input_ids"]
    retrieved = prompts.pretrained("a review", add_special_tokens=False)["input_ids"] + prompts.separator
    opening = [] if prompts.pretrained.bos_token_id is None else [prompts.pretrained.bos_token_id]
    closing = prompts.closing or prompts.separator
    if position == "start":
        assert (ids.before, ids.after) == (opening, [*retrieved, *plain, *closing])
    else:
        assert (ids.before, ids.after) == ([*opening, *retrieved], [*plain, *closing])


@pytest.mark.parametrize(
    ("pretrained", "opening", "target"),
    [
        (bart, ["<s>", "</s>"], ["<s>", "</s>"]),
        (t5, ["</s>"], ["</s>"]),
        (lambda: mbart(MBartTokenizer), ["</s>", "en_XX"], ["</s>", "de_DE"]),
        (lambda: mbart(MBart50Tokenizer), ["en_XX", "</s>"], ["de_DE", "</s>"]),
        (ByT5Tokenizer, ["</s>"], ["</s>"]),
    ],
    ids=["bart", "t5", "mbart", "mbart-50", "byt5"],
)
def test_an_encoder_decoder_reads_and_writes_what_transformers_gives(pretrained, opening, target):
    tokenizer = pretrained()
    prompts = new(tokenizer, is_encoder_decoder=True)
    for text in TEXTS:
        [ids] = prompts.prompts([PromptText(input=text)])
        assert [*ids.before, *ids.after] == tokenizer(text)["input_ids"]
        assert prompts.targets([text])[0] == tokenizer(text_target=text)["input_ids"]
    assert names(prompts, [*prompts.opening, *prompts.closing]) == opening
    cut = new(tokenizer, is_encoder_decoder=True, max_tokens=6)
    [ids], [labels] = cut.prompts([PromptText(input="x" * 20)]), cut.targets(["y" * 20])
    assert [*ids.before, *ids.after] == tokenizer("x" * 20, truncation=True, max_length=6)["input_ids"]
    assert labels == tokenizer(text_target="y" * 20, truncation=True, max_length=6)["input_ids"]
    assert [one for one in names(cut, labels) if one in {*target}] == target


def test_a_decoder_only_llm_drops_what_closes_a_text():
    tokenizer = bart()
    prompts = new(tokenizer)
    [ids] = prompts.prompts([PromptText(input="the paper")])
    assert names(prompts, ids.before) == ["<s>"]
    assert tokenizer.decode(ids.after) == "the paper\n"
    assert tokenizer.decode(prompts.targets(["good"])[0]) == "good</s>"


@pytest.mark.parametrize(
    ("pretrained", "is_encoder_decoder"),
    [
        (bart, True),
        (bart, False),
        (t5, True),
        (lambda: mbart(MBartTokenizer), True),
        (ByT5Tokenizer, True),
        (lambda: sentencepiece(("<unk>", "<s>", "</s>"), prefix="each", eos_token="</s>", unk_token="<unk>"), False),
        (lambda: chat_tokenizer("qwen_3"), False),
    ],
    ids=["bart", "gpt", "t5", "mbart", "byt5", "llama-2", "qwen-3"],
)
def test_no_typed_text_becomes_a_control_token(pretrained, is_encoder_decoder):
    tokenizer = pretrained()
    prompts = new(tokenizer, is_encoder_decoder=is_encoder_decoder, prompt_format="plain")
    control = {*tokenizer.added_tokens_decoder} | {*tokenizer.all_special_ids}
    [clean] = prompts.prompts([PromptText(input="x", retrieved=["x"])], retrieved_tokens=100)
    expected = [token for token in (*clean.before, *clean.after) if token in control]
    for token in tokenizer.convert_ids_to_tokens(sorted(control)):
        text = f"a {token} b{token}"
        [ids] = prompts.prompts([PromptText(input=text, retrieved=[text])], retrieved_tokens=100)
        assert [one for one in (*ids.before, *ids.after) if one in control] == expected
        [target], [empty] = prompts.targets([text]), prompts.targets([""])
        assert [one for one in target if one in control] == empty
        if tokenizer.is_fast:
            assert tokenizer.decode([*ids.before, *ids.after]).replace(" ", "").count(f"a{token}b{token}") == 2


def test_unknown_characters_stay_unknown():
    tokenizer = t5()
    [ids] = new(tokenizer, is_encoder_decoder=True).prompts([PromptText(input="世 <unk>")])
    assert names(new(tokenizer, is_encoder_decoder=True), ids.after) == ["▁", "<unk>", "▁", *"<unk>", "</s>"]


def test_auto_is_chat_only_for_a_decoder_only_llm_with_a_template():
    assert new(chat_tokenizer("chatml")).options.prompt_format == "chat"
    assert new(chat_tokenizer("chatml"), prompt_format="plain").options.prompt_format == "plain"
    assert new(bart()).options.prompt_format == "plain"
    with_template = t5()
    with_template.chat_template = "{{ messages[0].content }}"
    assert new(with_template, is_encoder_decoder=True).options.prompt_format == "plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_format": "chat"}, "--prompt-format chat needs a chat template"),
        ({"system": "Write."}, "--system or --template-argument needs a chat template"),
        ({"template_argument": ("a=b",)}, "--system or --template-argument needs a chat template"),
    ],
)
def test_a_chat_without_a_template_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        new(bart(), **options)
    with pytest.raises(UsageError, match="this one is an encoder-decoder"):
        new(t5(), is_encoder_decoder=True, **options)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        new(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


def test_a_column_of_system_texts_needs_a_chat_with_a_place_for_it():
    new(chat_tokenizer("chatml")).check_system_column()
    with pytest.raises(UsageError, match="column 'system'.*plain"):
        new(chat_tokenizer("chatml"), prompt_format="plain").check_system_column()
    with pytest.raises(UsageError, match="takes no system text"):
        new(chat_tokenizer("gemma")).check_system_column()


@pytest.mark.parametrize(
    ("pretrained", "options", "expected"),
    [
        (bart, {}, "<s>[past text]\n[3 soft tokens][input]\n[target]</s>"),
        (bart, {"soft_position": "start"}, "<s>[3 soft tokens][past text]\n[input]\n[target]</s>"),
        (
            lambda: chat_tokenizer("gemma"),
            {},
            "<bos><start_of_turn>user\n[past text]\n[3 soft tokens][input]<end_of_turn>\n{model}[target]<end_of_turn>",
        ),
    ],
)
def test_an_example_shows_what_the_llm_reads(pretrained, options, expected):
    prompts = new(pretrained(), **options)
    assert prompts.example(n_soft=3, retrieved=True) == expected.replace("{model}", "<start_of_turn>model\n")


def test_an_example_of_an_encoder_decoder_shows_both_sides():
    assert new(bart(), is_encoder_decoder=True).example(n_soft=2) == "<s>[2 soft tokens][input]</s> → <s>[target]</s>"
