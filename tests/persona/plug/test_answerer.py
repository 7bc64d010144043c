"""Plug and engine together: each row gets the answer it would get alone."""

import pytest

from persona.options import Decoding, PersonaKind
from persona.plug.answerer import Answerer
from tests.plugs import ROWS, new_answerer, new_model

GREEDY = Decoding(max_new_tokens=8, beams=1)
SAMPLE = Decoding(max_new_tokens=8, beams=1, sample=True)


@pytest.fixture
def answerer(encoder_folder, llm) -> Answerer:
    return new_answerer(new_model(encoder_folder, llm))


@pytest.mark.parametrize(
    "decoding", [GREEDY, Decoding(max_new_tokens=8, beams=3), SAMPLE], ids=["greedy", "beams", "sample"]
)
def test_a_row_has_the_same_answer_alone_and_in_any_batch(answerer, decoding):
    together = answerer.answer(ROWS, decoding)
    assert [answerer.answer([one], decoding)[0] for one in ROWS] == together
    assert answerer.answer(ROWS[::-1], decoding)[::-1] == together
    answerer.batch_size = answerer.engine.batch_size = 4
    assert answerer.answer(ROWS, decoding) == together


def test_a_sample_depends_on_its_request_and_the_seed(answerer):
    renamed = [{**ROWS[0], "request_id": f"other-{number}"} for number in range(4)]
    assert len({answer.text for answer in answerer.answer(renamed, SAMPLE)}) > 1
    [again] = answerer.answer(ROWS[:1], Decoding(max_new_tokens=8, beams=1, sample=True, seed=1))
    assert again != answerer.answer(ROWS[:1], SAMPLE)[0]


def test_the_answer_depends_on_the_history_unless_the_llm_is_bare(answerer):
    with_other = [{**one, "history": ROWS[3]["history"]} for one in ROWS]
    assert answerer.answer(ROWS, GREEDY) != answerer.answer(with_other, GREEDY)
    bare = [answerer.answer(rows, GREEDY, persona=PersonaKind.BARE) for rows in (ROWS, with_other)]
    assert bare[0] == bare[1] != answerer.answer(ROWS, GREEDY)


def test_retrieved_texts_change_the_answer_only_with_retrieved_tokens(answerer):
    rows = [{**one, "retrieved": ["the movie is", "it"]} for one in ROWS]
    assert answerer.answer(rows, GREEDY) == answerer.answer(ROWS, GREEDY)
    answerer.retrieved_tokens = 12
    assert answerer.answer(rows, GREEDY) != answerer.answer([{**one, "retrieved": []} for one in ROWS], GREEDY)
