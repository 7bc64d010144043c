"""The frozen text encoder: texts become unit vectors, in batches of about equal cost.

Shapes: N texts, T tokens, d encoder width.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from persona.errors import UsageError
from persona.models import attention
from persona.models.resolve import ModelFolder
from persona.options import Pooling, Precision

# A CPU has nothing to gain from large batches, and small ones hold rows of about one length: less padding.
_TOKEN_BUDGETS = {True: 16_384, False: 2_048}
# Tokenized at first: so few that a GPU waits but a moment for them; and how many times as many in each part after it,
# which then has more rows of one length.
_FIRST_TOKENS = 32_768
_TIMES_AS_MANY = 4


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Unit vectors (N, d) in float16, in the order of the texts, and what they cost."""

    vectors: NDArray[np.float16]
    n_tokens: int
    n_padded: int
    tokenize_s: float
    """Seconds of the thread that tokenizes, most of them beside the model."""


def pool(hidden_NTd: Tensor, mask_NT: Tensor, pooling: Pooling) -> Tensor:
    """Hidden states (N, T, d) to unit vectors (N, d) in float32.

    `cls` takes the first token (BGE, PAPER eq. 1), `mean` the average over real tokens (MiniLM, Contriever).
    Both sides of eq. 3 are L2-normalised, as in the reference.
    """
    if pooling == "cls":
        pooled_Nd = hidden_NTd[:, 0].float()
    else:
        weight_NT1 = mask_NT.unsqueeze(-1).to(torch.float32)
        pooled_Nd = (hidden_NTd.float() * weight_NT1).sum(1) / weight_NT1.sum(1).clamp(min=1.0)
    return nn.functional.normalize(pooled_Nd, dim=-1)


def token_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Row numbers in batches whose padded size (rows × longest row) stays within `token_budget`.

    Longest first, so that the batch with the highest memory comes first and fails early if it must. A single row longer
    than the budget is a batch of its own.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batch and (len(batch) + 1) * max(lengths[batch[0]], 1) > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def full_batches(
    parts: Iterable[list[tuple[int, list[int]]]], token_budget: int
) -> Iterator[list[tuple[int, list[int]]]]:
    """Batches, as those of `token_batches`, of numbered rows that come in parts, each of shorter ones than the last.

    Rows that do not fill a batch wait for the next part, which begins with some of about their length.
    """
    waiting: list[tuple[int, list[int]]] = []
    for part in parts:
        waiting += part
        batches = [
            [waiting[place] for place in batch]
            for batch in token_batches([len(row) for _, row in waiting], token_budget)
        ]
        waiting = batches.pop() if batches else []
        yield from batches
    if waiting:
        yield waiting


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows to (ids, mask), both (N, T), padded on the right."""
    lengths_N1 = np.fromiter(map(len, rows), np.int64, len(rows)).reshape(-1, 1)
    mask_NT = np.arange(max(lengths_N1.max(initial=0), 1)) < lengths_N1
    ids_NT = np.full(mask_NT.shape, pad_id, np.int64)
    ids_NT[mask_NT] = np.fromiter(chain.from_iterable(rows), np.int64, lengths_N1.sum())
    return to_device(torch.from_numpy(ids_NT), device), to_device(torch.from_numpy(mask_NT), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copied while the device goes on with what it has: only from pinned memory can it be."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, fp32 elsewhere."""
    if precision not in get_args(Precision):
        raise UsageError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported()
        else:
            # torch has no public question for it
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def check_positions(config: Any, max_tokens: int) -> None:
    """Raises UsageError when texts of `max_tokens` tokens are longer than what a model has position embeddings for."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise UsageError(f"the encoder reads at most {positions} tokens of a text, not {max_tokens}; ask for fewer")


class TextEncoder:
    """A frozen BERT-like encoder on one device (Enc_his of PAPER eq. 1).

    Args:
        max_tokens: texts are cut to that many tokens. token_budget: padded tokens of one forward pass.
        device: default a GPU where there is one.

    Raises:
        UsageError: the model has fewer positions than `max_tokens`, or `precision` is none that there is.
    """

    def __init__(
        self,
        folder: ModelFolder,
        *,
        pooling: Pooling,
        max_tokens: int,
        token_budget: int | None = None,
        precision: Precision = "auto",
        device: str | None = None,
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.token_budget = token_budget or _TOKEN_BUDGETS[self.device.type == "cuda"]
        dtype = choose_precision(precision, self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder.path)
        how = attention.register_attention(folder.config["model_type"], dtype=dtype, device=self.device)
        self.model = AutoModel.from_pretrained(folder.path, dtype=dtype, use_safetensors=True, attn_implementation=how)
        self.model.to(self.device).eval().requires_grad_(False)
        self.width: int = self.model.config.hidden_size
        check_positions(self.model.config, max_tokens)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut to `max_tokens`, special tokens included."""
        if not texts:
            return []  # which the tokenizer refuses
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens, return_attention_mask=False)
        return list(encoded["input_ids"])

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encodes texts; the result has their order, whatever the batches were.

        A thread tokenizes the next part of the texts while the model works on this one.
        """
        vectors = np.empty((len(texts), self.width), dtype=np.float16)
        n_tokens = n_padded = 0
        done = []
        parts = list(_parts(texts, max(_FIRST_TOKENS, 2 * self.token_budget)))
        with ThreadPoolExecutor(1) as beside:
            coming = [beside.submit(self._timed_tokenize, [texts[i] for i in part]) for part in parts]
            tokenized = (
                list(zip(part.tolist(), part_of.result()[0], strict=True))
                for part, part_of in zip(parts, coming, strict=True)
            )
            for batch in full_batches(tokenized, self.token_budget):
                pooled_Nd, n = self._forward([row for _, row in batch])
                done.append(([number for number, _ in batch], pooled_Nd))
                n_tokens += sum(len(row) for _, row in batch)
                n_padded += n
        for numbers, pooled_Nd in done:  # the device has all of them to do before the first is asked for
            vectors[numbers] = pooled_Nd.cpu().numpy()
        tokenize_s = sum(part_of.result()[1] for part_of in coming)
        return Encoded(vectors=vectors, n_tokens=n_tokens, n_padded=n_padded, tokenize_s=tokenize_s)

    def _timed_tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], float]:
        started = time.perf_counter()
        return self.tokenize(texts), time.perf_counter() - started

    def _forward(self, rows: Sequence[list[int]]) -> tuple[Tensor, int]:
        """Unit vectors (N, d) of a batch, in float16 on the device, and its padded size."""
        ids_NT, mask_NT = pad(rows, self.tokenizer.pad_token_id or 0, self.device)
        is_full = sum(map(len, rows)) == ids_NT.numel()
        hidden_NTd = self.model(input_ids=ids_NT, attention_mask=None if is_full else mask_NT).last_hidden_state
        return pool(hidden_NTd, mask_NT, self.pooling).half(), ids_NT.numel()


def _parts(texts: Sequence[str], n_first: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers, longest texts first: a part of about `n_first` tokens, then larger ones."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    order = np.argsort(-lengths, kind="stable")
    # Four characters a token, more or less: only the size of a part depends on it.
    tokens = np.cumsum(lengths[order]) // 4
    ends = np.flatnonzero(np.diff((tokens - n_first) // (_TIMES_AS_MANY * n_first))) + 1
    yield from (part for part in np.split(order, ends) if len(part))
