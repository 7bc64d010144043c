"""What a training step sees in place of a request's full history: a random part, the target, or another user's.

Shapes: N requests, n behaviors of one request, d encoder width.
"""

from collections.abc import Sequence

import numpy as np

from persona.models.encoder import TextEncoder
from persona.options import TrainingOptions
from persona.plug.personalized import Row
from persona.store import vectors
from persona.training.order import hash64

# Share of passes that see the whole history, and the size up to which every pass sees it.
_WHOLE_PASSES, _WHOLE_HISTORY = 1 / 11, 2


def step_rows(
    rows: Sequence[Row],
    *,
    step: int,
    n_steps: int,
    epoch: int,
    width: int,
    options: TrainingOptions,
    encoder: TextEncoder | None,
) -> list[Row]:
    """The rows of a step with their histories replaced: by a part of them, or during alignment by their targets.

    `encoder` is the store's; it may be None when no step from here on aligns.
    """
    dropped = [drop_behaviors(row, width=width, epoch=epoch, options=options) for row in rows]
    if step >= aligned_steps(n_steps, options):
        return dropped
    assert encoder is not None
    return align(dropped, encoder)


def drop_behaviors(row: Row, *, width: int, epoch: int, options: TrainingOptions) -> Row:
    """The row without a random part of its history; the same part for a row and an epoch on any worker.

    The reference implementation writes each request 11 times: once with its whole history, ten times without
    int(n·U(0, 0.5)) + 1 behaviors; histories of one or two behaviors stay whole. Here one pass in eleven is whole, and
    histories of one or two are too. At least one behavior stays, except in the `empty_history` share of rows, which
    lose all.
    """
    history = vectors.from_bytes(row["history"], width)
    draw = np.random.default_rng(hash64("dropout", options.seed, epoch, row["request_id"]))
    if draw.random() < options.empty_history:
        return {**row, "history": b""}
    n = len(history)
    if not options.history_dropout or n <= _WHOLE_HISTORY or draw.random() < _WHOLE_PASSES:
        return row
    n_dropped = min(int(n * draw.uniform(0, options.history_dropout)) + 1, n - 1)
    kept = np.sort(draw.permutation(n)[n_dropped:])
    return {**row, "history": vectors.to_bytes(history[kept])}


def aligned_steps(n_steps: int, options: TrainingOptions) -> int:
    """The number of steps at the start of a run that align the plug with the LLM."""
    return round(options.alignment * n_steps)


def align(rows: Sequence[Row], encoder: TextEncoder) -> list[Row]:
    """The rows with their history replaced by the embedding of their own target.

    To write a text from its embedding, the plug must learn how the encoder's space maps to the LLM's, which is slow to
    learn from histories that merely resemble the target (as in xRAG's pre-training, arXiv 2405.13792). An empty history
    stays empty, so that the typical behavior is trained meanwhile.
    """
    with_history = [i for i, row in enumerate(rows) if row["history"]]
    targets_Nd = encoder.encode([rows[i]["target"] for i in with_history]).vectors
    aligned = list(rows)
    for i, target_d in zip(with_history, targets_Nd, strict=True):
        aligned[i] = {**rows[i], "history": vectors.to_bytes(target_d)}
    return aligned


def with_rejected(rows: Sequence[Row]) -> list[Row]:
    """The rows with their rejected texts as targets."""
    return [{**row, "target": row["rejected"]} for row in rows]


def with_other_histories(rows: Sequence[Row]) -> list[Row | None]:
    """Each of a worker's rows with the history of its neighbor, for the contrast loss.

    Rows 0 and 1 are neighbors, rows 2 and 3, and so on: the same for any number of workers and any size of a pass. None
    if both rows are of one user or either history is empty, and for a last row without a neighbor.
    """
    others: list[Row | None] = []
    for i, row in enumerate(rows):
        neighbor = rows[i ^ 1] if i ^ 1 < len(rows) else row
        is_pair = row["user_id"] != neighbor["user_id"] and row["history"] and neighbor["history"]
        others.append({**row, "history": neighbor["history"]} if is_pair else None)
    return others
