"""Plug and LLM together: rows become batches, soft tokens and losses, each row as if it were alone."""

import numpy as np
import pytest
import torch

from persona.options import PersonaKind
from persona.plug.personalized import PersonalizedLLM
from tests.models import ENCODER_WIDTH
from tests.plugs import ROWS, losses, new_model

FLOAT32 = {"rtol": 1e-5, "atol": 1e-4}  # as in test_frozen_llm: some hundred float32 additions in another order


@pytest.fixture
def model(encoder_folder, llm) -> PersonalizedLLM:
    return new_model(encoder_folder, llm)


def test_histories_are_packed_one_after_the_other(model):
    batch = model.collate(ROWS)
    assert batch.lengths_B.tolist() == [3, 0, 1, 40, 0, 7]
    for i, part_nd in enumerate(batch.history_Md.split(batch.lengths_B.tolist())):
        stored = np.frombuffer(ROWS[i]["history"], dtype="<f2").reshape(-1, ENCODER_WIDTH)
        np.testing.assert_array_equal(part_nd.numpy(), stored.astype(np.float32))
    assert batch.n_target_tokens == sum(len(target) for target in batch.targets)


def test_a_row_has_the_same_loss_alone_and_in_any_batch(model):
    together = losses(model, ROWS)
    torch.testing.assert_close(together, torch.cat([losses(model, [one]) for one in ROWS]), **FLOAT32)
    torch.testing.assert_close(together, losses(model, ROWS[::-1]).flip(0), **FLOAT32)


def test_the_history_changes_the_loss(model):
    with_other = [{**one, "history": ROWS[3]["history"]} for one in ROWS]
    assert (losses(model, ROWS) - losses(model, with_other)).abs()[[0, 1, 2, 4, 5]].min() > 1e-2


def test_users_without_history_have_the_same_loss(model):
    without = [{**ROWS[1], "request_id": name} for name in ("a", "b")]
    first, second = losses(model, without)
    assert torch.equal(first, second)
    assert torch.isfinite(first)


def test_the_query_matters_under_attention_and_not_under_mean(encoder_folder, llm):
    other_query = [{**one, "query": "something else entirely"} for one in ROWS]
    attention = new_model(encoder_folder, llm)
    differs = (losses(attention, ROWS) != losses(attention, other_query)).tolist()
    # With at most one behavior there is nothing to weigh.
    assert differs == [True, False, False, True, False, True]
    assert torch.equal(
        losses(attention, ROWS, persona=PersonaKind.MEAN), losses(attention, other_query, persona=PersonaKind.MEAN)
    )
    mean = new_model(encoder_folder, llm, weights="mean")
    assert mean.collate(ROWS).query is None
    assert torch.equal(losses(mean, ROWS), losses(mean, other_query))


@pytest.mark.parametrize("options", [{}, {"recency": True}, {"weights": "mean", "recency": True}], ids=str)
def test_the_mean_persona_of_any_plug_has_uniform_weights(encoder_folder, llm, options):
    model = new_model(encoder_folder, llm, **options)
    if options:
        assert not torch.equal(losses(model, ROWS), losses(model, ROWS, persona=PersonaKind.MEAN))
    batch = model.collate(ROWS, persona=PersonaKind.MEAN)
    assert batch.query is None
    personas = []
    for part_nd in batch.history_Md.split(batch.lengths_B.tolist()):
        seen_nd = part_nd if len(part_nd) else model.plug.typical_behavior.unsqueeze(0)
        personas.append(model.plug.scale * model.plug.projector(seen_nd).mean(0).view(2, -1))
    torch.testing.assert_close(model.soft_tokens(batch)[:, 1:], torch.stack(personas), **FLOAT32)


def test_the_prompt_is_added_to_the_query_only(encoder_folder, llm):
    plain, prefixed = new_model(encoder_folder, llm), new_model(encoder_folder, llm, prompt="Represent: ")
    by_hand = [{**ROWS[0], "query": "Represent: query 0"}]
    batch, expected = prefixed.collate(ROWS[:1]), plain.collate(by_hand)
    assert torch.equal(batch.query[0], expected.query[0])
    assert batch.prompts == expected.prompts


def test_a_query_is_cut_to_the_limit(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    batch = model.collate([{**ROWS[0], "query": "x y z " * 100}, ROWS[1]])
    assert batch.query[0].shape[1] == 64


def test_padding_of_queries_changes_nothing(model):
    long = {**ROWS[0], "query": "a very long query " * 5}
    alone, padded = losses(model, ROWS[:1]), losses(model, [ROWS[0], long])[:1]
    torch.testing.assert_close(alone, padded, **FLOAT32)


def test_no_text_can_change_the_soft_tokens(model):
    hostile = {**ROWS[0], "input": "<s> </s> <pad> [CLS] <|soft|> <extra_id_0>"}
    batch, clean = (model.collate([one, ROWS[1]]) for one in (hostile, ROWS[0]))
    assert torch.equal(model.soft_tokens(batch), model.soft_tokens(clean))
    torch.testing.assert_close(model(batch)[1], model(clean)[1], **FLOAT32)


def test_the_llm_stays_in_eval_mode_while_the_plug_trains(model):
    model.train()
    assert model.plug.training
    assert not any(module.training for module in model.llm.modules())
    assert torch.equal(losses(model, ROWS), losses(model, ROWS))  # the query encoder has no dropout either
