"""How requests become the token ids that an LLM reads; works without the LLM's weights.

An encoder-decoder LLM (T5-like) reads [opening; retrieved texts; soft tokens; input; closing] and decodes the target.
A decoder-only LLM (Llama-like) reads [opening; retrieved texts; soft tokens; input; separator; target] as one row, or,
with a chat template, [the template's text; retrieved texts; soft tokens; input; the template's text; target]. Opening
and closing are the special tokens that the tokenizer adds, such as `<bos>`: an LLM expects them at the ends, whatever
is between them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from transformers import GenerationConfig, PreTrainedTokenizerBase

from persona.errors import UsageError
from persona.models import loading
from persona.models.chat import ChatTemplate
from persona.models.plain_text import PlainText, Tokens, special_tokens_around
from persona.models.resolve import ModelFolder
from persona.options import PromptOptions

MAX_INPUT_TOKENS = 256
MAX_TARGET_TOKENS = 256
AUTO_PROMPT = PromptOptions()
# Without it, a decoder-only LLM would read request and answer as one word.
_SEPARATOR = "\n"


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """The texts of one request.

    Attributes:
        retrieved: texts of the user's history, in front of the input.
        system: the request's own system text, for chats; None for that of the options.
    """

    input: str
    retrieved: Sequence[str] = ()
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class PromptIds:
    """The token ids of one request, split where its soft tokens go."""

    before: Sequence[int]
    after: Sequence[int]

    def __len__(self) -> int:
        """Tokens of the prompt without its soft tokens."""
        return len(self.before) + len(self.after)


class PromptTokenizer:
    """The LLM's tokenizer, and how it writes prompts and targets.

    Args:
        pretrained: the LLM's own tokenizer.
        is_encoder_decoder: whether the LLM is T5-like; it then needs no separator.
        max_input_tokens: inputs are cut to this length; in a chat, only the input's own tokens count.
        max_target_tokens: targets are cut to this length, the special tokens around them included.
        prompt: how requests are written.

    Attributes:
        options: `prompt`, with `chat` or `plain` in place of `auto`.

    Raises:
        UsageError: the tokenizer cannot write prompts this way.
    """

    def __init__(
        self,
        pretrained: PreTrainedTokenizerBase,
        *,
        is_encoder_decoder: bool,
        max_input_tokens: int = MAX_INPUT_TOKENS,
        max_target_tokens: int = MAX_TARGET_TOKENS,
        prompt: PromptOptions = AUTO_PROMPT,
    ) -> None:
        self.pretrained = pretrained
        self.max_input_tokens = max_input_tokens
        self.max_target_tokens = max_target_tokens
        self.options = _resolved(prompt, pretrained, is_encoder_decoder=is_encoder_decoder)
        self._plain_text = PlainText(pretrained)
        self._chat = (
            ChatTemplate(pretrained, self._plain_text, self.options) if self.options.prompt_format == "chat" else None
        )
        self.opening, self.closing = special_tokens_around(pretrained)
        self.separator: list[int] = []
        if is_encoder_decoder:
            self._target_opening, self._target_closing = special_tokens_around(pretrained, as_target=True)
        else:
            self.closing = []  # an end-of-sequence token would end the answer before it begins
            self.separator = pretrained(_SEPARATOR, add_special_tokens=False)["input_ids"]
            self._target_opening, self._target_closing = [], []
        end_token = self._chat.end_token if self._chat else None
        end_id: int | None = self._plain_text.control_ids[end_token] if end_token else pretrained.eos_token_id
        if end_id is None:
            raise UsageError("the LLM's tokenizer has no end-of-sequence token, so answers would never end")
        self.end_id = end_id
        self._target_closing = self._target_closing or [end_id]
        self.pad_id: int = end_id if pretrained.pad_token_id is None else pretrained.pad_token_id

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        *,
        max_input_tokens: int = MAX_INPUT_TOKENS,
        max_target_tokens: int = MAX_TARGET_TOKENS,
        prompt: PromptOptions = AUTO_PROMPT,
    ) -> "PromptTokenizer":
        """The tokenizer of an LLM's folder."""
        return cls(
            loading.load_tokenizer(folder),
            is_encoder_decoder=bool(loading.load_config(folder).is_encoder_decoder),
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
            prompt=prompt,
        )

    def check_system_column(self) -> None:
        """Raises UsageError when requests cannot have system texts of their own."""
        if self._chat is None:
            raise UsageError(
                "the requests have a column 'system', which plain prompts cannot use; remove it, put its text into the "
                "input, or train a plug with --prompt-format chat"
            )
        self._chat.check_system()

    def prompts(self, texts: Sequence[PromptText], *, retrieved_tokens: int = 0) -> list[PromptIds]:
        """Ids of each request: its input is cut to `max_input_tokens`, its retrieved texts share `retrieved_tokens`."""
        if self._chat is not None:
            return self._chat_prompts(self._chat, texts, retrieved_tokens)
        room = max(self.max_input_tokens - len(self.opening) - len(self.closing), 0)
        rows = self._plain_text.ids([text.input for text in texts])
        return [
            self._split(
                [*self.opening],
                self._retrieved(text.retrieved, retrieved_tokens),
                [*row[:room], *self.closing, *self.separator],
            )
            for text, row in zip(texts, rows, strict=True)
        ]

    def conversations(self, chats: Sequence[Sequence[tuple[str, str]]]) -> list[PromptIds]:
        """Ids of whole conversations, each a sequence of (role, text), up to where the LLM answers; nothing is cut.

        Raises UsageError without a chat template, or where it cannot write these turns.
        """
        if self._chat is None:
            raise UsageError("a conversation needs an LLM with a chat template, and this one has none")
        rows = self._plain_text.tokens([self._chat.conversation(chat) for chat in chats]) if chats else []
        return [PromptIds(before=(), after=row.ids) for row in rows]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each target, cut to `max_target_tokens`, the token that ends an answer included.

        For an encoder-decoder LLM they are `tokenizer(text_target=text)`, special tokens included.
        """
        room = max(self.max_target_tokens - len(self._target_opening) - len(self._target_closing), 0)
        rows = self._plain_text.ids(texts, as_target=True)
        return [[*self._target_opening, *row[:room], *self._target_closing] for row in rows]

    def eos_ids(self, config: GenerationConfig | None) -> list[int]:
        """Every token that ends an answer: chat models declare more in their configuration than the tokenizer does."""
        declared = config.eos_token_id if config else None
        ids = declared if isinstance(declared, list) else [declared]
        return sorted({token for token in [*ids, self.end_id, self.pretrained.eos_token_id] if token is not None})

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens."""
        return cast(str, self.pretrained.decode(list(ids), skip_special_tokens=True)).strip()

    def example(self, *, n_soft: int, retrieved: bool = False) -> str:
        """A prompt as the LLM reads it, with words in brackets for the soft tokens and for what differs by request."""
        text = PromptText(input="[input]", retrieved=["[past text]"] if retrieved else [])
        [prompt] = self.prompts([text], retrieved_tokens=self.max_input_tokens)
        parts = (prompt.before, prompt.after, self._target_opening, self._target_closing)
        before, after, start, end = (self.pretrained.decode(list(ids)) for ids in parts)
        return f"{before}[{n_soft} soft tokens]{after}{'' if self.separator else ' → '}{start}[target]{end}"

    def _split(self, opening: list[int], retrieved: list[int], rest: list[int]) -> PromptIds:
        if self.options.soft_position == "start":
            return PromptIds(before=opening, after=[*retrieved, *rest])
        return PromptIds(before=[*opening, *retrieved], after=rest)

    def _retrieved(self, texts: Sequence[str], max_tokens: int) -> list[int]:
        """Ids of retrieved texts, which share `max_tokens` equally, separators included."""
        if not max_tokens:
            return []
        share = self._share(len(texts), max_tokens)
        return [token for row in self._plain_text.ids(texts) for token in (*row[:share], *self.separator)]

    def _share(self, n_texts: int, max_tokens: int) -> int:
        return max(max_tokens // max(n_texts, 1) - len(self.separator), 0)

    def _chat_prompts(self, chat: ChatTemplate, texts: Sequence[PromptText], retrieved_tokens: int) -> list[PromptIds]:
        inputs = [chat.typed(text.input) for text in texts]
        leads = self._leads(chat, texts, retrieved_tokens)
        found: dict[int, PromptIds] = {}
        while numbers := [number for number in range(len(texts)) if number not in found]:
            turns = [chat.turn(inputs[number], lead=leads[number], system=texts[number].system) for number in numbers]
            rows = self._plain_text.tokens([turn.text for turn in turns])
            for number, turn, tokens in zip(numbers, turns, rows, strict=True):
                # A token may also hold the last characters in front of the input, like the space of "[INST] Hi".
                first = bisect_right(tokens.offsets, turn.start, key=lambda offsets: offsets[1])
                end = bisect_left(tokens.offsets, turn.end, key=lambda offsets: offsets[0])
                if end - first > self.max_input_tokens:
                    # Cutting the text, not its tokens, keeps whatever the template writes behind it.
                    inputs[number] = turn.text[turn.start : tokens.offsets[first + self.max_input_tokens][0]]
                else:
                    at = self._n_opening(tokens.ids) if self.options.soft_position == "start" else first
                    found[number] = PromptIds(before=tokens.ids[:at], after=tokens.ids[at:])
        return [found[number] for number in range(len(texts))]

    def _leads(self, chat: ChatTemplate, texts: Sequence[PromptText], max_tokens: int) -> list[str]:
        """What is in front of the input in each user's turn: retrieved texts, cut to their share, a line each."""
        retrieved = [[chat.typed(one) for one in text.retrieved] if max_tokens else [] for text in texts]
        tokens = iter(self._plain_text.tokens([one for row in retrieved for one in row]))
        leads = []
        for row in retrieved:
            share = self._share(len(row), max_tokens)
            leads.append("".join(f"{_first_tokens(one, next(tokens), share)}{_SEPARATOR}" for one in row))
        return leads

    def _n_opening(self, ids: list[int]) -> int:
        """Special tokens that open a chat. ChatML's tokenizers call the token that opens every turn `bos_token`."""
        if ids[: len(self.opening)] == self.opening and self.opening:
            return len(self.opening)
        bos = self.pretrained.bos_token_id
        return int(bos is not None and ids[0] == bos and ids.count(bos) == 1)


def _resolved(prompt: PromptOptions, pretrained: PreTrainedTokenizerBase, *, is_encoder_decoder: bool) -> PromptOptions:
    """The options with `chat` or `plain` in place of `auto`. Raises UsageError for a chat that is not possible."""
    missing = ""
    if is_encoder_decoder:
        missing = "is for decoder-only LLMs, and this one is an encoder-decoder"
    elif not pretrained.chat_template:
        missing = "needs a chat template, and the LLM's tokenizer has none"
    if missing and (prompt.prompt_format == "chat" or prompt.system or prompt.template_argument):
        flag = "--prompt-format chat" if prompt.prompt_format == "chat" else "--system or --template-argument"
        raise UsageError(f"{flag} {missing}; use --prompt-format plain")
    chosen: Literal["chat", "plain"] = "plain" if missing else "chat"
    return replace(prompt, prompt_format=chosen) if prompt.prompt_format == "auto" else prompt


def _first_tokens(text: str, tokens: Tokens, n_tokens: int) -> str:
    """The characters of a text's first tokens."""
    return text[: tokens.offsets[n_tokens][0]] if len(tokens.ids) > n_tokens else text
