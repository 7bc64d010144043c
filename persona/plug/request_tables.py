"""Tables of requests to tables of answers or losses."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch

from persona.engines.base import Answer
from persona.options import Decoding, PersonaKind
from persona.plug.answerer import Answerer
from persona.plug.personalized import PersonalizedLLM, Row
from persona.strengths import parse


def answer_all(answerer: Answerer, requests: pa.Table, decoding: Decoding) -> pa.Table:
    """Answers to joined requests (`persona.store.join`, and `persona`, a name of `persona.strengths`), in their order.

    Returns:
        a table of `output`, `n_tokens`, `finish_reason`.
    """
    rows = requests.to_pylist()
    by_row: dict[int, Answer] = {}
    for numbers, kind, strength in _by_persona(rows):
        found = answerer.answer([rows[number] for number in numbers], decoding, persona=kind, strength=strength)
        by_row |= zip(numbers, found, strict=True)
    answers = [by_row[number] for number in range(len(rows))]
    return pa.table(
        {
            "output": pa.array([answer.text for answer in answers], pa.string()),
            "n_tokens": pa.array([answer.n_tokens for answer in answers], pa.int32()),
            "finish_reason": pa.array([answer.finish_reason for answer in answers], pa.string()),
        }
    )


@torch.inference_mode()
def loss_of_all(model: PersonalizedLLM, requests: pa.Table, *, batch_size: int) -> pa.Table:
    """Teacher-forced losses of joined requests with targets, in their order.

    Returns:
        a table of `nats`, the summed negative log-likelihood of a target (PPlug eq. 6), and `tokens`, its length.
    """
    nats = [0.0] * requests.num_rows
    tokens = [0] * requests.num_rows
    rows = requests.to_pylist()
    for all_numbers, kind, strength in _by_persona(rows):
        for start in range(0, len(all_numbers), batch_size):
            numbers = all_numbers[start : start + batch_size]
            batch = model.collate([rows[number] for number in numbers], persona=kind, strength=strength)
            for number, nll, target in zip(numbers, model(batch).tolist(), batch.targets, strict=True):
                nats[number], tokens[number] = nll, len(target)
    return pa.table({"nats": pa.array(nats, pa.float64()), "tokens": pa.array(tokens, pa.int32())})


def _by_persona(rows: Sequence[Row]) -> Iterator[tuple[list[int], PersonaKind, float]]:
    """Row numbers that may share batches, their kind of persona and its strength; longest texts first, to save padding.

    `own`, `none` and `other` differ only in their histories, so they share batches.
    """
    separate = (PersonaKind.MEAN, PersonaKind.BARE)
    found: dict[tuple[PersonaKind, float], list[int]] = {}
    for number, row in enumerate(rows):
        kind, strength = parse(row["persona"])
        found.setdefault((kind if kind in separate else PersonaKind.OWN, strength), []).append(number)
    for (kind, strength), numbers in found.items():
        numbers.sort(key=lambda number: -len(rows[number]["input"]) - len(rows[number].get("target") or ""))
        yield numbers, kind, strength
