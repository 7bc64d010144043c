"""Tables of requests to tables of answers or losses, in batches of rows of about one length."""

from collections.abc import Iterator

import pyarrow as pa
import torch

from persona.engines.decoding import Answer
from persona.options import Decoding, PersonaKind
from persona.plug.personalized import PersonalizedLLM, Row


def answer_all(model: PersonalizedLLM, requests: pa.Table, decoding: Decoding, *, batch_size: int) -> pa.Table:
    """Answers to joined requests (`persona.store.join`, and the column `persona`), in their order.

    Returns:
        a table of `output`, `n_tokens`, `finish_reason`.
    """
    answers: list[Answer | None] = [None] * requests.num_rows
    rows = requests.to_pylist()
    for numbers, kind in _batches(rows, batch_size):
        found = model.answer([rows[number] for number in numbers], decoding, persona=kind)
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
    for numbers, kind in _batches(rows, batch_size):
        of_batch = [rows[number] for number in numbers]
        batch = model.collate(of_batch, with_targets=True, persona=kind)
        for number, nll, target in zip(numbers, model(batch).tolist(), batch.targets, strict=True):
            nats[number], tokens[number] = nll, len(target)
    return pa.table({"nats": pa.array(nats, pa.float64()), "tokens": pa.array(tokens, pa.int32())})


def _batches(rows: list[Row], batch_size: int) -> Iterator[tuple[list[int], PersonaKind]]:
    """Row numbers in batches that the model treats alike, longest text first, and the kind of persona they need.

    `own`, `none` and `other` differ in their histories only, so they share batches.
    """
    distinct = (PersonaKind.MEAN, PersonaKind.BARE)
    kinds = [kind if (kind := PersonaKind(row["persona"])) in distinct else PersonaKind.OWN for row in rows]
    for kind in (PersonaKind.OWN, *distinct):
        numbers = [number for number, found in enumerate(kinds) if found is kind]
        numbers.sort(key=lambda number: -len(rows[number]["input"]) - len(rows[number].get("target") or ""))
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size], kind
