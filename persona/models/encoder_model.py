"""The transformer inside a text encoder: which architectures work, how much text they read, and how one is loaded."""

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Encoding
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy

from persona.errors import InputError, UsageError
from persona.models import loading, sentence_transformer
from persona.models.resolve import ModelFolder
from persona.models.sentence_transformer import Declaration
from persona.options import Precision

# Each is compared with sentence-transformers in the tests. Others may need more than a mask to ignore padding (FNet,
# ConvBERT, XLNet), or have no vector per token.
WITH_CLS = (
    "albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
    "eurobert", "gte", "megatron-bert", "mobilebert", "modernbert", "mpnet", "nomic_bert", "rembert", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
# Of the encoder-decoders only the encoder is used.
T5_LIKE = ("mt5", "t5", "umt5")
# They mix bf16 with float32 inside.
_ONLY_FP32 = ("deberta",)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What can be known of an encoder without its weights.

    Attributes:
        kind: the `model_type` of its configuration.
        width: of its token vectors.
        n_positions: the most tokens of a text that it reads; None if there is no limit.
        n_tokens: rows of its embedding.
    """

    kind: str
    width: int
    n_positions: int | None
    n_tokens: int

    def check_length(self, max_tokens: int) -> None:
        """Raises UsageError if texts of `max_tokens` tokens have more positions than the encoder."""
        if self.n_positions is not None and max_tokens > self.n_positions:
            raise UsageError(
                f"the encoder reads at most {self.n_positions} tokens of a text, not {max_tokens}; lower the limit"
            )

    def check_precision(self, precision: Precision) -> None:
        """Raises UsageError for bf16 where the encoder cannot compute in it."""
        if precision == "bf16" and self.kind in _ONLY_FP32:
            raise UsageError(f"encoders of type {self.kind} cannot compute in bf16; use --precision fp32 or auto")


def check_encoder(folder: ModelFolder) -> Architecture:
    """What the folder's encoder can read; checks all that can be checked without loading weights.

    Raises:
        InputError: the architecture or a declaration is not supported, or weights or tokens are missing.
    """
    found = architecture(folder)
    _check_tokenizer(load_tokenizer(folder, sentence_transformer.read(folder)), found.n_tokens, folder)
    config = loading.load_config(folder)
    loading.check_weights(folder, auto_class(config), config=config)
    return found


def architecture(folder: ModelFolder) -> Architecture:
    """What the folder's encoder can read. Raises InputError for architectures that are not supported."""
    config = loading.load_config(folder)
    known = (*WITH_CLS, *DECODERS, *T5_LIKE)
    if config.model_type not in known:
        raise InputError(
            f"the encoder {folder.name!r} is of type {config.model_type}, which is not supported; supported are "
            f"{', '.join(sorted(known))}"
        )
    if config.model_type in WITH_CLS and getattr(config, "is_decoder", False):
        raise InputError(
            f"the encoder {folder.name!r} is a decoder (is_decoder in config.json), which is not supported"
        )
    with torch.device("meta"):
        model: Any = _without_weights(config)
    return Architecture(
        kind=config.model_type,
        width=config.hidden_size,
        n_positions=_positions(model, config),
        n_tokens=model.get_input_embeddings().num_embeddings,
    )


def default_pooling(folder: ModelFolder, kind: str) -> str:
    """The pooling of a plain transformers folder. Raises UsageError where only its author knows."""
    if kind in WITH_CLS:
        return "cls"
    raise UsageError(
        f"the encoder {folder.name!r} of type {kind} does not say how its token vectors become one; give --pooling "
        "(its model card says which: mostly lasttoken for a causal model, mean for others)"
    )


def runs_in(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The precision in which an encoder of this type runs beside a model in `dtype`."""
    return torch.float32 if kind in _ONLY_FP32 else dtype


def load_transformer(folder: ModelFolder, *, dtype: torch.dtype, **options: Any) -> nn.Module:
    """The pretrained transformer, without a pooler; `options` are more arguments of `from_pretrained`."""
    config = options.setdefault("config", loading.load_config(folder))
    config.use_cache = False
    return _stack(loading.load_model(auto_class(config), folder, dtype=dtype, **options))


def new_transformer(config: PreTrainedConfig) -> nn.Module:
    """The same with random weights in float32, to load other ones into."""
    return _without_weights(config)


def load_tokenizer(folder: ModelFolder, declared: Declaration) -> PreTrainedTokenizerBase:
    """The encoder's tokenizer, with the lower-casing that the folder declares."""
    tokenizer = loading.load_tokenizer(folder)
    if declared.lower_case:
        _lower_case(tokenizer, folder)
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, n_tokens: int, folder: ModelFolder) -> None:
    """Raises InputError if the tokenizer gives ids that the model has no embedding for."""
    largest, token = max((number, token) for token, number in tokenizer.get_vocab().items())
    if largest >= n_tokens:
        raise InputError(
            f"the encoder {folder.name!r} has embeddings for the ids below {n_tokens}, but its tokenizer gives "
            f"{largest} for {token!r}; resize the model's embeddings, or remove the token"
        )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of padding, which is masked: any will do if there is no token for it."""
    number = tokenizer.pad_token_id
    return 0 if number is None else int(number)


def token_rows(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, prompt: str, max_tokens: int
) -> list[list[int]]:
    """Token ids of each text behind the prompt, cut to `max_tokens`, special tokens included; never an empty row."""
    if not texts:
        return []  # the tokenizer rejects an empty list
    texts = [prompt + text for text in texts] if prompt else texts
    if isinstance(tokenizer, TokenizersBackend) and calls_backend_only(tokenizer):
        encoded = [encoding.ids for encoding in _encodings(tokenizer, texts, max_tokens)]
    else:
        encoded = tokenizer(texts, truncation=True, max_length=max_tokens, return_attention_mask=False)["input_ids"]
    # Attention over no token at all gives NaN.
    return [row or [pad_id(tokenizer)] for row in encoded]


def calls_backend_only(tokenizer: TokenizersBackend) -> bool:
    """Whether a call of the tokenizer gives what its Rust part gives."""
    return all(
        getattr(type(tokenizer), name) is getattr(TokenizersBackend, name) for name in ("__call__", "_encode_plus")
    )


def _encodings(tokenizer: TokenizersBackend, texts: list[str], max_tokens: int) -> list[Encoding]:
    """What `tokenizer(texts)` computes, without the dictionaries that it makes of each text in Python."""
    backend = tokenizer.backend_tokenizer
    tokenizer.set_truncation_and_padding(
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.LONGEST_FIRST,
        max_length=max_tokens,
        stride=0,
        pad_to_multiple_of=None,
        padding_side=None,
    )
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings: list[Encoding] = backend.encode_batch_fast(texts)
    return encodings


def _without_weights(config: PreTrainedConfig) -> nn.Module:
    config.use_cache = False
    return _stack(auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False))


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class of transformers that loads this architecture without a head."""
    return AutoModelForTextEncoding if config.model_type in T5_LIKE else AutoModel


def _stack(model: Any) -> nn.Module:
    """The part that is used: T5's wrapper holds its embedding twice, and no gradient reaches BERT's pooler."""
    if model.config.model_type in T5_LIKE:
        model = model.encoder
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    stack: nn.Module = model
    return stack


def _positions(model: nn.Module, config: PreTrainedConfig) -> int | None:
    """The most tokens of a text. RoBERTa-like models count positions from the padding id on, and so have fewer."""
    limits = []
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest > 0:
        limits.append(longest)
    for module in model.modules():
        table, padding = getattr(module, "position_embeddings", None), getattr(module, "padding_idx", None)
        if isinstance(table, nn.Embedding):
            limits.append(table.num_embeddings - (padding + 1 if isinstance(padding, int) else 0))
    return min(limits, default=None)


def _lower_case(tokenizer: PreTrainedTokenizerBase, folder: ModelFolder) -> None:
    from tokenizers.normalizers import Lowercase, Sequence

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"the encoder {folder.name!r} declares do_lower_case, which is not supported with its tokenizer "
            f"({type(tokenizer).__name__}); save it as tokenizer.json"
        )
    own = backend.normalizer
    backend.normalizer = Lowercase() if own is None else Sequence([Lowercase(), own])
