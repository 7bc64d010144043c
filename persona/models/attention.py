"""Attention on a CPU in bf16, where torch's own kernel costs as much as all linear layers together.

That kernel and its softmax spend most of their time on the largest value of each row, on masks, and on heads that are
narrow for them; its backward pass takes five times its forward pass. Two others, known to transformers by their names:

`persona_exp`, for encoders that are frozen. A softmax needs no largest value while exp can neither overflow nor vanish:
then softmax(S)·V is exp(S)·V over the sums of exp(S), and a masked key is one whose row of V is zero.

`persona_bmm`, for LLMs, which gradients pass through: plain matrix products, the query heads that share a key head as
more rows of one product. It keeps all weights, so that only short texts go this way and long ones go torch's.

Shapes: B texts, H heads, h heads of keys, T tokens, U tokens of queries, G = B·H, g = B·h, w width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn

EXP, BMM = "persona_exp", "persona_bmm"
ENCODERS = ("bert", "roberta", "xlm-roberta")
LLMS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "olmo2", "t5")
# Weights of a layer that are kept for the backward pass: 32 MiB in bf16.
_MOST_WEIGHTS = 2**24
# exp(80)·512 and exp(-80) are both far from the ends of bf16, which are those of float32.
_FAR = 80.0
# Scores that a core works on at once: 2 MiB in bf16, which stay in its cache through the five steps that read them.
_CACHED_SCORES = 2**20


def register_attention(model_type: str, *, dtype: torch.dtype, device: torch.device) -> str | None:
    """What to give a model of this type as `attn_implementation`; None leaves the choice to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if dtype != torch.bfloat16 or device.type != "cpu" or model_type not in (*ENCODERS, *LLMS):
        return None
    name, function = (EXP, attend_by_exp) if model_type in ENCODERS else (BMM, attend_by_bmm)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def attend_by_exp(
    module: nn.Module,  # noqa: ARG001 - the signature is transformers'
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q·kᵀ·scaling)·v, all (B, H, T, w), of real keys; `attention_mask` (B, 1, T, T) has equal rows.

    Returns:
        (B, T, H, w), as transformers wants it, and no weights.
    """
    n, heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    at_once = max(1, torch.get_num_threads() * _CACHED_SCORES // (heads * length**2))
    mixed_BTHw = query.new_empty(n, length, heads, width)
    for first in range(0, n, at_once):
        some = slice(first, first + at_once)
        real_B1T1 = None if attention_mask is None else attention_mask[some, :, 0, :, None]
        mixed_BTHw[some] = _attend_by_exp(query[some], key[some], value[some], real_B1T1, scale).transpose(1, 2)
    return mixed_BTHw, None


def _attend_by_exp(query: Tensor, key: Tensor, value: Tensor, real_B1T1: Tensor | None, scale: float) -> Tensor:
    """(B, H, T, w) of so few texts that all their scores stay in the cache from one step to the next."""
    n, heads, length, width = query.shape
    q_GTw, k_GTw, v_GTw = (part.reshape(n * heads, length, width) for part in (query, key, value))
    score_GTT = torch.baddbmm(q_GTw.new_empty(1, 1, 1), q_GTw, k_GTw.transpose(1, 2), beta=0, alpha=scale)
    least, greatest = torch.aminmax(score_GTT)
    if least < -_FAR or greatest > _FAR:
        return _by_softmax(score_GTT, v_GTw, real_B1T1, heads)
    weight_GTT = score_GTT.exp_()
    if real_B1T1 is None:
        sum_GT1 = weight_GTT.sum(-1, keepdim=True)
    else:
        real_GT1 = real_B1T1.to(v_GTw.dtype).expand(n, heads, length, 1).reshape(n * heads, length, 1)
        v_GTw, sum_GT1 = v_GTw * real_GT1, torch.bmm(weight_GTT, real_GT1)
    return torch.bmm(weight_GTT, v_GTw).div_(sum_GT1).view(n, heads, length, width)


def _by_softmax(score_GTT: Tensor, v_GTw: Tensor, real_B1T1: Tensor | None, heads: int) -> Tensor:
    """The plain way, for scores so far apart that exp alone would overflow or vanish."""
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
    """softmax(q·kᵀ·scaling + bias)·v: query (B, H, U, w), key and value (B, h, T, w), a mask of booleans (B, 1, U, T).

    Without a mask a causal module's queries see what is not behind them. Torch's own kernel takes over where one query
    is asked, as in each step of an answer, and where there is too much to be kept.

    Returns:
        (B, U, H, w), as transformers wants it, and no weights.
    """
    n, heads, n_queries, width = query.shape
    key_heads, length = key.shape[1:3]
    if n_queries == 1 or n * heads * n_queries * length > _MOST_WEIGHTS:
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
    # Not infinite: a row of padding sees nothing, and has to be a number all the same.
    bias = query.new_zeros(()).masked_fill(~attention_mask, torch.finfo(query.dtype).min / 2)
    if position_bias is not None:
        bias = bias + position_bias
    weight_BHUT = (score_gRT.view(n, heads, n_queries, length) + bias).softmax(-1)
    mixed_gRw = torch.bmm(weight_BHUT.view(n * key_heads, -1, length), v_gTw)
    return mixed_gRw.view(n, heads, n_queries, width).transpose(1, 2), None
