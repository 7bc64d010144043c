"""Texts to the token ids that an encoder reads, with the least work for plain English.

Tokenizers of BERT's kind spend half of their time on a normalizer that removes control characters and accents and sets
Chinese characters apart. All that it does to printable ASCII is to lower the case, so such texts go to a copy of the
tokenizer without it.
"""

import re
from collections.abc import Sequence
from typing import TypeGuard

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from persona.models import encoder_model


class TextTokenizer:
    """What `encoder_model.token_rows` gives, sooner where it can be.

    Args:
        tokenizer: of the encoder.
        prompt: in front of each text.
        max_tokens: texts are cut to this length, prompt and special tokens included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, prompt: str, max_tokens: int) -> None:
        self.tokenizer, self.prompt, self.max_tokens = tokenizer, prompt, max_tokens
        self.plain = _PlainText(tokenizer, max_tokens) if _PlainText.serves(tokenizer) else None

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included."""
        if self.plain is None:
            return self._normalized(texts)
        prompted = [self.prompt + text for text in texts] if self.prompt else texts
        is_plain = [self.plain.other.search(text) is None for text in prompted]
        plain = iter(self.plain.rows([text for text, plain in zip(prompted, is_plain, strict=True) if plain]))
        others = iter(self._normalized([text for text, plain in zip(texts, is_plain, strict=True) if not plain]))
        # Attention over no token at all gives NaN.
        return [next(plain if here else others) or [encoder_model.pad_id(self.tokenizer)] for here in is_plain]

    def _normalized(self, texts: Sequence[str]) -> list[list[int]]:
        return encoder_model.token_rows(self.tokenizer, list(texts), prompt=self.prompt, max_tokens=self.max_tokens)


class _PlainText:
    """The copy for texts without a match of `other`."""

    def __init__(self, tokenizer: TokenizersBackend, max_tokens: int) -> None:
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.lowers = self.backend.normalizer.lowercase
        self.backend.normalizer = None
        self.backend.no_padding()
        self.backend.enable_truncation(max_tokens, direction=tokenizer.truncation_side)
        # In a text without the first character of any added token, case aside, there is none of them to be found.
        firsts = {str(token)[0] for token in tokenizer.added_tokens_decoder.values()}
        excluded = {case for first in firsts for case in (first.lower(), first.upper())}
        plain = [*"\t\n\r", *map(chr, range(ord(" "), 127))]
        self.other = re.compile(f"[^{''.join(re.escape(letter) for letter in plain if letter not in excluded)}]")

    @staticmethod
    def serves(tokenizer: PreTrainedTokenizerBase) -> TypeGuard[TokenizersBackend]:
        """Whether the tokenizer is of BERT's kind."""
        if not isinstance(tokenizer, TokenizersBackend):
            return False
        backend = tokenizer.backend_tokenizer
        return (
            encoder_model.calls_backend_only(tokenizer)
            and isinstance(backend.model, WordPiece)
            and isinstance(backend.normalizer, BertNormalizer)
            and isinstance(backend.pre_tokenizer, BertPreTokenizer)
            and all(str(token) and str(token).isascii() for token in tokenizer.added_tokens_decoder.values())
        )

    def rows(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts without a match of `other`."""
        lowered = [text.lower() for text in texts] if self.lowers else texts
        return [encoding.ids for encoding in self.backend.encode_batch_fast(lowered)]
