"""How requests become the token ids that an LLM reads; works without the LLM's weights.

An encoder-decoder LLM (T5-like) reads [opening; retrieved texts; soft tokens; input; closing] and decodes the target. A
decoder-only LLM (Llama-like) reads [opening; retrieved texts; soft tokens; input; separator; target] as one row. Opening
and closing are the special tokens that the tokenizer adds, such as `<bos>`: an LLM expects them at the ends, whatever is
between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from transformers import GenerationConfig, PreTrainedTokenizerBase

from persona.models import loading
from persona.models.resolve import ModelFolder

MAX_INPUT_TOKENS = 256
MAX_TARGET_TOKENS = 256
# Without it, a decoder-only LLM would read request and answer as one word.
_SEPARATOR = "\n"


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """The texts of one request; `retrieved` are texts of the user's history that the LLM reads first."""

    input: str
    retrieved: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class PromptIds:
    """The token ids of one request, split where its soft tokens go."""

    before: Sequence[int]
    after: Sequence[int]

    def __len__(self) -> int:
        """Tokens of the prompt without its soft tokens."""
        return len(self.before) + len(self.after)


class PromptTokenizer:
    """The LLM's tokenizer, and the lengths and separators of its prompts.

    Args:
        pretrained: the LLM's own tokenizer.
        is_encoder_decoder: whether the LLM is T5-like; it then needs no separator.
        max_input_tokens: inputs are cut to this length.
        max_target_tokens: targets are cut to this length, the end-of-sequence token included.
    """

    def __init__(
        self,
        pretrained: PreTrainedTokenizerBase,
        *,
        is_encoder_decoder: bool,
        max_input_tokens: int = MAX_INPUT_TOKENS,
        max_target_tokens: int = MAX_TARGET_TOKENS,
    ) -> None:
        self.pretrained = pretrained
        self.max_input_tokens = max_input_tokens
        self.max_target_tokens = max_target_tokens
        self.eos_id: int = pretrained.eos_token_id
        self.pad_id: int = self.eos_id if pretrained.pad_token_id is None else pretrained.pad_token_id
        self.separator: list[int] = (
            [] if is_encoder_decoder else pretrained(_SEPARATOR, add_special_tokens=False)["input_ids"]
        )
        self.opening, self.closing = _special_tokens(pretrained)
        if not is_encoder_decoder:
            self.closing = []  # an end-of-sequence token would end the answer before it begins

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        *,
        max_input_tokens: int = MAX_INPUT_TOKENS,
        max_target_tokens: int = MAX_TARGET_TOKENS,
    ) -> "PromptTokenizer":
        """The tokenizer of an LLM's folder."""
        return cls(
            loading.load_tokenizer(folder),
            is_encoder_decoder=bool(loading.load_config(folder).is_encoder_decoder),
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
        )

    def prompts(self, texts: Sequence[PromptText], *, retrieved_tokens: int = 0) -> list[PromptIds]:
        """Ids of each request: its input is cut to `max_input_tokens`, its retrieved texts share `retrieved_tokens`."""
        if not texts:
            return []  # the tokenizer rejects an empty list
        rows = self.pretrained([text.input for text in texts], add_special_tokens=False)["input_ids"]
        room = self.max_input_tokens - len(self.opening) - len(self.closing)
        return [
            PromptIds(
                before=[*self.opening, *self._retrieved(text.retrieved, retrieved_tokens)],
                after=[*row[:room], *self.closing, *self.separator],
            )
            for text, row in zip(texts, rows, strict=True)
        ]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each target, cut to `max_target_tokens`, end-of-sequence included, without special tokens in front."""
        if not texts:
            return []
        rows = self.pretrained(list(texts), add_special_tokens=False)["input_ids"]
        return [[*row[: self.max_target_tokens - 1], self.eos_id] for row in rows]

    def _retrieved(self, texts: Sequence[str], max_tokens: int) -> list[int]:
        """Ids of retrieved texts, which share `max_tokens` equally, separators included."""
        ids: list[int] = []
        share = max(max_tokens // max(len(texts), 1) - len(self.separator), 0)
        for text in texts if max_tokens else ():
            ids += [*self.pretrained(text, add_special_tokens=False)["input_ids"][:share], *self.separator]
        return ids

    def eos_ids(self, config: GenerationConfig | None) -> list[int]:
        """Every token that ends an answer: chat models declare more in their configuration than the tokenizer does."""
        declared = config.eos_token_id if config else None
        ids = declared if isinstance(declared, list) else [declared]
        return sorted({token for token in [*ids, self.eos_id] if token is not None})

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens."""
        return cast(str, self.pretrained.decode(list(ids), skip_special_tokens=True)).strip()


def _special_tokens(pretrained: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer adds in front of a text and behind it."""
    plain = pretrained("a", add_special_tokens=False)["input_ids"]
    whole = pretrained("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]
