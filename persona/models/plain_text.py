"""Tokenizes texts that people typed so that no string in them becomes a control token of the LLM.

Control tokens are the tokenizer's special tokens, such as `<bos>` or `<|im_end|>`, and the added tokens that its chat
template writes, such as `<think>`. Only a tokenizer or a chat template may write them: typed by a person, `<|im_end|>`
is eight characters, and cannot end a turn.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from persona.errors import UsageError

# Names of control tokens inside our copy of the tokenizer: the end of Unicode, which is for private use.
_FIRST_NAME = 0x108000
MARK = "\U0010fffd"
"""A character that `PlainText.typed` never has."""
_UNKNOWN_CHARACTER = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenized text: its token ids, and for each token where it starts and ends in the text."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class PlainText:
    """A tokenizer for typed texts and for the chat templates around them.

    It works on a copy of the tokenizer in which every control token has another name, one private character. Typed text
    has no such characters, so it can reach no control token, while a template's own control tokens are renamed before
    it is tokenized. Text without control tokens gets the ids that the tokenizer itself gives.

    A tokenizer that is written in Python has no such copy; it can tokenize typed texts, but no chats.

    Args:
        pretrained: the LLM's own tokenizer.
    """

    def __init__(self, pretrained: PreTrainedTokenizerBase) -> None:
        self.pretrained = pretrained
        self.control_ids = _control_tokens(pretrained)
        self._names = {token: chr(_FIRST_NAME + number) for number, token in enumerate(self.control_ids)}
        # Where the template processes typed text, a control token in it has a second name.
        self._typed_names = {token: chr(ord(name) + len(self._names)) for token, name in self._names.items()}
        self._typed_tokens = {name: token for token, name in self._typed_names.items()}
        longest_first = sorted(self._names, key=len, reverse=True)
        last_name = chr(_FIRST_NAME + 2 * len(self._names))
        self._reserved = re.compile(f"[{chr(_FIRST_NAME)}-{last_name}{MARK}]")
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # (?!) matches nothing
        self._copy = _renamed(pretrained, self._names) if pretrained.is_fast else None

    @property
    def has_offsets(self) -> bool:
        """Whether `tokens` works."""
        return self._copy is not None

    def ids(self, texts: Sequence[str], *, as_target: bool = False) -> list[list[int]]:
        """Token ids of typed texts, without special tokens around them; `as_target` for what the LLM writes."""
        if not texts:
            return []  # the tokenizer rejects an empty list
        if self._copy is None:
            return [self._ids_in_python(text, as_target=as_target) for text in texts]
        encoded = self._copy.encode_batch([self.typed(text) for text in texts], add_special_tokens=False)
        return [one.ids for one in encoded]

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of texts that consist of `typed` and `written` parts."""
        copy = cast(Tokenizer, self._copy)
        return [Tokens(ids=one.ids, offsets=one.offsets) for one in copy.encode_batch(texts, add_special_tokens=False)]

    def typed(self, text: str) -> str:
        """A text as people typed it, for `tokens`: names of control tokens are replaced."""
        return self._reserved.sub(_UNKNOWN_CHARACTER, text)

    def written(self, text: str) -> str:
        """A text as a chat template wrote it, for `tokens`: its control tokens stay control tokens."""
        renamed = self._control.sub(lambda found: self._names[found[0]], text)
        return self._reserved.sub(lambda found: self._typed_tokens.get(found[0], found[0]), renamed)

    def protected(self, text: str) -> str:
        """A typed text that a chat template may process: `written` gives its control tokens back as plain text."""
        return self._control.sub(lambda found: self._typed_names[found[0]], self.typed(text))

    def between_control_tokens(self, text: str) -> list[str]:
        """The parts of a template's text that are no control tokens."""
        return self._control.split(text)

    def first_control_token(self, text: str) -> str | None:
        """The control token at the start of a template's text, behind white space."""
        found = self._control.match(text.lstrip())
        return found[0] if found else None

    def _ids_in_python(self, text: str, *, as_target: bool) -> list[int]:
        given: dict[str, Any] = {"text_target" if as_target else "text": text}
        if self._control.search(text) is None:
            return cast(list[int], self.pretrained(**given, add_special_tokens=False)["input_ids"])
        split = self.pretrained(**given, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        # Characters that the vocabulary lacks are unknown tokens; other control tokens must not come from typed text.
        control = {*self.control_ids.values()} - {self.pretrained.unk_token_id}
        return [token for token in split if token not in control]


def special_tokens_around(
    pretrained: PreTrainedTokenizerBase, *, as_target: bool = False
) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer adds in front of a text and behind it, such as language codes."""
    given: dict[str, Any] = {"text_target" if as_target else "text": "a"}
    plain = pretrained(**given, add_special_tokens=False)["input_ids"]
    whole = pretrained(**given)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if start is None:
        raise UsageError("the LLM's tokenizer changes a text when it adds special tokens to it, which is not supported")
    return whole[:start], whole[start + len(plain) :]


def _control_tokens(pretrained: PreTrainedTokenizerBase) -> dict[str, int]:
    """Control tokens and their ids. An added token of white space is text, also where a template writes it."""
    template = pretrained.chat_template or ""
    templates = "\0".join(template.values()) if isinstance(template, dict) else template
    special = {*pretrained.all_special_tokens}
    return {
        token.content: number
        for number, token in sorted(pretrained.added_tokens_decoder.items())
        if token.special
        or token.content in special
        or (token.content in templates and token.content and not token.content.isspace())
    }


def _renamed(pretrained: Any, names: dict[str, str]) -> Tokenizer:
    """A copy of the tokenizer that knows control tokens by other names only, and adds, cuts and pads nothing."""
    state = json.loads(pretrained.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None, "post_processor": None}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    # The vocabulary holds control tokens too, and could find them in a text by itself.
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & {*names}]
    return Tokenizer.from_str(json.dumps(state))
