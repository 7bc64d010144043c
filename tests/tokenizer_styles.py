"""Small tokenizers of every kind that LLMs have: what they add to a text, and how they cut it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.chats import chat_tokenizer

WORDS = (
    "the",
    "a",
    "of",
    "and",
    "in",
    "to",
    "for",
    "paper",
    "title",
    "review",
    "movie",
    "rating",
    "is",
    "i",
    "like",
    "it",
)


@dataclass(frozen=True, kw_only=True)
class Style:
    """A kind of tokenizer: its special tokens, what it adds to a text, and whether it is like SentencePiece's."""

    special: Sequence[str]
    template: str = "$A"
    roles: Mapping[str, str]
    unigram: bool = False


STYLES = {
    "plain": Style(
        special=["<|endoftext|>"], roles={"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
    ),
    "bos": Style(
        special=["<unk>", "<s>", "</s>"], template="<s> $A", roles={"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    ),
    "bos, pad": Style(
        special=["<pad>", "<eos>", "<bos>", "<unk>"],
        template="<bos> $A",
        roles={"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"},
    ),
    "eos as bos": Style(
        special=["<s>", "<pad>", "</s>", "<unk>"],
        template="</s> $A",
        roles={"bos": "</s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    ),
    "bos, eos": Style(
        special=["<s>", "<pad>", "</s>", "<unk>"],
        template="<s> $A </s>",
        roles={"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    ),
    "eos": Style(
        special=["<pad>", "</s>", "<unk>"],
        template="$A </s>",
        roles={"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
        unigram=True,
    ),
    "eos, language": Style(
        special=["<s>", "<pad>", "</s>", "<unk>", "en_XX"],
        template="$A </s> en_XX",
        roles={"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
        unigram=True,
    ),
    "language, eos": Style(
        special=["<s>", "<pad>", "</s>", "<unk>", "en_XX"],
        template="en_XX $A </s>",
        roles={"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
        unigram=True,
    ),
    "sep, cls": Style(
        special=["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>"],
        template="$A <sep> <cls>",
        roles={"bos": "<s>", "eos": "</s>", "sep": "<sep>", "cls": "<cls>", "pad": "<pad>", "unk": "<unk>"},
        unigram=True,
    ),
}


def new_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a style in `STYLES`, or with a chat template, like `chat: gemma`, of `tests.chats`."""
    if name.startswith("chat: "):
        return chat_tokenizer(name.removeprefix("chat: "))
    style = STYLES[name]
    tokenizer = Tokenizer(_unigram(style.special) if style.unigram else _byte_pairs(style.special))
    if style.unigram:
        tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    if style.template != "$A":
        used = [(token, style.special.index(token)) for token in style.template.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=style.template, special_tokens=used)
    roles = {f"{role}_token": token for role, token in style.roles.items()}
    others = [token for token in style.special if token not in style.roles.values()]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=others, **roles)


def _byte_pairs(special: Sequence[str]) -> models.BPE:
    vocabulary = {
        piece: number for number, piece in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
                vocabulary.setdefault(word[: end + 1], len(vocabulary))
    return models.BPE(vocabulary, merges)


def _unigram(special: Sequence[str]) -> models.Unigram:
    letters = [chr(code) for code in range(33, 127) if chr(code) not in "{}~"]
    pieces = dict.fromkeys(["▁", *letters, *(f"▁{word}" for word in WORDS)])
    scores = [*((piece, 0.0) for piece in special), *((piece, -3.0) for piece in pieces)]
    return models.Unigram(scores, unk_id=list(special).index("<unk>"))
