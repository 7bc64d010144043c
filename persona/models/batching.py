"""Batches of token rows: which rows go together, how they are padded, and the positions of their tokens.

Shapes: N rows, T tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from persona.models.device import to_device


def token_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Splits rows into batches whose padded size (rows × longest row) stays within `token_budget`.

    Longest first, so that the batch that needs most memory comes first and fails early. A single row longer than the
    budget is its own batch.

    Yields:
        row numbers of a batch.
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
    """Like `token_batches`, for (number, row) pairs that arrive in parts, longer rows in earlier parts.

    Rows that do not fill a batch wait for the next part, whose first rows are about as long.
    """
    waiting: list[tuple[int, list[int]]] = []
    for part in parts:
        waiting += part
        lengths = [len(row) for _, row in waiting]
        batches = [[waiting[index] for index in batch] for batch in token_batches(lengths, token_budget)]
        waiting = batches.pop() if batches else []
        yield from batches
    if waiting:
        yield waiting


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Token rows to (ids, mask), both (N, T), padded on the right or on the left."""
    lengths_N1 = np.fromiter(map(len, rows), np.int64, len(rows)).reshape(-1, 1)
    column_T = np.arange(max(lengths_N1.max(initial=0), 1))
    mask_NT = (column_T[::-1] if left else column_T) < lengths_N1
    ids_NT = np.full(mask_NT.shape, pad_id, np.int64)
    ids_NT[mask_NT] = np.fromiter(chain.from_iterable(rows), np.int64, lengths_N1.sum())
    return to_device(torch.from_numpy(ids_NT), device), to_device(torch.from_numpy(mask_NT), device)


def position_ids(mask_NT: Tensor) -> Tensor:
    """The position (N, T) of each token in its row, not counting padding on the left."""
    return (mask_NT.long().cumsum(1) - 1).clamp(min=0)
