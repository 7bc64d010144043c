"""Whole tables of requests: answers and losses in their order, whatever batches they were made in."""

import pyarrow as pa
import pytest

from persona.options import Decoding, PersonaKind
from persona.plug import request_tables as generation
from persona.plug.personalized import PersonalizedLLM
from tests.plugs import ROWS, losses, new_model

GREEDY = Decoding(max_new_tokens=6, beams=1)
PERSONAS = ["own", "mean", "none", "mean", "other", "own"]


@pytest.fixture
def model(encoder_folder, llm) -> PersonalizedLLM:
    return new_model(encoder_folder, llm)


@pytest.fixture
def requests() -> pa.Table:
    """Requests of any length in no order, some of which weigh their history equally."""
    return pa.Table.from_pylist([{**row, "persona": PERSONAS[i]} for i, row in enumerate(ROWS)])


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_answers_are_in_order_and_each_its_requests_own(model, requests, batch_size):
    answers = generation.answer_all(model, requests, GREEDY, batch_size=batch_size)
    expected = [model.answer([row], GREEDY, persona=PersonaKind(row["persona"]))[0] for row in requests.to_pylist()]
    assert answers["output"].to_pylist() == [answer.text for answer in expected]
    assert answers["n_tokens"].to_pylist() == [answer.n_tokens for answer in expected]
    assert answers["finish_reason"].to_pylist() == [answer.finish_reason for answer in expected]
    assert len(set(answers["output"].to_pylist())) > 3


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_losses_are_in_order_with_the_tokens_they_are_sums_over(model, requests, batch_size):
    found = generation.loss_of_all(model, requests, batch_size=batch_size)
    rows = requests.to_pylist()
    expected = [losses(model, [row], persona=PersonaKind(row["persona"])).item() for row in rows]
    assert found["nats"].to_pylist() == pytest.approx(expected, rel=1e-5)  # float32 sums in another order
    assert found["tokens"].to_pylist() == [len(ids) for ids in model.llm.tokenize_targets([r["target"] for r in rows])]


def test_equal_weights_are_used_where_they_are_asked_for_and_only_there(model, requests):
    as_own = requests.set_column(requests.column_names.index("persona"), "persona", pa.array(["own"] * len(ROWS)))
    mixed = generation.loss_of_all(model, requests, batch_size=3)["nats"].to_pylist()
    own = generation.loss_of_all(model, as_own, batch_size=3)["nats"].to_pylist()
    differs = [a != pytest.approx(b, rel=1e-5) for a, b in zip(mixed, own, strict=True)]
    # Of the two that ask for it (1 and 3), one has no history to weigh.
    assert differs == [False, False, False, True, False, False]


def test_no_requests_are_empty_tables_of_the_same_columns(model, requests):
    answers = generation.answer_all(model, requests, GREEDY, batch_size=2)
    assert generation.answer_all(model, requests[:0], GREEDY, batch_size=2) == answers[:0]
    found = generation.loss_of_all(model, requests, batch_size=2)
    assert generation.loss_of_all(model, requests[:0], batch_size=2) == found[:0]


def test_retrieved_texts_and_bare_rows_count_in_any_batch(model, requests, monkeypatch):
    personas = ["bare", *PERSONAS[1:-1], "bare"]
    texts = [["the movie", "it is"], [], ["a title"], ["of it"], [], ["in a paper"]]
    asked = requests.set_column(requests.column_names.index("persona"), "persona", pa.array(personas))
    asked = asked.append_column("retrieved", pa.array(texts, pa.list_(pa.string())))
    without = generation.loss_of_all(model, asked, batch_size=3)["nats"].to_pylist()
    monkeypatch.setattr(model, "front_tokens", 8)
    together = generation.loss_of_all(model, asked, batch_size=3)["nats"].to_pylist()
    alone = [
        generation.loss_of_all(model, asked.slice(i, 1), batch_size=1)["nats"][0].as_py() for i in range(len(personas))
    ]
    monkeypatch.undo()
    assert together == pytest.approx(alone, rel=1e-5)
    differs = [a != pytest.approx(b, rel=1e-5) for a, b in zip(together, without, strict=True)]
    assert differs == [bool(found) for found in texts]
    # What a bare LLM says does not depend on any history.
    empty = asked.set_column(asked.column_names.index("history"), "history", pa.array([b""] * len(personas)))
    unseen = generation.loss_of_all(model, empty, batch_size=3)["nats"].to_pylist()
    assert (unseen[0], unseen[5]) == pytest.approx((without[0], without[5]), rel=1e-5)
    bare = model.collate([asked.to_pylist()[0]], with_targets=True, persona=PersonaKind.BARE)
    assert without[0] == pytest.approx(
        model.llm.nll(model.soft_tokens(bare)[:, :0], bare.inputs, bare.targets).item(), rel=1e-5
    )
