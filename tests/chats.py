"""Shared by tests: tiny tokenizers with chat templates in the styles of well-known LLMs."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_WORDS = ("the", "user", "assistant", "system", "paper", "title", "think", "write", "you", "are", "date", "model")

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{- bos_token }}{% set date_string = date_string if date_string is defined else '26 Jul 2024' %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content|trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content|trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_3_OF_TODAY = LLAMA_3.replace("'26 Jul 2024'", "strftime_now('%d %b %Y')")
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% set start = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set start = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\n' + (start if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + '[/INST]' }}{% elif message.role == 'assistant' %}"
    "{{ ' ' + message.content + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}"
    "{% endfor %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + '\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN_3 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% set content = message.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{% for message in messages %}{% set content = message.content %}"
    "{% if loop.first and system is defined %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}"
    "{% endif %}{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOLLM_3 = (
    "{% set today = strftime_now('%d %B %Y') %}{% set text = '' %}{% set mode = '/think' %}"
    "{% if messages[0].role == 'system' %}{% set text = messages[0].content %}{% set messages = messages[1:] %}"
    "{% if '/no_think' in text %}{% set mode = '/no_think' %}{% endif %}"
    "{% set text = text.replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}"
    "{{ '<|im_start|>system\nToday Date: ' + today + '\nMode: ' + mode + '\n' + text + '<|im_end|>\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)


def byte_level(special: Sequence[str], plain_added: Sequence[str] = (), **settings: Any) -> PreTrainedTokenizerFast:
    """As of GPT-2, Llama 3 and Qwen: BPE over bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(_bpe([*alphabet], "Ġ"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, special, plain_added, settings)


def sentencepiece(
    special: Sequence[str], plain_added: Sequence[str] = (), *, prefix: str = "never", **settings: Any
) -> PreTrainedTokenizerFast:
    """As of Llama 2, Mistral and Gemma: BPE over characters, bytes for unknown ones, ▁ for spaces.

    `prefix` is where a space is added: to the `first` part of a text, to `each` part between special tokens, or never.
    """
    letters = [chr(code) for code in range(33, 127)]
    in_vocabulary = [piece for piece in ("<pad>", "<s>", "</s>", "<bos>", "<eos>", "<unk>") if piece in special]
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    tokenizer = Tokenizer(_bpe([*in_vocabulary, *bytes_, "▁", *letters], "▁", unk_token="<unk>", byte_fallback=True))
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("▁")] if prefix == "each" else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(tokenizer, special, plain_added, settings)


def unigram(special: Sequence[str], **settings: Any) -> PreTrainedTokenizerFast:
    """As of T5 and mBART: a unigram model whose vocabulary holds the special tokens, with the best score."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*((one, 0.0) for one in special), *((one, -3.0) for one in ["▁", *letters, *(f"▁{w}" for w in _WORDS)])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>")))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _finished(tokenizer, special, (), settings)


_SP = ("<unk>", "<s>", "</s>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA_3 = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")


def chat_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a style; templates of one style with other tokenizers have names like `llama_2_first`."""
    made = {
        "chatml": lambda: byte_level(_CHATML, chat_template=CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>"),
        "llama_3": lambda: _llama_3(LLAMA_3),
        "llama_3_of_today": lambda: _llama_3(LLAMA_3_OF_TODAY),
        "gemma": lambda: _gemma(GEMMA),
        "gemma_3": lambda: _gemma(GEMMA_3),
        "mistral": lambda: sentencepiece((*_SP, "[INST]", "[/INST]"), prefix="first", chat_template=MISTRAL, **_OF_SP),
        "phi_3": lambda: sentencepiece(
            (*_SP, "<|end|>>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
            prefix="each",
            chat_template=PHI_3,
            rstrip=("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
            **_OF_SP,
        ),
        "qwen_3": lambda: byte_level(_CHATML, ("<think>", "</think>"), chat_template=QWEN_3, eos_token="<|im_end|>"),
        "llama_2": lambda: sentencepiece(_SP, prefix="each", chat_template=LLAMA_2, **_OF_SP),
        "llama_2_first": lambda: sentencepiece(_SP, prefix="first", chat_template=LLAMA_2, **_OF_SP),
        "zephyr": lambda: sentencepiece(_SP, prefix="first", chat_template=ZEPHYR, **_OF_SP),
        "vicuna": lambda: sentencepiece(_SP, prefix="each", chat_template=VICUNA, **_OF_SP),
        "smollm_3": lambda: byte_level(
            _CHATML, ("<think>", "</think>"), chat_template=SMOLLM_3, eos_token="<|im_end|>"
        ),
    }
    return made[style]()


_OF_SP = {"adds": "<s>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _llama_3(template: str) -> PreTrainedTokenizerFast:
    bos = "<|begin_of_text|>"
    return byte_level(_LLAMA_3, adds=bos, chat_template=template, bos_token=bos, eos_token="<|eot_id|>")


def _gemma(template: str) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return sentencepiece(_GEMMA, ("\n", "\n\n", "▁▁"), adds="<bos>", chat_template=template, **names)


def _bpe(pieces: list[str], space: str, **settings: Any) -> models.BPE:
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for word in (word for name in _WORDS for word in (name, space + name)):
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
                vocabulary.setdefault(word[: end + 1], len(vocabulary))
    return models.BPE(vocabulary, merges, **settings)


def _finished(
    tokenizer: Tokenizer, special: Sequence[str], plain_added: Sequence[str], settings: dict[str, Any]
) -> PreTrainedTokenizerFast:
    """Adds the tokens, and `adds`, the special token that opens each text; `rstrip` swallow white space behind them."""
    adds, rstrip = settings.pop("adds", None), settings.pop("rstrip", ())
    tokenizer.add_special_tokens([AddedToken(one, special=True, rstrip=one in rstrip) for one in special])
    tokenizer.add_tokens([AddedToken(one, normalized=False) for one in plain_added])
    if adds is not None:
        number = tokenizer.token_to_id(adds)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{adds} $A", special_tokens=[(adds, number)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
