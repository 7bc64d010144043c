"""Attention for frozen encoders on a CPU in bf16, where it costs as much as all linear layers together.

Torch's own kernel and its softmax spend most of their time on the largest value of each row, on masks, and on heads
that are narrow for them. A softmax needs none of it while exp can neither overflow nor vanish: then softmax(S)·V is
exp(S)·V over the sums of exp(S), and a masked key is one whose row of V is zero.

Shapes: B texts, H heads, T tokens, G = B·H, w width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn

NAME = "persona_exp"
MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
# exp(80)·512 and exp(-80) are both far from the ends of bf16, which are those of float32.
_FAR = 80.0


def register() -> str:
    """Makes the attention known to transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attend(
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
    q_GTw, k_GTw, v_GTw = (part.reshape(n * heads, length, width) for part in (query, key, value))
    score_GTT = torch.baddbmm(q_GTw.new_empty(1, 1, 1), q_GTw, k_GTw.transpose(1, 2), beta=0, alpha=scale)
    real_B1T1 = None if attention_mask is None else attention_mask[:, :, 0, :, None]
    least, greatest = torch.aminmax(score_GTT)
    if least < -_FAR or greatest > _FAR:
        return _by_softmax(score_GTT, v_GTw, real_B1T1, heads), None
    weight_GTT = score_GTT.exp_()
    if real_B1T1 is None:
        sum_GT1 = weight_GTT.sum(-1, keepdim=True)
    else:
        real_GT1 = real_B1T1.to(v_GTw.dtype).expand(n, heads, length, 1).reshape(n * heads, length, 1)
        v_GTw, sum_GT1 = v_GTw * real_GT1, torch.bmm(weight_GTT, real_GT1)
    mixed_GTw = torch.bmm(weight_GTT, v_GTw).div_(sum_GT1)
    return mixed_GTw.view(n, heads, length, width).transpose(1, 2), None


def _by_softmax(score_GTT: Tensor, v_GTw: Tensor, real_B1T1: Tensor | None, heads: int) -> Tensor:
    """The plain way, for scores so far apart that exp alone would overflow or vanish."""
    score_BHTT = score_GTT.view(-1, heads, *score_GTT.shape[1:])
    if real_B1T1 is not None:
        score_BHTT = score_BHTT.masked_fill(~real_B1T1.transpose(-1, -2), -torch.inf)
    mixed_BHTw: Tensor = score_BHTT.softmax(-1) @ v_GTw.view(-1, heads, *v_GTw.shape[1:])
    return mixed_BHTw.transpose(1, 2)
