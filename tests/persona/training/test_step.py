"""Training without an engine: what is trained, which behaviors are left out, the schedule."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from persona.models.encoder import TextEncoder
from persona.options import TrainingOptions
from persona.training.step import (
    aligned_steps,
    contrast_loss,
    deepspeed_settings,
    drop_behaviors,
    learning_rate_factor,
    new_optimizer,
    step_rows,
    trainable,
    with_other_histories,
)
from tests.models import ENCODER_WIDTH
from tests.plugs import ROWS, losses, new_model

WIDTH = 2
OPTIONS = TrainingOptions()

# What is trained --------------------------------------------------------------------------------------------

LAYER = [
    f"{part}.{kind}"
    for part in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    )
    for kind in ("weight", "bias")
]
QUERY_ENCODER = [
    *(f"plug.query_encoder.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")),
    *(f"plug.query_encoder.embeddings.LayerNorm.{kind}" for kind in ("weight", "bias")),
    *(f"plug.query_encoder.encoder.layer.{number}.{name}" for number in range(2) for name in LAYER),
]
PROJECTOR = [f"{layer}.{kind}" for layer in ("inner", "outer") for kind in ("weight", "bias")]
ALWAYS = [f"plug.projector.{name}" for name in PROJECTOR]
TRAINED = {
    "the paper's": ({}, [*ALWAYS, "plug.instruction", *QUERY_ENCODER]),
    "mean": ({"weights": "mean"}, [*ALWAYS, "plug.instruction"]),
    "mean, no instruction": ({"weights": "mean", "instruction": "none"}, ALWAYS),
    "learned temperature": (
        {"learn_temperature": True},
        [*ALWAYS, "plug.instruction", "plug.log_temperature", *QUERY_ENCODER],
    ),
    "recency": ({"recency": True}, [*ALWAYS, "plug.instruction", "plug.recency_slope", *QUERY_ENCODER]),
    "mean and recency": ({"weights": "mean", "recency": True}, [*ALWAYS, "plug.instruction", "plug.recency_slope"]),
    "projected instruction": (
        {"instruction": "projected"},
        [*ALWAYS, "plug.instruction", *(f"plug.instruction_projector.{name}" for name in PROJECTOR), *QUERY_ENCODER],
    ),
}


@pytest.mark.parametrize(("options", "names"), TRAINED.values(), ids=TRAINED)
def test_exactly_these_parameters_are_trained(encoder_folder, llm, options, names):
    model = new_model(encoder_folder, llm, **options)
    assert sorted(trainable(model)) == sorted(names)
    in_optimizer = [p for group in new_optimizer(model, OPTIONS).param_groups for p in group["params"]]
    assert {id(p) for p in in_optimizer} == {id(p) for p in trainable(model).values()}
    assert len(in_optimizer) == len(names)


def test_the_query_encoder_learns_at_a_rate_of_its_own(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    rates = replace(OPTIONS, learning_rate=1e-3, query_learning_rate=2e-5, weight_decay=0.1)
    rest, query = new_optimizer(model, rates).param_groups
    assert (rest["peak_lr"], query["peak_lr"], rest["weight_decay"], query["weight_decay"]) == (1e-3, 2e-5, 0.1, 0.1)
    assert {id(p) for p in query["params"]} == {id(p) for p in model.plug.query_encoder.parameters()}


def test_deepspeed_is_told_of_batches_that_multiply_out():
    options = TrainingOptions(global_batch=64, micro_batch=8, zero_stage=2, max_gradient_norm=0.5)
    told = deepspeed_settings(options, n_workers=4)
    assert told["train_batch_size"] == 64
    assert told["train_micro_batch_size_per_gpu"] * told["gradient_accumulation_steps"] * 4 == 64
    assert told["gradient_clipping"] == 0.5
    assert told["zero_optimization"]["stage"] == 2
    assert "bf16" not in told


# The schedule -----------------------------------------------------------------------------------------------


def test_rates_rise_linearly_then_fall_linearly_to_zero():
    factors = [learning_rate_factor(step, 20, 0.2) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == [pytest.approx((20 - step) / 16) for step in range(4, 20)]
    assert learning_rate_factor(20, 20, 0.2) == 0


@given(st.integers(1, 300), st.floats(0, 1, exclude_max=True))
def test_every_step_has_a_rate_above_zero_and_at_most_the_peak(n_steps, warmup):
    factors = [learning_rate_factor(step, n_steps, warmup) for step in range(n_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1


# History dropout --------------------------------------------------------------------------------------------


def row(n: int, request_id: str = "r") -> dict:
    """A row whose behaviors are numbered: vector i is (i, i)."""
    vectors = np.repeat(np.arange(n, dtype="<f2"), WIDTH)
    return {"request_id": request_id, "input": "x", "history": vectors.tobytes()}


def kept(row: dict, epoch: int = 0, options: TrainingOptions = OPTIONS) -> list[int]:
    history = drop_behaviors(row, width=WIDTH, epoch=epoch, options=options)["history"]
    vectors = np.frombuffer(history, dtype="<f2").reshape(-1, WIDTH)
    assert (vectors[:, 0] == vectors[:, 1]).all()
    return vectors[:, 0].astype(int).tolist()


@given(st.integers(0, 40), st.text(max_size=5), st.integers(0, 3), st.floats(0, 0.99), st.integers(0, 9))
@settings(max_examples=200)
def test_a_part_of_a_history_is_left_out_and_at_least_one_behavior_stays(n, request_id, epoch, dropout, seed):
    options = TrainingOptions(history_dropout=dropout, empty_history=0, seed=seed)
    left = kept(row(n, request_id), epoch, options)
    assert left == sorted(set(left))
    assert set(left) <= set(range(n))
    assert len(left) >= min(n, 1)
    # The reference's rule: int(n·U(0, dropout)) + 1 are left out.
    assert n - len(left) <= int(n * dropout) + 1
    assert len(left) == n or (dropout > 0 and n > 1)
    assert left == kept(row(n, request_id), epoch, options)


def test_one_pass_in_eleven_sees_the_whole_history():
    options = TrainingOptions(empty_history=0)
    n_passes = 3300
    whole = sum(len(kept(row(20), epoch, options)) == 20 for epoch in range(n_passes))
    # Binomial: four standard deviations around the mean.
    mean, deviation = n_passes / 11, (n_passes * (1 / 11) * (10 / 11)) ** 0.5
    assert abs(whole - mean) < 4 * deviation


def test_what_is_left_out_changes_with_epoch_request_and_seed():
    first = kept(row(30))
    assert kept(row(30), epoch=1) != first
    assert kept(row(30, "another")) != first
    assert kept(row(30), options=replace(OPTIONS, seed=1)) != first


def test_each_behavior_is_left_out_as_often_as_any_other():
    options = replace(OPTIONS, empty_history=0)
    n_rows, n = 2000, 10
    counts = np.zeros(n)
    for number in range(n_rows):
        counts[kept(row(n, str(number)), options=options)] += 1
    # int(10·U(0, 0.5)) + 1 is 1 … 5 with equal chances, 3 on average. Five standard deviations of a binomial.
    assert np.abs(counts - 0.7 * n_rows).max() < 5 * np.sqrt(n_rows * 0.7 * 0.3)


def test_the_share_of_rows_that_lose_their_whole_history_is_the_one_asked_for():
    options = replace(OPTIONS, empty_history=0.2)
    n_rows = 2000
    empty = sum(not kept(row(3, str(number)), options=options) for number in range(n_rows))
    assert abs(empty - 0.2 * n_rows) < 5 * np.sqrt(n_rows * 0.2 * 0.8)  # five standard deviations of a binomial
    assert kept(row(3), options=replace(OPTIONS, empty_history=0)) != []


def test_prompt_tuning_sees_no_history_at_all():
    options = replace(OPTIONS, empty_history=1)
    assert not any(kept(row(3, str(number)), options=options) for number in range(300))


def test_nothing_else_of_a_row_changes_and_the_row_itself_does_not():
    given_row = row(9)
    before = dict(given_row)
    found = drop_behaviors(given_row, width=WIDTH, epoch=0, options=OPTIONS)
    assert given_row == before
    assert {**found, "history": b""} == {**before, "history": b""}


# Alignment --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(encoder_folder) -> TextEncoder:
    return TextEncoder(encoder_folder, pooling="cls", max_tokens=32, precision="fp32", device="cpu")


def test_histories_are_the_targets_own_vectors_in_the_first_steps_and_only_there(encoder):
    options = TrainingOptions(alignment=0.3, empty_history=0)
    seen = {
        step: step_rows(ROWS, step=step, n_steps=10, epoch=0, width=ENCODER_WIDTH, options=options, encoder=encoder)
        for step in range(10)
    }
    dropped = [drop_behaviors(one, width=ENCODER_WIDTH, epoch=0, options=options) for one in ROWS]
    for step, rows in seen.items():
        assert [one["request_id"] for one in rows] == [one["request_id"] for one in ROWS]
        if step >= 3:
            assert rows == dropped
            continue
        for one, before in zip(rows, ROWS, strict=True):
            # Who has no history gets none: what stands in for it learns meanwhile.
            expected = encoder.encode([one["target"]]).vectors[0] if before["history"] else np.empty(0)
            found = np.frombuffer(one["history"], "<f2")
            # Batches of other sizes round float32 sums otherwise: half a unit of float16, 2^-12 of the largest value.
            np.testing.assert_allclose(found, expected, rtol=0, atol=2**-11)
            assert {**one, "history": b""} == {**before, "history": b""}
    assert len({one["history"] for one in seen[0]}) > 2


def test_a_run_that_aligns_nothing_more_needs_no_encoder():
    rest = {"epoch": 0, "width": ENCODER_WIDTH, "options": TrainingOptions(alignment=0.5), "encoder": None}
    assert len(step_rows(ROWS, step=5, n_steps=10, **rest)) == len(ROWS)
    with pytest.raises(AssertionError):
        step_rows(ROWS, step=4, n_steps=10, **rest)


@given(st.integers(1, 500), st.floats(0, 0.99))
def test_the_share_of_steps_that_align_is_the_one_asked_for(n_steps, share):
    found = aligned_steps(n_steps, TrainingOptions(alignment=share))
    assert abs(found - share * n_steps) <= 0.5
    assert found > 0 or share * n_steps <= 0.5


# Contrast ---------------------------------------------------------------------------------------------------


def test_each_request_meets_the_next_ones_history_unless_it_is_the_same_users_or_there_is_none():
    users = ["a", "b", "b", "c", "d", "a"]
    rows = [{**row(n, str(i)), "user_id": users[i]} for i, n in enumerate([2, 3, 1, 0, 4, 5])]
    places, others = with_other_histories(rows)
    # 1 and 2 are both b's; the next of 2, and 3 itself, have no history; the next of the last is the first, both a's.
    assert places == [0, 4]
    assert [one["request_id"] for one in others] == ["0", "4"]
    assert [one["history"] for one in others] == [rows[1]["history"], rows[5]["history"]]
    assert with_other_histories(rows[:1]) == ([], [])


def test_the_contrast_is_the_nats_of_telling_whose_history_it_was():
    own, other = torch.tensor([3.0, 5.0, 40.0]), torch.tensor([3.0, 4.0, 90.0])
    # log 2 where nobody can tell; -log of the own history's chance by Bayes' rule; nothing where it is sure.
    chance = math.exp(-5.0) / (math.exp(-5.0) + math.exp(-4.0))
    assert float(contrast_loss(own, other)) == pytest.approx(math.log(2) - math.log(chance), rel=1e-6)


def test_a_step_down_the_contrast_makes_targets_likelier_under_the_own_history_than_under_others(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    rows = [one for one in ROWS if one["history"]]
    places, others = with_other_histories(rows)
    assert places == [0, 1, 2, 3]
    batch = model.collate([*rows, *others])
    nll = model(batch)
    own_B, other_C = nll[: len(rows)], nll[len(rows) :]
    # The same requests beside others have the losses that they have alone, up to float32 sums in another order.
    torch.testing.assert_close(own_B.detach(), losses(model, rows), rtol=1e-4, atol=1e-4)
    own_B.retain_grad(), other_C.retain_grad()
    before = contrast_loss(own_B, other_C)
    before.backward()
    # It falls when the own nll falls or the other's rises, at a rate between 0 and 1.
    assert ((own_B.grad > 0) & (own_B.grad < 1)).all()
    torch.testing.assert_close(other_C.grad, -own_B.grad)
    slope = sum(float(p.grad.square().sum()) for p in trainable(model).values())
    step = 1e-3 * before.item() / slope
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.sub_(step * parameter.grad)
        after = model(batch)
    told = contrast_loss(after[: len(rows)], after[len(rows) :])
    # A step so short that the loss falls by what its slope says, a thousandth, give or take its curvature.
    assert told.item() == pytest.approx(0.999 * before.item(), rel=5e-4)
