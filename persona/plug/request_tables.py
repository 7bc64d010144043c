"""Tables of requests to tables of answers or losses, in batches of rows of about one length."""

from collections.abc import Iterator

import pyarrow as pa
import torch

from persona.engines.decoding import Answer
from persona.options import Decoding
from persona.plug.personalized import PersonalizedLLM, Row


def answer_all(model: PersonalizedLLM, requests: pa.Table, decoding: Decoding, *, batch_size: int) -> pa.Table:
    """Answers to joined requests (`persona.store.join`, and the column `persona`), in their order.

    Returns:
        a table of `output`, `n_tokens`, `finish_reason`.
    """
    answers: list[Answer | None] = [None] * requests.num_rows
    rows = requests.to_pylist()
    for numbers, flags in _batches(rows, batch_size):
        found = model.answer([rows[number] for number in numbers], decoding, **flags)
        for number, answer in zip(numbers, found, strict=True):
            answers[number] = answer
    done = [answer for answer in answers if answer is not None]
    return pa.table(
        {
            "output": pa.array([answer.text for answer in done], pa.string()),
            "n_tokens": pa.array([answer.n_tokens for answer in done], pa.int32()),
            "finish_reason": pa.array([answer.finish_reason for answer in done], pa.string()),
        }
    )


@torch.inference_mode()
def loss_of_all(model: PersonalizedLLM, requests: pa.Table, *, batch_size: int) -> pa.Table:
    """Teacher-forced losses of joined requests with targets, in their order.

    Returns:
        a table of `nats`, the summed negative log-likelihood of a target (eq. 6), and `tokens`, how many it has.
    """
    nats = [0.0] * requests.num_rows
    tokens = [0] * requests.num_rows
    rows = requests.to_pylist()
    for numbers, flags in _batches(rows, batch_size):
        of_batch = [rows[number] for number in numbers]
        batch = model.collate(of_batch, with_targets=True, **flags)
        for number, nll, target in zip(numbers, model(batch).tolist(), batch.targets, strict=True):
            nats[number], tokens[number] = nll, len(target)
    return pa.table({"nats": pa.array(nats, pa.float64()), "tokens": pa.array(tokens, pa.int32())})


def _batches(rows: list[Row], batch_size: int) -> Iterator[tuple[list[int], dict[str, bool]]]:
    """Row numbers in batches of one kind, longest text first, and what `PersonalizedLLM.collate` must know of them."""
    kinds = [{"mean": row["persona"] == "mean", "bare": row["persona"] == "bare"} for row in rows]
    for kind in ({"mean": False, "bare": False}, {"mean": True, "bare": False}, {"mean": False, "bare": True}):
        numbers = [number for number, found in enumerate(kinds) if found == kind]
        numbers.sort(key=lambda number: -len(rows[number]["input"]) - len(rows[number].get("target") or ""))
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size], kind
