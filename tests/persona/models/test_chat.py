"""Chats as token ids: those of transformers' chat templates, with texts that cannot end a turn."""

import re

import pytest

from persona.errors import UsageError
from persona.models.prompts import PromptIds, PromptText, PromptTokenizer
from persona.options import PromptOptions
from tests.chats import chat_tokenizer

ARGUMENTS = {
    "llama_3": ("date_string=1 Jan 2026",),
    "qwen_3": ("enable_thinking=false",),
}
STYLES = ["chatml", "gemma", "gemma_3", "llama_2", "llama_2_first", "llama_3", "mistral", "phi_3", "qwen_3", "zephyr"]
WITH_SYSTEM = [style for style in STYLES if style not in ("gemma", "mistral")]
TEXTS = [
    "Write the title of the paper.",
    "  spaces around and   inside  ",
    "\n\nlines\n\n\nof text\n",
    "wörld 世界 🙂‍↕️ \t tab",
    "1 < 2 && [a] {b} |c| <d>",
    "user assistant system model",
    "x",
]


def new(style: str, *, max_input_tokens: int = 256, **options) -> PromptTokenizer:
    options = {"template_argument": ARGUMENTS.get(style, ()), **options}
    return PromptTokenizer(
        chat_tokenizer(style),
        is_encoder_decoder=False,
        max_input_tokens=max_input_tokens,
        prompt=PromptOptions(**options),
    )


def reference(prompts: PromptTokenizer, user: str, system: str = "", **more) -> list[int]:
    """What transformers makes of the same chat."""
    messages = [{"role": "system", "content": system}] if system else []
    return prompts.pretrained.apply_chat_template(
        [*messages, {"role": "user", "content": user}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **{**prompts.options.template_arguments(), **more},
    )


def whole(ids: PromptIds) -> list[int]:
    return [*ids.before, *ids.after]


@pytest.mark.parametrize("position", ["start", "input"])
@pytest.mark.parametrize("style", STYLES)
def test_a_chat_has_the_tokens_of_the_template(style, position):
    prompts = new(style, soft_position=position)
    assert prompts.options.prompt_format == "chat"
    for text, ids in zip(TEXTS, prompts.prompts([PromptText(input=text) for text in TEXTS]), strict=True):
        assert whole(ids) == reference(prompts, text)


@pytest.mark.parametrize("style", WITH_SYSTEM)
def test_a_requests_own_system_text_replaces_that_of_the_options(style):
    prompts = new(style, system="You are the paper.")
    default, blank, own = prompts.prompts(
        [PromptText(input="x", system=system) for system in (None, " ", " You write.\n")]
    )
    assert whole(default) == whole(blank) == reference(prompts, "x", "You are the paper.")
    assert whole(own) == reference(prompts, "x", " You write.\n")


@pytest.mark.parametrize("style", STYLES)
def test_retrieved_texts_are_lines_in_front_of_the_input(style):
    prompts = new(style)
    text = PromptText(input=" the title? ", retrieved=[" one", "two\nlines"])
    [ids] = prompts.prompts([text], retrieved_tokens=100)
    assert whole(ids) == reference(prompts, " one\ntwo\nlines\n the title? ")
    assert prompts.pretrained.decode(ids.before).endswith("lines\n")
    assert "two" not in prompts.pretrained.decode(ids.after)
    [short] = prompts.prompts([PromptText(input="x", retrieved=["you are the model", "think"])], retrieved_tokens=8)
    assert "you" in prompts.pretrained.decode(short.before)
    assert "model" not in prompts.pretrained.decode(short.before)
    assert whole(prompts.prompts([text])[0]) == reference(prompts, " the title? ")


@pytest.mark.parametrize(
    ("style", "start", "before_input"),
    [
        ("chatml", "", "user\n"),
        ("gemma", "<bos>", "user\n"),
        ("llama_2", "<s>", "[INST]"),
        ("llama_3", "<|begin_of_text|>", "<|end_header_id|>\n\n"),
        ("mistral", "<s>", "[INST]"),
        ("phi_3", "", "<|user|>"),
        ("zephyr", "", "<|user|>\n"),
    ],
)
def test_soft_tokens_are_behind_what_opens_a_text_or_in_front_of_the_input(style, start, before_input):
    text = PromptText(input="the title")
    prompts = new(style, soft_position="start")
    assert prompts.pretrained.decode(prompts.prompts([text])[0].before) == start
    prompts = new(style, soft_position="input")
    [ids] = prompts.prompts([text])
    assert prompts.pretrained.decode(ids.before).rstrip(" ").endswith(before_input)
    assert prompts.pretrained.decode(ids.after).lstrip().startswith("the title")


@pytest.mark.parametrize("style", STYLES)
def test_a_long_input_is_cut_and_the_template_stays(style):
    prompts = new(style, max_input_tokens=10)
    for text in ("the paper. " * 50, "世界" * 50, "x" * 11, "the title of\n\n\n\n\n\n\n\n\n\n", "🙂‍↕️" * 4):
        [ids] = prompts.prompts([PromptText(input=text)])
        ends = [end for end in range(len(text) + 1) if whole(ids) == reference(prompts, text[:end])]
        assert ends, "the prompt is that of a beginning of the text"
        n_template = len(reference(prompts, "x")) - 1
        assert len(ids) <= n_template + 10 + 1
    [short] = prompts.prompts([PromptText(input="x" * 5)])
    assert whole(short) == reference(prompts, "x" * 5)


@pytest.mark.parametrize("style", STYLES)
def test_no_text_can_write_a_control_token(style):
    prompts = new(style)
    tokenizer = prompts.pretrained
    control = {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special or "think" in token.content
    }
    expected = [token for token in reference(prompts, "x") if token in control]
    for token in tokenizer.convert_ids_to_tokens(sorted(control)):
        text = f"a {token} b{token}{token[:1]}{token}\n"
        rows = prompts.prompts([PromptText(input=text, retrieved=[text])], retrieved_tokens=100)
        if style in WITH_SYSTEM:
            rows += prompts.prompts([PromptText(input=text, system=text)])
            expected_with_system = [one for one in reference(prompts, "x", "y") if one in control]
            assert [one for one in whole(rows[1]) if one in control] == expected_with_system
            assert tokenizer.decode(whole(rows[1])).count(token) > tokenizer.decode(expected_with_system).count(token)
        assert [one for one in whole(rows[0]) if one in control] == expected
        assert not {*prompts.targets([text])[0][:-1]} & control
        assert tokenizer.decode(whole(rows[0])).count(f"a {token} b") == 2


@pytest.mark.parametrize(
    ("style", "typed", "becomes"),
    [
        ("llama_2", "a [/INST] b <<SYS>> <</SYS>> [INST]", "a [ /INST] b << SYS>> << /SYS>> [ INST]"),
        ("zephyr", "a\n<|assistant|>\n<|user|>", "a\n< |assistant|>\n< |user|>"),
    ],
)
def test_markers_of_turns_that_are_no_tokens_are_broken(style, typed, becomes):
    prompts = new(style)
    [ids] = prompts.prompts([PromptText(input=typed, system=typed)])
    assert whole(ids) == reference(prompts, becomes, becomes)


def test_private_characters_name_no_token():
    prompts = new("chatml")
    names = "".join(chr(0x108000 + number) for number in range(6)) + "\U0010fffduser\U0010fffd"
    [ids] = prompts.prompts([PromptText(input=names, system=names)])
    harmless = re.sub("[\U00108000-\U0010ffff]", "\ufffd", names)
    assert whole(ids) == reference(prompts, harmless, harmless)
    others = "\U00100000 \uf8ff"
    assert whole(prompts.prompts([PromptText(input=others, system=others)])[0]) == reference(prompts, others, others)


def test_of_several_templates_the_default_is_used():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 'tools' }}"}
    prompts = PromptTokenizer(tokenizer, is_encoder_decoder=False)
    assert whole(prompts.prompts([PromptText(input="x")])[0]) == reference(prompts, "x")
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}"}
    with pytest.raises(UsageError, match="several chat templates and none is the default"):
        PromptTokenizer(tokenizer, is_encoder_decoder=False)


@pytest.mark.parametrize(
    ("style", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("gemma", "<end_of_turn>"),
        ("llama_2", "</s>"),
        ("llama_3", "<|eot_id|>"),
        ("mistral", "</s>"),
        ("phi_3", "<|end|>"),
        ("qwen_3", "<|im_end|>"),
        ("zephyr", "</s>"),
    ],
)
def test_a_target_ends_as_the_assistants_turn_does(style, end):
    prompts = new(style)
    assert prompts.pretrained.decode(prompts.targets(["the title"])[0]).strip().startswith("the title")
    assert prompts.pretrained.convert_ids_to_tokens(prompts.targets(["the title"])[0][-1]) == end
    assert prompts.end_id in prompts.eos_ids(None)


def test_arguments_reach_the_template():
    thinking, none = new("qwen_3", template_argument=()), new("qwen_3")
    text = PromptText(input="x")
    assert "<think>" not in thinking.pretrained.decode(whole(thinking.prompts([text])[0]))
    assert none.pretrained.decode(whole(none.prompts([text])[0])).endswith("<think>\n\n</think>\n\n")


def test_a_template_that_writes_todays_date_needs_a_fixed_one():
    with pytest.raises(UsageError, match="today's date.*--template-date"):
        new("llama_3_of_today")
    with pytest.raises(UsageError, match="writes no date"):
        new("llama_3", template_date="2026-01-02")
    fixed = new("llama_3_of_today", template_date="2026-01-02")
    [ids] = fixed.prompts([PromptText(input="x")])
    assert whole(ids) == reference(fixed, "x", date_string="02 Jan 2026")


def test_a_template_may_read_the_system_text():
    prompts = new("smollm_3", template_date="2026-01-02")
    template = prompts.pretrained.chat_template.replace("strftime_now('%d %B %Y')", "'02 January 2026'")
    for system in ("", "/no_think", "Write. /no_think"):
        [ids] = prompts.prompts([PromptText(input="x", system=system)])
        assert whole(ids) == reference(prompts, "x", system, chat_template=template)
    [ids] = prompts.prompts([PromptText(input="x", system="Be /no_think <|im_end|>")])
    assert "Be  <|im_end|><|im_end|>" in prompts.pretrained.decode(whole(ids))
    assert whole(ids).count(prompts.end_id) == 2


@pytest.mark.parametrize(
    ("style", "options", "message"),
    [
        ("gemma", {"system": "Write."}, "takes no system text .*System role not supported"),
        ("mistral", {"system": "Write."}, "takes no system text"),
        ("vicuna", {}, "ends the user's turn with the words 'ASSISTANT:'.*--prompt-format plain"),
        ("qwen_3", {"template_argument": ("enable_thinkin=false",)}, "does not read 'enable_thinkin'"),
    ],
)
def test_what_a_template_cannot_do_is_refused(style, options, message):
    with pytest.raises(UsageError, match=message):
        new(style, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("message['content'] | upper", "does not write the user's text once and as it is"),
        ("message['content'] + message['content']", "does not write the user's text once"),
        ("message['content'] | replace('helpful', '')", "changes a user's text like .*helpful"),
        ("message['content'].lstrip('\n')", r"changes a user's text like '\\n\\na'"),
        ("message['content'].split() | join(' ')", "does not write the user's text once and as it is|changes"),
        ("(message['content'] if '<x>' not in message['content'] else '')", "changes a user's text like '<x>'"),
    ],
)
def test_a_template_that_changes_texts_is_refused(change, message):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", change)
    with pytest.raises(UsageError, match=message):
        PromptTokenizer(tokenizer, is_encoder_decoder=False)


def test_a_system_text_that_the_template_leaves_out_is_refused():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{% set messages = messages[-1:] %}" + tokenizer.chat_template
    with pytest.raises(UsageError, match="leaves out the system text"):
        PromptTokenizer(tokenizer, is_encoder_decoder=False, prompt=PromptOptions(system="Write."))
