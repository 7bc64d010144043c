"""Plug and LLM together: rows become batches, losses and answers, each row as if it were alone."""

import numpy as np
import pytest
import torch

from persona.options import Decoding, PersonaKind
from persona.plug.personalized import PersonalizedLLM
from tests.models import ENCODER_WIDTH
from tests.plugs import ROWS, losses, new_model

FLOAT32 = {"rtol": 1e-5, "atol": 1e-4}  # as in test_llm: some hundred float32 additions in another order


@pytest.fixture
def model(encoder_folder, llm) -> PersonalizedLLM:
    return new_model(encoder_folder, llm)


def test_histories_are_packed_one_after_the_other(model):
    batch = model.collate(ROWS, with_targets=True)
    assert batch.lengths_B.tolist() == [3, 0, 1, 40, 0, 7]
    for i, part_nd in enumerate(batch.history_Md.split(batch.lengths_B.tolist())):
        stored = np.frombuffer(ROWS[i]["history"], dtype="<f2").reshape(-1, ENCODER_WIDTH)
        np.testing.assert_array_equal(part_nd.numpy(), stored.astype(np.float32))
    assert batch.n_target_tokens == sum(len(target) for target in batch.targets)
    assert model.collate(ROWS, with_targets=False).targets == []


def test_a_row_has_the_same_loss_alone_and_in_any_batch(model):
    together = losses(model, ROWS)
    torch.testing.assert_close(together, torch.cat([losses(model, [one]) for one in ROWS]), **FLOAT32)
    torch.testing.assert_close(together, losses(model, ROWS[::-1]).flip(0), **FLOAT32)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=8, beams=1),
        Decoding(max_new_tokens=8, beams=3),
        Decoding(max_new_tokens=8, beams=1, sample=True),
    ],
    ids=["greedy", "beams", "sample"],
)
def test_a_row_has_the_same_answer_alone_and_in_any_batch(model, decoding):
    together = model.answer(ROWS, decoding)
    assert [model.answer([one], decoding)[0] for one in ROWS] == together
    assert model.answer(ROWS[::-1], decoding)[::-1] == together


def test_a_sampled_answer_is_of_its_request_and_seed(model):
    decoding = Decoding(max_new_tokens=8, beams=1, sample=True)
    renamed = [{**ROWS[0], "request_id": f"other-{number}"} for number in range(4)]
    assert len({answer.text for answer in model.answer(renamed, decoding)}) > 1
    [again] = model.answer(ROWS[:1], Decoding(max_new_tokens=8, beams=1, sample=True, seed=1))
    assert again != model.answer(ROWS[:1], decoding)[0]


def test_the_history_is_told_to_the_llm(model):
    with_other = [{**one, "history": ROWS[3]["history"]} for one in ROWS]
    assert (losses(model, ROWS) - losses(model, with_other)).abs()[[0, 1, 2, 4, 5]].min() > 1e-2


def test_users_without_any_history_are_told_apart_by_nothing_but_their_text(model):
    nobody = [{**ROWS[1], "request_id": name} for name in ("a", "b")]
    first, second = losses(model, nobody)
    assert torch.equal(first, second)
    assert torch.isfinite(first)


def test_the_query_decides_under_attention_and_not_under_mean(encoder_folder, llm):
    asked_otherwise = [{**one, "query": "something else entirely"} for one in ROWS]
    attention = new_model(encoder_folder, llm)
    differs = (losses(attention, ROWS) != losses(attention, asked_otherwise)).tolist()
    # With no behavior, or one, there is nothing to weigh.
    assert differs == [True, False, False, True, False, True]
    assert torch.equal(
        losses(attention, ROWS, persona=PersonaKind.MEAN), losses(attention, asked_otherwise, persona=PersonaKind.MEAN)
    )
    mean = new_model(encoder_folder, llm, weights="mean")
    assert mean.collate(ROWS, with_targets=False).query is None
    assert torch.equal(losses(mean, ROWS), losses(mean, asked_otherwise))


@pytest.mark.parametrize("options", [{}, {"recency": True}, {"weights": "mean", "recency": True}], ids=str)
def test_the_mean_of_any_plug_is_what_equal_weights_give(encoder_folder, llm, options):
    model = new_model(encoder_folder, llm, **options)
    if options:
        assert not torch.equal(losses(model, ROWS), losses(model, ROWS, persona=PersonaKind.MEAN))
    batch = model.collate(ROWS, with_targets=True, persona=PersonaKind.MEAN)
    assert batch.query is None
    personas = []
    for part_nd in batch.history_Md.split(batch.lengths_B.tolist()):
        seen_nd = part_nd if len(part_nd) else model.plug.typical_behavior.unsqueeze(0)
        personas.append(model.plug.scale * model.plug.projector(seen_nd).mean(0).view(2, -1))
    torch.testing.assert_close(model.soft_tokens(batch)[:, 1:], torch.stack(personas), **FLOAT32)


def test_the_prefix_stands_in_front_of_the_query_only(encoder_folder, llm):
    plain, prefixed = new_model(encoder_folder, llm), new_model(encoder_folder, llm, prefix="Represent: ")
    asked = [{**ROWS[0], "query": "Represent: query 0"}]
    batch, expected = prefixed.collate(ROWS[:1], with_targets=False), plain.collate(asked, with_targets=False)
    assert torch.equal(batch.query[0], expected.query[0])
    assert batch.inputs == expected.inputs


def test_a_query_is_cut_to_what_its_encoder_may_read(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    batch = model.collate([{**ROWS[0], "query": "x y z " * 100}, ROWS[1]], with_targets=False)
    assert batch.query[0].shape[1] == 64


def test_queries_padded_or_not_are_the_same(model):
    long = {**ROWS[0], "query": "a very long query " * 5}
    alone, padded = losses(model, ROWS[:1]), losses(model, [ROWS[0], long])[:1]
    torch.testing.assert_close(alone, padded, **FLOAT32)


def test_a_text_cannot_reach_the_soft_tokens(model):
    hostile = {**ROWS[0], "input": "<s> </s> <pad> [CLS] <|soft|> <extra_id_0>"}
    batch, clean = (model.collate([one, ROWS[1]], with_targets=True) for one in (hostile, ROWS[0]))
    assert torch.equal(model.soft_tokens(batch), model.soft_tokens(clean))
    torch.testing.assert_close(model(batch)[1], model(clean)[1], **FLOAT32)


def test_the_llm_stays_in_eval_mode_while_the_plug_trains(model):
    model.train()
    assert model.plug.training
    assert not any(module.training for module in model.llm.modules())
    assert torch.equal(losses(model, ROWS), losses(model, ROWS))  # and the query encoder has no dropout either
