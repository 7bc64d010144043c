"""The strength of a persona: 1 changes nothing, 0 is the persona of no history, byte for byte."""

import pyarrow as pa
import pytest
import torch

from persona import strengths
from persona.errors import UsageError
from persona.options import Decoding, PersonaKind
from persona.plug.personalized import plug_inputs, soft_tokens
from persona.plug.request_tables import answer_all, loss_of_all
from tests.plugs import ROWS, new_answerer, new_model

GREEDY = Decoding(max_new_tokens=6, beams=1)
VARIANTS = [{}, {"persona_gain": 4.0}, {"weights": "mean"}, {"query_token": True}, {"instruction": "none"}]


def table(persona: str) -> pa.Table:
    return pa.Table.from_pylist([{**row, "persona": persona} for row in ROWS])


def tokens(model, strength: float, rows=ROWS) -> torch.Tensor:
    inputs = plug_inputs(model.plug, model.query_text, rows, PersonaKind.OWN, torch.device("cpu"), strength=strength)
    with torch.inference_mode():
        return soft_tokens(model.plug, inputs)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_soft_tokens_go_from_the_typical_persona_through_the_own_one(encoder_folder, llm, options):
    model = new_model(encoder_folder, llm, **options)
    own, none, half, twice = (tokens(model, strength) for strength in (1, 0, 0.5, 2))
    without = tokens(model, 1, [{**row, "history": b""} for row in ROWS])
    assert torch.equal(none, without)
    # float32 rounds each token by about 2^-24 of its size.
    torch.testing.assert_close(half, (own + none) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twice, 2 * own - none, rtol=1e-5, atol=1e-5)
    histories = torch.tensor([bool(row["history"]) for row in ROWS])
    assert (own != twice).flatten(1).any(1).tolist() == histories.tolist()


@pytest.mark.parametrize("options", VARIANTS[:4], ids=str)
def test_answers_and_losses_at_0_are_those_of_none_and_at_1_the_own_ones(encoder_folder, llm, options):
    model = new_model(encoder_folder, llm, **options)
    answerer = new_answerer(model)
    without = [{**row, "history": b""} for row in ROWS]
    none = pa.Table.from_pylist([{**row, "persona": "none"} for row in without])
    mixed = pa.concat_tables([table("own"), table("own-strength-0"), table("own-strength-3")])
    answers = answer_all(answerer, mixed, GREEDY)["output"].to_pylist()
    assert answers[:6] == answer_all(answerer, table("own"), GREEDY)["output"].to_pylist()
    assert answers[6:12] == answer_all(answerer, none, GREEDY)["output"].to_pylist()
    assert answers[12:] != answers[:6] != answers[6:12]
    losses = loss_of_all(model, mixed, batch_size=4)
    assert losses.slice(0, 6) == loss_of_all(model, table("own"), batch_size=4)
    assert losses.slice(6, 6) == loss_of_all(model, none, batch_size=4)


def test_names_say_kind_and_strength():
    kinds = [PersonaKind.OWN, PersonaKind.NONE, PersonaKind.BARE]
    names = strengths.names_at(kinds, [0, 0.5, 1, 2.0, 0.1234567])
    assert names == [
        "own-strength-0",
        "own-strength-0.5",
        "own",
        "own-strength-2",
        "own-strength-0.1234567",
        "none",
        "bare",
    ]
    assert [strengths.parse(name) for name in names[:5]] == [
        (PersonaKind.OWN, one) for one in (0, 0.5, 1, 2, 0.1234567)
    ]
    assert strengths.parse("bare") == (PersonaKind.BARE, 1)


@pytest.mark.parametrize("given", [(), (-1,), (1, 1.0), (float("nan"),), (float("inf"),)])
def test_strengths_that_are_none_are_refused(given):
    with pytest.raises(UsageError, match="--persona-strength .*: give numbers of 0 or more"):
        strengths.check([PersonaKind.OWN], given)


def test_a_strength_without_a_history_is_refused():
    with pytest.raises(UsageError, match="has no effect on personas without a history"):
        strengths.check([PersonaKind.NONE, PersonaKind.BARE], [0.5])
    strengths.check([PersonaKind.NONE], [1.0])
