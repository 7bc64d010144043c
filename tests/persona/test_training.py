"""Training without an engine: what is trained, which behaviors are left out, the order of an epoch, the schedule."""

import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona.options import TrainingOptions
from persona.training import (
    deepspeed_settings,
    drop_behaviors,
    epoch_order,
    learning_rate_factor,
    new_optimizer,
    one_ahead,
    shuffle_windows,
    trainable,
)
from tests.plugs import new_model

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
ALWAYS = ["plug.default_persona", *(f"plug.projector.{name}" for name in PROJECTOR)]
TRAINED = {
    "the paper's": ({}, [*ALWAYS, "plug.instruction", *QUERY_ENCODER]),
    "mean": ({"weights": "mean"}, [*ALWAYS, "plug.instruction"]),
    "mean, no instruction": ({"weights": "mean", "instruction": "none"}, ALWAYS),
    "learned temperature": (
        {"learn_temperature": True},
        [*ALWAYS, "plug.instruction", "plug.log_temperature", *QUERY_ENCODER],
    ),
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


def test_nothing_else_of_a_row_changes_and_the_row_itself_does_not():
    given_row = row(9)
    before = dict(given_row)
    found = drop_behaviors(given_row, width=WIDTH, epoch=0, options=OPTIONS)
    assert given_row == before
    assert {**found, "history": b""} == {**before, "history": b""}


# The order of an epoch --------------------------------------------------------------------------------------


def requests(n: int) -> pa.Table:
    texts = ["x" * 100 * ((7 * number) % 50 + 1) for number in range(n)]
    return pa.table(
        {
            "request_id": [f"r{number}" for number in range(n)],
            "input": pa.array(texts, pa.large_string()),
            "target": pa.array(["y"] * n, pa.large_string()),
        }
    )


def ordered(table: pa.Table, *, epoch: int = 0, seed: int = 0, global_batch: int = 4) -> list[str]:
    keys = epoch_order(table, epoch=epoch, seed=seed, n_requests=1000, global_batch=global_batch)
    return table.append_column("order", keys).sort_by("order")["request_id"].to_pylist()


def test_the_order_is_known_from_each_row_alone():
    table = requests(1000)
    whole = ordered(table)
    assert sorted(whole) == sorted(table["request_id"].to_pylist())
    # In any pieces, in any order.
    keys = {}
    for start in (700, 0, 300):
        piece = table.slice(start, {700: 300, 0: 300, 300: 400}[start])
        found = epoch_order(piece, epoch=0, seed=0, n_requests=1000, global_batch=4)
        keys |= dict(zip(piece["request_id"].to_pylist(), found.to_pylist(), strict=True))
    assert sorted(keys, key=keys.__getitem__) == whole
    assert len(set(keys.values())) == 1000


def test_each_epoch_and_seed_has_an_order_of_its_own():
    table = requests(1000)
    assert ordered(table) == ordered(table)
    assert ordered(table) != ordered(table, epoch=1)
    assert ordered(table) != ordered(table, seed=1)


def test_a_batch_holds_rows_of_about_one_length():
    table = requests(1000)
    length = dict(zip(table["request_id"].to_pylist(), map(len, table["input"].to_pylist()), strict=True))
    batches = np.array([length[name] for name in ordered(table)]).reshape(-1, 4)
    spread = (batches.max(1) - batches.min(1)).mean()
    shuffled = np.random.default_rng(0).permutation(list(length.values())).reshape(-1, 4)
    assert spread < (shuffled.max(1) - shuffled.min(1)).mean() / 3


def test_short_rows_of_different_lengths_share_a_batch():
    """Few questions, each asked by many: batches of one length would be batches of one question."""
    length = [12 + 5 * (i % 4) for i in range(400)]
    table = pa.table(
        {"request_id": [f"r{i}" for i in range(400)], "input": ["x" * n for n in length], "target": ["y"] * 400}
    )
    batches = [ordered(table)[i : i + 8] for i in range(0, 400, 8)]
    assert sum(len({int(name[1:]) % 4 for name in batch}) > 1 for batch in batches) >= 49


def test_what_does_not_fill_a_batch_is_left_out_by_chance_and_not_for_its_length():
    table = requests(1000)
    length = dict(zip(table["request_id"].to_pylist(), map(len, table["input"].to_pylist()), strict=True))
    last = [length[name] for epoch in range(50) for name in ordered(table, epoch=epoch, global_batch=60)[-40:]]
    # Lengths are 100, 200, … 5,000 in equal numbers; five standard errors of the mean of 2,000 of them.
    assert abs(np.mean(last) / 100 - 25.5) < 5 * np.sqrt((50**2 - 1) / 12 / len(last))


def test_texts_of_any_length_have_an_order():
    table = pa.table({"request_id": ["a", "b"], "input": ["x" * 3_000_000, ""], "target": ["", "y"]})
    assert sorted(ordered(table)) == ["a", "b"]


@given(st.integers(0, 150), st.integers(0, 3), st.integers(0, 3))
def test_shuffled_windows_are_a_permutation_that_every_worker_draws_alike(n, epoch, seed):
    mine = list(shuffle_windows(iter(range(n)), epoch=epoch, seed=seed))
    assert sorted(mine) == list(range(n))
    theirs = list(shuffle_windows(iter(range(1000, 1000 + n)), epoch=epoch, seed=seed))
    assert theirs == [1000 + number for number in mine]


def test_windows_are_shuffled_anew_each_epoch_and_no_batch_moves_far():
    orders = [list(shuffle_windows(range(320), epoch=epoch, seed=0)) for epoch in range(2)]
    assert orders[0] != orders[1]
    assert orders[0] != list(range(320))
    assert max(abs(place - batch) for place, batch in enumerate(orders[0])) < 32


def test_the_next_item_is_made_while_this_one_is_worked_on():
    began = {number: threading.Event() for number in range(4)}

    def source():
        for number, event in began.items():
            event.set()
            yield number

    seen = []
    for number in one_ahead(source()):
        # The item after this one is begun without being asked for: waiting for it would never end otherwise.
        if number + 1 in began:
            assert began[number + 1].wait(timeout=30)
        assert number + 2 not in began or not began[number + 2].is_set()
        seen.append(number)
    assert seen == list(began)


def test_an_error_while_an_item_is_made_is_the_callers():
    def source():
        yield 1
        raise ValueError("broken")

    items = one_ahead(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
