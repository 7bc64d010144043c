"""Estimate the cost of work: floating-point operations from model sizes, GPU-hours from a measured rate.

An a × b matrix costs 2·a·b operations per token. Attention among n tokens, with heads of total width w, costs 4·n·w per
token and layer. Embeddings, norms and softmax are left out; together they are below 1 % of any real model. A
`config.json` whose field names differ from those of BERT, Llama and T5 raises KeyError.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TERA = 1e12
_BYTES_PER_TOKEN = 4  # of English text; other languages have fewer
_BACKWARD = 1  # in units of a forward pass: gradients of a frozen model, with respect to its input only
_BACKWARD_TRAINED = 2  # gradients of a trained model, with respect to input and weights


def tokens_of_text(n_bytes: int) -> int:
    """The approximate number of tokens in `n_bytes` of text."""
    return n_bytes // _BYTES_PER_TOKEN


def encoder_flops(config: Mapping[str, Any], *, n_texts: float, tokens: int) -> float:
    """Operations to encode texts of `tokens` tokens each, for the `config.json` of a BERT-like encoder."""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    matrices = 4 * width * width + 2 * width * config["intermediate_size"]
    return float(n_texts * tokens * layers * (2 * matrices + 4 * tokens * width))


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """A stack of layers: their number, total width of heads, and matrix entries of attention and feed-forward."""

    n: int
    heads: int
    attention: int
    feed_forward: int

    def flops(self, tokens: int, context: float) -> float:
        """Operations for `tokens` tokens that each attend to `context` tokens."""
        return self.n * tokens * (2 * (self.attention + self.feed_forward) + 4 * context * self.heads)


def llm_flops(config: Mapping[str, Any], *, n_requests: float, inputs: int, outputs: int, beams: int = 1) -> float:
    """Operations of one forward pass over requests with `inputs` input tokens and `outputs` output tokens each.

    The same whether the output is known (training) or generated token by token; each beam adds the output's cost.
    """
    generated = outputs * beams
    if config.get("is_encoder_decoder") or config.get("model_type") == "t5":
        width, heads = config["d_model"], config["num_heads"] * config["d_kv"]
        gates = 3 if str(config.get("feed_forward_proj", "relu")).startswith("gated") else 2
        feed_forward = gates * width * config["d_ff"]
        decoders = config.get("num_decoder_layers") or config["num_layers"]
        encoder = _Layers(n=config["num_layers"], heads=heads, attention=4 * width * heads, feed_forward=feed_forward)
        decoder = _Layers(n=decoders, heads=heads, attention=4 * width * heads, feed_forward=feed_forward)
        # Cross-attention: keys and values once per input token, queries and results once per output token.
        cross_attention = 2 * width * heads * 2 * (inputs + generated) + 4 * inputs * heads * generated
        one = encoder.flops(inputs, inputs) + decoder.flops(generated, outputs) + decoders * cross_attention
        head = 2 * width * config["vocab_size"] * generated
    else:
        width, n_heads = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim") or width // n_heads
        heads = n_heads * size
        shared = (config.get("num_key_value_heads") or n_heads) * size
        decoder = _Layers(
            n=config["num_hidden_layers"],
            heads=heads,
            attention=2 * width * (heads + shared),
            feed_forward=3 * width * config["intermediate_size"],
        )
        one = decoder.flops(inputs + generated, inputs + outputs)
        head = 2 * width * config["vocab_size"] * (inputs + generated)
    return float(n_requests * (one + head))


def training_flops(
    llm: Mapping[str, Any],
    encoder: Mapping[str, Any],
    *,
    n_requests: float,
    inputs: int,
    outputs: int,
    query: int,
    epochs: int,
) -> float:
    """Operations to train a plug: forward and backward through the frozen LLM and the trained query encoder."""
    frozen = llm_flops(llm, n_requests=n_requests, inputs=inputs, outputs=outputs)
    trained = encoder_flops(encoder, n_texts=n_requests, tokens=query)
    return epochs * ((1 + _BACKWARD) * frozen + (1 + _BACKWARD_TRAINED) * trained)


def gpu_hours(flops: float, tflops: float) -> float:
    """Hours on one GPU that reaches `tflops` · 10¹² operations per second. Raises ValueError unless the rate is > 0."""
    if tflops <= 0:
        raise ValueError(f"the rate must be above 0 TFLOP/s, got {tflops}")
    return flops / (tflops * TERA) / 3600
