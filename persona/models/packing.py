"""The rows of a batch behind one another in one sequence, so that an encoder computes nothing for padding.

Each row attends to itself only: `persona_packed` is registered with transformers by name, and the boundaries of the
rows travel to it through the model's keyword arguments. On a GPU it is the variable-length kernel of torch, on a CPU
torch's ordinary attention for each run of equally long rows. Positions start again with each row.

Shapes: N rows, M tokens of all rows, H heads, w width of a head, L tokens of a row.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from persona.models.batching import TokenRows
from persona.models.device import to_device

PACKED = "persona_packed"
# Their attention goes through transformers' interface, and all else that depends on a neighbor or a position goes
# through `position_ids`. Not so with relative positions (DeBERTa, MPNet, T5), neighbors in the embeddings
# (MobileBERT), soft caps (Gemma 2), or attention of their own (MegatronBERT, RemBERT).
CAN_PACK = (
    "albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "eurobert", "gemma",
    "gemma3_text", "gte", "llama", "mistral", "modernbert", "nomic_bert", "phi3", "qwen2", "qwen3", "roberta",
    "roberta-prelayernorm", "smollm3", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
# Lengths of the rows that are compared: one token, some blocks of the GPU's kernel, and equal neighbors.
_PROBED = (200, 129, 33, 33, 7, 1)
# Rounding, as a share of the distance between vectors of different rows. A wrong position, mask or boundary moves a
# vector by a large part of that distance.
_TOLERANCE = {torch.float32: 0.005}
_COARSE_TOLERANCE = 0.15


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """A batch on the device of the model.

    Attributes:
        ids_1M: tokens.
        position_ids_1M: the position of each token in its row, as the model counts them.
        ends_N1: where rows begin and end, from 0 to M, in int32.
        longest: tokens of the longest row.
    """

    ids_1M: Tensor
    position_ids_1M: Tensor
    ends_N1: Tensor
    longest: int

    def lengths(self) -> Tensor:
        """Tokens of each row (N,)."""
        return self.ends_N1.diff().long()

    def inputs(self) -> dict[str, Any]:
        """The arguments of the model, named as transformers names them."""
        return {
            "input_ids": self.ids_1M,
            "position_ids": self.position_ids_1M,
            "cu_seq_lens_q": self.ends_N1,
            "max_length_q": self.longest,
        }


def is_faster(*, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing is worth its while: on a GPU in bf16, which torch's variable-length kernel needs."""
    return device.type == "cuda" and dtype == torch.bfloat16


def pack(rows: TokenRows, device: torch.device, *, padding_idx: int | None) -> PackedRows:
    """Rows of at least one token as one sequence; `padding_idx` is that of the model."""
    starts_M = np.repeat(rows.starts(), rows.lengths_N)
    if padding_idx is None:
        positions_M = np.arange(len(rows.ids_M)) - starts_M
    else:
        is_counted_M = (rows.ids_M != padding_idx).astype(np.int64)
        counts_M = np.cumsum(is_counted_M)
        positions_M = (counts_M - (counts_M - is_counted_M)[starts_M]) * is_counted_M + padding_idx
    ends_N1 = np.concatenate([[0], np.cumsum(rows.lengths_N)]).astype(np.int32)
    ids_1M, position_ids_1M = (to_device(torch.from_numpy(part)[None], device) for part in (rows.ids_M, positions_M))
    return PackedRows(
        ids_1M=ids_1M,
        position_ids_1M=position_ids_1M,
        ends_N1=to_device(torch.from_numpy(ends_N1), device),
        longest=int(rows.lengths_N.max()),
    )


def padding_idx(model: nn.Module) -> int | None:
    """The padding id of RoBERTa-like models, which count the positions of all other tokens from there; else None."""
    modules: list[Any] = [*model.modules()]
    counting = [module for module in modules if hasattr(module, "create_position_ids_from_input_ids")]
    return int(counting[0].padding_idx) if counting else None


def attend_within_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the signature is transformers'
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q·kᵀ·scaling)·v within each row: query (1, H, M, w), key and value with H heads or a divisor of H.

    `sliding_window` counts a token itself and those before it, and without a causal mask as many after it.

    Returns:
        (1, M, H, w), the layout transformers expects, and no weights.
    """
    # A bidirectional Llama says so in its configuration, and its modules do not.
    causal = bool(getattr(module, "is_causal", True) and getattr(module.config, "is_causal", True))
    reach = -1 if sliding_window is None else sliding_window - 1
    q_MHw, k_MHw, v_MHw = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = cu_seq_lens_q, max_length_q
        window = (reach, 0 if causal else reach)
        mixed_MHw = varlen_attn(
            q_MHw, k_MHw, v_MHw, ends, ends, longest, longest, scale=scaling, window_size=window, enable_gqa=True
        )
        assert isinstance(mixed_MHw, Tensor)
    else:
        mixed_MHw = _attend_by_length(q_MHw, k_MHw, v_MHw, cu_seq_lens_q, scaling, causal=causal, reach=reach)
    return mixed_MHw.unsqueeze(0), None


def _attend_by_length(
    q_MHw: Tensor, k_MHw: Tensor, v_MHw: Tensor, ends_N1: Tensor, scaling: float | None, *, causal: bool, reach: int
) -> Tensor:
    """The same with one call of torch's attention for each run of equally long rows; returns (M, H, w)."""
    mixed, first = [], 0
    lengths, counts = torch.unique_consecutive(ends_N1.diff(), return_counts=True)
    for length, n in zip(lengths.tolist(), counts.tolist(), strict=True):
        last = first + n * length
        q_nHLw, k_nHLw, v_nHLw = (
            part[first:last].view(n, length, *part.shape[1:]).transpose(1, 2) for part in (q_MHw, k_MHw, v_MHw)
        )
        mask_LL = None if reach < 0 else _window(length, reach, causal=causal)
        mixed_nHLw = scaled_dot_product_attention(
            q_nHLw, k_nHLw, v_nHLw, mask_LL, is_causal=causal and mask_LL is None, scale=scaling, enable_gqa=True
        )
        mixed.append(mixed_nHLw.transpose(1, 2).flatten(0, 1))
        first = last
    return torch.cat(mixed)


def _window(length: int, reach: int, *, causal: bool) -> Tensor:
    """Which tokens (columns) each token (row) attends to, at most `reach` away."""
    column_L = torch.arange(length)
    distance_LL = column_L[:, None] - column_L
    return (distance_LL <= reach) & (distance_LL >= (0 if causal else -reach))


def probe_rows(n_ids: int, max_tokens: int) -> TokenRows:
    """Made-up rows of different lengths, each of a few ids below `n_ids`, so that their vectors differ."""
    draw = np.random.default_rng(0)
    return TokenRows.of(
        [draw.choice(draw.integers(0, n_ids, 4), min(length, max_tokens)).tolist() for length in _PROBED]
    )


def start(model: Any, *, packed: Callable[[], Tensor], padded_Nd: Tensor) -> bool:
    """Lets a model of transformers attend to packed rows, and to nothing else, if their vectors are right.

    Otherwise logs why not, and leaves the model as it was.

    Args:
        model: the transformer.
        packed: computes the vectors (N, d) of `probe_rows`.
        padded_Nd: the vectors of the same rows from padded batches.
    """
    from transformers import AttentionInterface

    before = model.config._attn_implementation  # noqa: SLF001 - transformers has no public name for it
    # No mask is registered under this name, so that transformers makes none of M × M.
    AttentionInterface.register(PACKED, attend_within_rows)
    model.set_attn_implementation(PACKED)
    problem = _difference(packed, padded_Nd, model.dtype)
    if problem is None:
        return True
    model.set_attn_implementation(before)
    message = "an encoder of type %s pads its batches, which is slower than packing them: %s"
    logging.getLogger(__name__).warning(message, model.config.model_type, problem)
    return False


def _difference(packed: Callable[[], Tensor], padded_Nd: Tensor, dtype: torch.dtype) -> str | None:
    """What `packed` raises, or how far its vectors are from the padded ones; None if they are near."""
    try:
        distance_N = (packed() - padded_Nd).norm(dim=1)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:  # kernels refuse in many ways
        return f"{type(error).__name__}: {error}".splitlines()[0]
    typical = (padded_Nd - padded_Nd.roll(1, 0)).norm(dim=1).mean()
    share = float(distance_N.max() / typical)
    if share <= _TOLERANCE.get(dtype, _COARSE_TOLERANCE):
        return None
    return f"its vectors differ by {share:.1%} of the distance between texts"
