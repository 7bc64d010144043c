"""What LLMs of different architectures need: the scale of their embeddings, and how they can be padded."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

# They multiply the embeddings of token ids by sqrt(width) outside their embedding module, if `scale_embedding` is set.
_SCALED_BY_WIDTH = ("pegasus", "marian", "blenderbot-small", "mvp")
# Layers that keep the keys and values of single tokens, so that a mask can hide padding in front of a row.
_KEEP_KEYS = {"full_attention", "sliding_attention"}


def embedding_scale(config: PreTrainedConfig) -> float:
    """The factor by which a model multiplies the embeddings of token ids, but not given `inputs_embeds`."""
    if config.model_type in _SCALED_BY_WIDTH and config.scale_embedding:
        return float(config.d_model) ** 0.5
    if config.model_type == "falcon_h1":
        return float(config.embedding_multiplier)
    return 1.0


def decoder_start(model: PreTrainedModel) -> int | None:
    """The token that begins the decoder's row, as in the model's own training loss; None for a decoder-only LLM."""
    if not model.config.is_encoder_decoder:
        return None
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return int(model.prepare_decoder_input_ids_from_labels(labels=torch.tensor([[1]]))[0, 0])
    return int(model.config.decoder_start_token_id)


def holds_keys_only(model: PreTrainedModel) -> bool:
    """Whether all that a decoder-only LLM remembers of a text are keys and values.

    Padding in front of a text then has no effect if it is masked. It would change a recurrent state or a convolution,
    and move the borders of attention by chunks.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    return not getattr(model, "_is_stateful", False) and kinds <= _KEEP_KEYS
