"""What work costs: multiplications from the sizes of the models, hours from a measured rate, money from a price.

A matrix of a × b costs 2·a·b floating-point operations a token, attention 4·n·w a token and layer among n tokens with
heads of w together. Embeddings, norms and softmax are left out: together they are below 1 % of any real model. A model
whose `config.json` names its sizes otherwise than BERT, Llama and T5 do ends in a KeyError.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TERA = 1e12
_BYTES_A_TOKEN = 4  # English text; other languages have fewer, so more tokens
_BACKWARD = 1  # through a frozen model only towards its input; as much as forward
_BACKWARD_TRAINED = 2  # and towards its weights


def tokens_of_text(n_bytes: int) -> int:
    """About how many tokens a text of so many bytes has."""
    return n_bytes // _BYTES_A_TOKEN


def encoder_flops(config: Mapping[str, Any], *, n_texts: float, tokens: int) -> float:
    """Operations to encode texts of `tokens` tokens each with a BERT of this `config.json`."""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    matrices = 4 * width * width + 2 * width * config["intermediate_size"]
    return float(n_texts * tokens * layers * (2 * matrices + 4 * tokens * width))


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """Layers of one kind: their number, the widths of their attention, and the entries of their matrices."""

    n: int
    heads: int
    attention: int
    feed_forward: int

    def flops(self, tokens: int, seen: float) -> float:
        """Operations for `tokens` tokens, each of which looks at `seen` tokens."""
        return self.n * tokens * (2 * (self.attention + self.feed_forward) + 4 * seen * self.heads)


def llm_flops(config: Mapping[str, Any], *, n_requests: float, inputs: int, outputs: int, beams: int = 1) -> float:
    """Operations of one forward pass over requests of `inputs` tokens with answers of `outputs` tokens.

    The same for an answer that is known (training) and one that is made token by token, which takes it once a beam.
    """
    made = outputs * beams
    if config.get("is_encoder_decoder") or config.get("model_type") == "t5":
        width, heads = config["d_model"], config["num_heads"] * config["d_kv"]
        gates = 3 if str(config.get("feed_forward_proj", "relu")).startswith("gated") else 2
        feed_forward = gates * width * config["d_ff"]
        decoders = config.get("num_decoder_layers") or config["num_layers"]
        encoder = _Layers(n=config["num_layers"], heads=heads, attention=4 * width * heads, feed_forward=feed_forward)
        decoder = _Layers(n=decoders, heads=heads, attention=4 * width * heads, feed_forward=feed_forward)
        # Keys and values of what was read, made once; queries and results of what is written, for each token.
        across = 2 * width * heads * 2 * (inputs + made) + 4 * inputs * heads * made
        one = encoder.flops(inputs, inputs) + decoder.flops(made, outputs) + decoders * across
        head = 2 * width * config["vocab_size"] * made
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
        one = decoder.flops(inputs + made, inputs + outputs)
        head = 2 * width * config["vocab_size"] * (inputs + made)
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
    """Operations to train a plug: through the frozen LLM and back, and through the query encoder, which is trained."""
    frozen = llm_flops(llm, n_requests=n_requests, inputs=inputs, outputs=outputs)
    trained = encoder_flops(encoder, n_texts=n_requests, tokens=query)
    return epochs * ((1 + _BACKWARD) * frozen + (1 + _BACKWARD_TRAINED) * trained)


def gpu_hours(flops: float, tflops: float) -> float:
    """Hours of one GPU that reaches `tflops` · 10¹² operations a second. Raises ValueError for a rate that is none."""
    if tflops <= 0:
        raise ValueError(f"a rate of {tflops} TFLOP/s does no work")
    return flops / (tflops * TERA) / 3600


def store_bytes(*, n_behaviors: int, width: int) -> int:
    """About how large a store gets: a vector in float16, which does not compress, and some 60 bytes of keys a row."""
    return n_behaviors * (2 * width + 60)


def buckets(n_behaviors: int) -> int:
    """Buckets of a new store that will hold so many behaviors: one for each 100,000, at least `embed`'s default."""
    return max(64, -(-n_behaviors // 100_000))
