"""The frozen text encoder: texts in, unit vectors out.

Shapes: N texts, T tokens, d width of vectors.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persona.models import attention, encoder_model, packing, sentence_transformer
from persona.models.batching import TokenRows, full_batches
from persona.models.device import choose_device, choose_precision
from persona.models.resolve import ModelFolder
from persona.models.sentence_head import SentenceHead
from persona.models.tokenizing import TextTokenizer
from persona.options import Precision

# Tokens per forward pass, padding included. A CPU gains nothing from large batches, and small ones need less padding.
_TOKEN_BUDGETS = {"cuda": 16_384, "cpu": 2_048}
# The first part to be tokenized is small, so that a GPU starts soon. Later parts are larger where rows are padded: they
# fill their batches with rows of more equal length.
_FIRST_TOKENS = 32_768
_GROWTH = 4
_CHARACTERS_PER_TOKEN = 4  # roughly; only the size of the parts depends on it


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Unit vectors (N, d) in float16, in the order of the texts, and what they cost."""

    vectors: NDArray[np.float16]
    n_tokens: int
    n_padded: int
    tokenize_s: float
    """Seconds spent by the tokenizing thread, which runs in parallel to the model."""


class TextEncoder:
    """A frozen encoder on one device (Enc_his of PPlug eq. 1), with the dense layers that its folder declares.

    Args:
        folder: the pretrained model.
        pooling: how the token vectors of a text become one, as in `SentenceHead`.
        max_tokens: texts are cut to this length, prompt included.
        prompt: in front of each text.
        width: of the vectors; None for all components.
        token_budget: tokens per forward pass, padding included; the default depends on the device.
        precision: of the model; see `choose_precision`.
        device: by default a GPU if there is one.
        packed: whether a batch is one sequence without padding (see `packing`), if the architecture can be packed; by
            default where that is faster. The attribute of that name says what was chosen.

    Raises:
        InputError: the architecture is not supported, or weights are missing.
        UsageError: the model has fewer than `max_tokens` positions, or cannot compute in `precision`.
    """

    def __init__(
        self,
        folder: ModelFolder,
        *,
        pooling: str,
        max_tokens: int,
        prompt: str = "",
        width: int | None = None,
        token_budget: int | None = None,
        precision: Precision = "auto",
        device: str | None = None,
        packed: bool | None = None,
    ) -> None:
        declared = sentence_transformer.read(folder)
        known = encoder_model.architecture(folder)
        known.check_length(max_tokens)
        known.check_precision(precision)
        self.device = choose_device(device)
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.prompt = prompt
        self.token_budget = token_budget or _TOKEN_BUDGETS.get(self.device.type, _TOKEN_BUDGETS["cpu"])
        dtype = encoder_model.runs_in(known.kind, choose_precision(precision, self.device))
        self.tokenizer = encoder_model.load_tokenizer(folder, declared)
        self._text_tokenizer = TextTokenizer(self.tokenizer, prompt=prompt, max_tokens=max_tokens)
        kernel = attention.encoder_attention(known.kind, dtype=dtype, device=self.device)
        self.model = encoder_model.load_transformer(folder, dtype=dtype, attn_implementation=kernel)
        self.model.to(self.device).eval().requires_grad_(False)
        self._padding_idx = packing.padding_idx(self.model)
        self.head = SentenceHead(pooling, declared.layers, width).load_weights()
        self.head.to(self.device).eval().requires_grad_(False)
        if packed is None:
            packed = packing.is_faster(dtype=dtype, device=self.device)
        self.packed = packed and known.kind in packing.CAN_PACK and self._starts_packing(known.n_tokens)
        self.width = self._vectors(TokenRows.of(self.tokenize(["a"]))).shape[1]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text behind the prompt, cut to `max_tokens`, special tokens included."""
        return self._text_tokenizer.rows(texts)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], *, on_batch: Callable[[int], None] | None = None) -> Encoded:
        """Encodes texts, in their order.

        A thread tokenizes the next part of the texts while the model works on the current one. `on_batch` is told how
        many texts are done, after each batch.
        """
        is_gpu = self.device.type == "cuda"
        # In the order of the batches. A copy to pinned memory does not wait for the device.
        done_Nd = torch.empty(len(texts), self.width, dtype=torch.float16, pin_memory=is_gpu)
        numbers_N = np.empty(len(texts), np.int64)
        n_tokens = n_padded = n_done = 0
        parts = list(_parts(texts, max(_FIRST_TOKENS, 2 * self.token_budget), 1 if self.packed else _GROWTH))
        with ThreadPoolExecutor(1) as pool_of_one:
            pending = [pool_of_one.submit(self._timed_tokenize, [texts[i] for i in part]) for part in parts]
            tokenized = ((part, future.result()[0]) for part, future in zip(parts, pending, strict=True))
            for numbers_n, rows in full_batches(tokenized, self.token_budget, packed=self.packed):
                batch = slice(n_done, n_done + len(rows))
                done_Nd[batch].copy_(self._vectors(rows), non_blocking=True)
                numbers_N[batch] = numbers_n
                n_tokens += len(rows.ids_M)
                n_padded += len(rows.ids_M) if self.packed else len(rows) * int(rows.lengths_N.max())
                n_done += len(rows)
                if on_batch is not None:
                    on_batch(n_done)
        if is_gpu:
            torch.cuda.synchronize(self.device)
        vectors = np.empty((len(texts), self.width), dtype=np.float16)
        vectors[numbers_N] = done_Nd.numpy()
        tokenize_s = sum(future.result()[1] for future in pending)
        return Encoded(vectors=vectors, n_tokens=n_tokens, n_padded=n_padded, tokenize_s=tokenize_s)

    def _timed_tokenize(self, texts: Sequence[str]) -> tuple[TokenRows, float]:
        started = time.perf_counter()
        return TokenRows.of(self.tokenize(texts)), time.perf_counter() - started

    @torch.inference_mode()
    def _starts_packing(self, n_ids: int) -> bool:
        """Lets the model attend to packed rows, unless that changes the vectors of some made-up rows."""
        rows = packing.probe_rows(n_ids, self.max_tokens)
        return packing.start(self.model, padded_Nd=self._padded(rows), packed=lambda: self._packed(rows))

    @torch.inference_mode()
    def _vectors(self, rows: TokenRows) -> Tensor:
        """Unit vectors (N, d) of a batch in float16, still on the device."""
        return (self._packed if self.packed else self._padded)(rows).half()

    def _padded(self, rows: TokenRows) -> Tensor:
        ids_NT, mask_NT = rows.pad(encoder_model.pad_id(self.tokenizer), self.device)
        is_full = len(rows.ids_M) == ids_NT.numel()
        hidden_NTd = self.model(input_ids=ids_NT, attention_mask=None if is_full else mask_NT).last_hidden_state
        vectors_Nd: Tensor = self.head(hidden_NTd, mask_NT)
        return vectors_Nd

    def _packed(self, rows: TokenRows) -> Tensor:
        batch = packing.pack(rows, self.device, padding_idx=self._padding_idx)
        hidden_1Md = self.model(**batch.inputs()).last_hidden_state
        return self.head.forward_packed(hidden_1Md[0], batch.lengths())


def _parts(texts: Sequence[str], n_first: int, growth: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers, longest texts first: one part of about `n_first` tokens, then `growth` times larger ones."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    order = np.argsort(-lengths, kind="stable")
    tokens = np.cumsum(lengths[order]) // _CHARACTERS_PER_TOKEN
    ends = np.flatnonzero(np.diff((tokens - n_first) // (growth * n_first))) + 1
    yield from (part for part in np.split(order, ends) if len(part))
