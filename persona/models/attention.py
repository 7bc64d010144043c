"""Faster attention for CPUs in bf16, where torch's own kernel takes as long as all linear layers together.

Torch's kernel spends most of its time on row maxima, on masks and on narrow heads, and its backward pass takes five
times as long as its forward pass. Two replacements are registered with transformers by name:

`persona_exp`, for frozen encoders. While exp can neither overflow nor underflow, softmax needs no row maximum:
softmax(S)·V is exp(S)·V divided by the row sums of exp(S), and a masked key is one whose row of V is zero.

`persona_bmm`, for LLMs, which gradients pass through: plain matrix products. Query heads that share a key head become
rows of one product. It keeps all attention weights, so long texts still use torch's kernel.

Shapes: B texts, H heads, h key heads, T tokens, U query tokens, G = B·H, g = B·h, w width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn

EXP, BMM = "persona_exp", "persona_bmm"
ENCODERS = ("bert", "roberta", "xlm-roberta")
LLMS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "olmo2", "t5")
# Most weights a layer may keep for the backward pass: 32 MiB in bf16.
_MAX_WEIGHTS = 2**24
# exp(80)·512 and exp(-80) are far from the limits of bf16, which has the range of float32.
_MAX_SCORE = 80.0
# Scores per core at a time: 2 MiB in bf16, which stay in its cache during the five steps that read them.
_CACHED_SCORES = 2**20


def register_attention(model_type: str, *, dtype: torch.dtype, device: torch.device) -> str | None:
    """The `attn_implementation` for a model of this type, registered if needed; None is transformers' default."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if dtype != torch.bfloat16 or device.type != "cpu" or model_type not in (*ENCODERS, *LLMS):
        return None
    name, function = (EXP, attend_by_exp) if model_type in ENCODERS else (BMM, attend_by_bmm)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def encoder_attention(model_type: str, *, dtype: torch.dtype, device: torch.device) -> str | None:
    """The same for encoders: those built like an LLM keep transformers' default, since they may be bidirectional."""
    return register_attention(model_type, dtype=dtype, device=device) if model_type in ENCODERS else None


def attend_by_exp(
    module: nn.Module,  # noqa: ARG001 - the signature is transformers'
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q·kᵀ·scaling)·v over unmasked keys, all (B, H, T, w); `attention_mask` (B, 1, T, T) has equal rows.

    Returns:
        (B, T, H, w), the layout transformers expects, and no weights.
    """
    n, heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    chunk = max(1, torch.get_num_threads() * _CACHED_SCORES // (heads * length**2))
    mixed_BTHw = query.new_empty(n, length, heads, width)
    for first in range(0, n, chunk):
        texts = slice(first, first + chunk)
        real_B1T1 = None if attention_mask is None else attention_mask[texts, :, 0, :, None]
        mixed_BTHw[texts] = _attend_by_exp(query[texts], key[texts], value[texts], real_B1T1, scale).transpose(1, 2)
    return mixed_BTHw, None


def _attend_by_exp(query: Tensor, key: Tensor, value: Tensor, real_B1T1: Tensor | None, scale: float) -> Tensor:
    """The same for few enough texts that their scores stay in the cache between steps; returns (B, H, T, w)."""
    n, heads, length, width = query.shape
    q_GTw, k_GTw, v_GTw = (part.reshape(n * heads, length, width) for part in (query, key, value))
    score_GTT = torch.baddbmm(q_GTw.new_empty(1, 1, 1), q_GTw, k_GTw.transpose(1, 2), beta=0, alpha=scale)
    least, greatest = torch.aminmax(score_GTT)
    if least < -_MAX_SCORE or greatest > _MAX_SCORE:
        return _by_softmax(score_GTT, v_GTw, real_B1T1, heads)
    weight_GTT = score_GTT.exp_()
    if real_B1T1 is None:
        sum_GT1 = weight_GTT.sum(-1, keepdim=True)
    else:
        real_GT1 = real_B1T1.to(v_GTw.dtype).expand(n, heads, length, 1).reshape(n * heads, length, 1)
        v_GTw, sum_GT1 = v_GTw * real_GT1, torch.bmm(weight_GTT, real_GT1)
    return torch.bmm(weight_GTT, v_GTw).div_(sum_GT1).view(n, heads, length, width)


def _by_softmax(score_GTT: Tensor, v_GTw: Tensor, real_B1T1: Tensor | None, heads: int) -> Tensor:
    """Ordinary softmax attention, for scores at which exp alone would overflow or underflow."""
    score_BHTT = score_GTT.view(-1, heads, *score_GTT.shape[1:])
    if real_B1T1 is not None:
        score_BHTT = score_BHTT.masked_fill(~real_B1T1.transpose(-1, -2), -torch.inf)
    mixed_BHTw: Tensor = score_BHTT.softmax(-1) @ v_GTw.view(-1, heads, *v_GTw.shape[1:])
    return mixed_BHTw


def attend_by_bmm(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(q·kᵀ·scaling + bias)·v: query (B, H, U, w), key and value (B, h, T, w), boolean mask (B, 1, U, T).

    Without a mask, a causal module gets the causal one. Torch's kernel takes over for a single query, as in each step
    of decoding, and when there are too many weights to keep.

    Returns:
        (B, U, H, w), the layout transformers expects, and no weights.
    """
    n, heads, n_queries, width = query.shape
    key_heads, length = key.shape[1:3]
    if n_queries == 1 or n * heads * n_queries * length > _MAX_WEIGHTS:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        others |= {"scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        mixed_BUHw, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return mixed_BUHw, None
    scale = width**-0.5 if scaling is None else scaling
    if attention_mask is None:
        attention_mask = query.new_ones(n_queries, length, dtype=torch.bool)
        if getattr(module, "is_causal", True) if is_causal is None else is_causal:
            attention_mask = attention_mask.tril()
    q_gRw = query.reshape(n * key_heads, -1, width)
    k_gTw, v_gTw = (part.reshape(n * key_heads, length, width) for part in (key, value))
    score_gRT = torch.baddbmm(q_gRw.new_empty(1, 1, 1), q_gRw, k_gTw.transpose(1, 2), beta=0, alpha=scale)
    # Not -inf: a padding row masks every key, and must not become NaN.
    bias = query.new_zeros(()).masked_fill(~attention_mask, torch.finfo(query.dtype).min / 2)
    if position_bias is not None:
        bias = bias + position_bias
    weight_BHUT = (score_gRT.view(n, heads, n_queries, length) + bias).softmax(-1)
    mixed_gRw = torch.bmm(weight_BHUT.view(n * key_heads, -1, length), v_gTw)
    return mixed_gRw.view(n, heads, n_queries, width).transpose(1, 2), None
