"""What single kinds of LLMs need, and which kinds are refused: known from their configuration, without weights."""

from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from persona.errors import InputError

# They multiply the embeddings of token ids by sqrt(width) outside their embedding module, if `scale_embedding` is set.
_SCALED_BY_WIDTH = ("pegasus", "marian", "blenderbot-small", "mvp")
# Layers that keep the keys and values of single tokens, so that a mask can hide padding in front of a row.
_KEEP_KEYS = {"full_attention", "sliding_attention"}

_STATE = "answers need a key-value cache, and its state is of another kind"
_CAPACITY = "each of its experts reads a limited number of tokens, so a request would depend on its batch"
_LANGUAGE = "its decoder starts with the token of a language, and its configuration has no decoder_start_token_id"
_REFUSED = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm"), _STATE),
    **dict.fromkeys(("switch_transformers", "nllb-moe"), _CAPACITY),
    "openai-gpt": "transformers gives it no cache, and answers need one",
    "xlnet": "it predicts tokens in any order, and its answers would need another kind of decoding",
    "xlm": "it marks languages in its input, which requests do not name",
    "prophetnet": "it predicts several tokens at each position, and its loss is another one",
    "cpmant": "it accepts no embeddings, so it cannot read soft tokens",
    "reformer": "its attention needs inputs of fixed lengths",
    "minimax": "its cache cannot be reordered, which answers need",
    "fsmt": "its positions depend on token ids, which soft tokens do not have",
}
# Their training loss moves a target's last token, the one of its language, to the front.
_LANGUAGE_FIRST = ("mbart", "plbart")
_ENCODERS = (
    *("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta"),
    *("roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
# They read other inputs as well, but texts as a language model alone would.
_READ_TEXTS = ("gemma3", "qwen3_5")
_OTHER_INPUTS = ("audio", "image", "speech", "text", "video", "vision")


def check_kind(name: str, config: PreTrainedConfig, *, flag: str = "--llm") -> None:
    """Raises InputError for a kind of LLM that would not give what plain transformers gives.

    A kind that is neither known to work nor known not to is for `persona.engines.probe` to judge.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    kind, reason = config.model_type, ""
    heads = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if kind in _REFUSED:
        reason = _REFUSED[kind]
    elif kind in _ENCODERS:
        reason = "it is an encoder, which does not generate text"
    elif kind not in _READ_TEXTS and any(part.startswith(_OTHER_INPUTS) for part in config.sub_configs):
        reason = "it also reads images or sound; give the folder of its language model alone, if there is one"
    elif getattr(config, "hidden_size_per_layer_input", 0):
        reason = "its layers look up token ids, which soft tokens do not have"
    elif kind in _LANGUAGE_FIRST and config.decoder_start_token_id is None:
        reason = _LANGUAGE
    elif type(config) not in heads:
        reason = "transformers has no language model of this kind"
    if reason:
        raise InputError(
            f"{flag}: {name!r} is of the kind {kind!r}, which is not supported: {reason}; choose another LLM"
        )


def embedding_scale(config: PreTrainedConfig) -> float:
    """The factor by which a model multiplies the embeddings of token ids, but not given `inputs_embeds`."""
    settings: Any = config
    if config.model_type in _SCALED_BY_WIDTH and settings.scale_embedding:
        return float(settings.d_model**0.5)
    return float(settings.embedding_multiplier) if config.model_type == "falcon_h1" else 1.0


def decoder_start(model: PreTrainedModel) -> int | None:
    """The token that begins the decoder's row, as in the model's own training loss; None for a decoder-only LLM."""
    if not model.config.is_encoder_decoder:
        return None
    shift = cast(Any, getattr(model, "prepare_decoder_input_ids_from_labels", None))
    if shift is not None and model.config.model_type not in _LANGUAGE_FIRST:
        return int(shift(labels=torch.tensor([[1]]))[0, 0])
    return int(model.config.decoder_start_token_id)


def holds_keys_only(model: PreTrainedModel) -> bool:
    """Whether all that a decoder-only LLM remembers of a text are keys and values.

    Padding in front of a text then has no effect if it is masked. It would change a recurrent state or a convolution,
    and move the borders of attention by chunks.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    return not getattr(model, "_is_stateful", False) and kinds <= _KEEP_KEYS
