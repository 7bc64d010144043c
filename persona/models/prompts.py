"""How requests become the token ids that an LLM reads; works without the LLM's weights.

An encoder-decoder LLM (T5-like) reads [prefix; soft tokens; input] and decodes the target. A decoder-only LLM
(Llama-like) reads [prefix; soft tokens; input; separator; target] as one row.
"""

from collections.abc import Sequence
from typing import cast

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from persona.models.resolve import ModelFolder

MAX_INPUT_TOKENS = 256
MAX_TARGET_TOKENS = 256
# Without it, a decoder-only LLM would read request and answer as one word.
_SEPARATOR = "\n"


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
            AutoTokenizer.from_pretrained(folder.path),
            is_encoder_decoder=bool(AutoConfig.from_pretrained(folder.path).is_encoder_decoder),
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
        )

    def inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each request's text, cut to `max_input_tokens`, followed by the separator."""
        if not texts:
            return []  # the tokenizer rejects an empty list
        rows = self.pretrained(list(texts), truncation=True, max_length=self.max_input_tokens)["input_ids"]
        return [row + self.separator for row in rows]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each target, cut to `max_target_tokens`, end-of-sequence included, without special tokens in front."""
        if not texts:
            return []
        rows = self.pretrained(list(texts), add_special_tokens=False)["input_ids"]
        return [[*row[: self.max_target_tokens - 1], self.eos_id] for row in rows]

    def prefixes(self, texts: Sequence[Sequence[str]], max_tokens: int) -> list[list[int]]:
        """Ids of each request's retrieved texts, which share `max_tokens` equally, separators included."""
        prefixes: list[list[int]] = []
        for retrieved in texts:
            prefix: list[int] = []
            share = max(max_tokens // max(len(retrieved), 1) - len(self.separator), 0)
            for text in retrieved:
                ids = self.pretrained(text, add_special_tokens=False)["input_ids"]
                prefix += [*ids[:share], *self.separator]
            prefixes.append(prefix)
        return prefixes

    def eos_ids(self, config: GenerationConfig | None) -> list[int]:
        """Every token that ends an answer: chat models declare more in their configuration than the tokenizer does."""
        declared = config.eos_token_id if config else None
        ids = declared if isinstance(declared, list) else [declared]
        return sorted({token for token in [*ids, self.eos_id] if token is not None})

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens."""
        return cast(str, self.pretrained.decode(list(ids), skip_special_tokens=True)).strip()
