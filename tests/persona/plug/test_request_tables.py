"""Tables of requests: answers and losses in the order of the requests, whatever their batches were."""

import pyarrow as pa
import pytest

from persona.options import Decoding, PersonaKind
from persona.plug import request_tables
from persona.plug.personalized import PersonalizedLLM
from tests.plugs import ROWS, losses, new_answerer, new_model

GREEDY = Decoding(max_new_tokens=6, beams=1)
PERSONAS = ["own", "mean", "none", "mean", "other", "own"]


@pytest.fixture
def model(encoder_folder, llm) -> PersonalizedLLM:
    return new_model(encoder_folder, llm)


@pytest.fixture
def requests() -> pa.Table:
    """Requests of different lengths and kinds of persona, in no order."""
    return pa.Table.from_pylist([{**row, "persona": PERSONAS[i]} for i, row in enumerate(ROWS)])


def with_personas(requests: pa.Table, personas: list[str]) -> pa.Table:
    return requests.set_column(requests.column_names.index("persona"), "persona", pa.array(personas))


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_answers_are_in_order_and_equal_those_of_each_request_alone(model, requests, batch_size):
    answerer = new_answerer(model, batch_size=batch_size)
    answers = request_tables.answer_all(answerer, requests, GREEDY)
    expected = [answerer.answer([row], GREEDY, persona=PersonaKind(row["persona"]))[0] for row in requests.to_pylist()]
    assert answers["output"].to_pylist() == [answer.text for answer in expected]
    assert answers["n_tokens"].to_pylist() == [answer.n_tokens for answer in expected]
    assert answers["finish_reason"].to_pylist() == [answer.finish_reason for answer in expected]
    assert len(set(answers["output"].to_pylist())) > 3


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_losses_are_in_order_with_their_numbers_of_tokens(model, requests, batch_size):
    found = request_tables.loss_of_all(model, requests, batch_size=batch_size)
    rows = requests.to_pylist()
    expected = [losses(model, [row], persona=PersonaKind(row["persona"])).item() for row in rows]
    assert found["nats"].to_pylist() == pytest.approx(expected, rel=1e-5)  # float32 sums in another order
    assert found["tokens"].to_pylist() == [len(ids) for ids in model.llm.tokenizer.targets([r["target"] for r in rows])]


def test_only_mean_personas_have_uniform_weights(model, requests):
    as_own = with_personas(requests, ["own"] * len(ROWS))
    mixed = request_tables.loss_of_all(model, requests, batch_size=3)["nats"].to_pylist()
    own = request_tables.loss_of_all(model, as_own, batch_size=3)["nats"].to_pylist()
    differs = [a != pytest.approx(b, rel=1e-5) for a, b in zip(mixed, own, strict=True)]
    # Of the two mean personas (1 and 3), the first has no history to weigh.
    assert differs == [False, False, False, True, False, False]


def test_no_requests_give_empty_tables_with_the_same_columns(model, requests):
    answerer = new_answerer(model, batch_size=2)
    answers = request_tables.answer_all(answerer, requests, GREEDY)
    assert request_tables.answer_all(answerer, requests[:0], GREEDY) == answers[:0]
    found = request_tables.loss_of_all(model, requests, batch_size=2)
    assert request_tables.loss_of_all(model, requests[:0], batch_size=2) == found[:0]


def test_retrieved_texts_and_bare_personas_work_in_any_batch(model, requests, monkeypatch):
    personas = ["bare", *PERSONAS[1:-1], "bare"]
    texts = [["the movie", "it is"], [], ["a title"], ["of it"], [], ["in a paper"]]
    table = with_personas(requests, personas).append_column("retrieved", pa.array(texts, pa.list_(pa.string())))
    without = request_tables.loss_of_all(model, table, batch_size=3)["nats"].to_pylist()
    monkeypatch.setattr(model, "retrieved_tokens", 8)
    together = request_tables.loss_of_all(model, table, batch_size=3)["nats"].to_pylist()
    alone = [
        request_tables.loss_of_all(model, table.slice(i, 1), batch_size=1)["nats"][0].as_py()
        for i in range(len(personas))
    ]
    monkeypatch.undo()
    assert together == pytest.approx(alone, rel=1e-5)
    differs = [a != pytest.approx(b, rel=1e-5) for a, b in zip(together, without, strict=True)]
    assert differs == [bool(found) for found in texts]
    # The loss of a bare LLM does not depend on the history.
    empty = table.set_column(table.column_names.index("history"), "history", pa.array([b""] * len(personas)))
    unseen = request_tables.loss_of_all(model, empty, batch_size=3)["nats"].to_pylist()
    assert (unseen[0], unseen[5]) == pytest.approx((without[0], without[5]), rel=1e-5)
    bare = model.collate([table.to_pylist()[0]], persona=PersonaKind.BARE)
    assert without[0] == pytest.approx(
        model.llm.nll(model.soft_tokens(bare)[:, :0], bare.prompts, bare.targets).item(), rel=1e-5
    )
