"""What a step sees of a history: parts of it, the target's embedding, or another user's history."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from persona.models.encoder import TextEncoder
from persona.options import TrainingOptions
from persona.training.augmentation import aligned_steps, drop_behaviors, step_rows, with_other_histories
from tests.models import ENCODER_WIDTH
from tests.plugs import ROWS

WIDTH = 2
OPTIONS = TrainingOptions(history_dropout=0.5, alignment=0)

# History dropout --------------------------------------------------------------------------------------------


def row(n: int, request_id: str = "r") -> dict:
    """A row with numbered behaviors: vector i is (i, i)."""
    vectors = np.repeat(np.arange(n, dtype="<f2"), WIDTH)
    return {"request_id": request_id, "input": "x", "history": vectors.tobytes()}


def kept(row: dict, epoch: int = 0, options: TrainingOptions = OPTIONS) -> list[int]:
    history = drop_behaviors(row, width=WIDTH, epoch=epoch, options=options)["history"]
    vectors = np.frombuffer(history, dtype="<f2").reshape(-1, WIDTH)
    assert (vectors[:, 0] == vectors[:, 1]).all()
    return vectors[:, 0].astype(int).tolist()


@given(st.integers(0, 40), st.text(max_size=5), st.integers(0, 3), st.floats(0, 0.99), st.integers(0, 9))
@settings(max_examples=200)
def test_part_of_a_history_is_dropped_and_at_least_one_behavior_stays(n, request_id, epoch, dropout, seed):
    options = TrainingOptions(history_dropout=dropout, empty_history=0, seed=seed)
    left = kept(row(n, request_id), epoch, options)
    assert left == sorted(set(left))
    assert set(left) <= set(range(n))
    assert len(left) >= min(n, 1)
    # The reference implementation drops int(n·U(0, dropout)) + 1 behaviors.
    assert n - len(left) <= int(n * dropout) + 1
    # It leaves histories of one or two behaviors whole.
    assert len(left) == n or (dropout > 0 and n > 2)
    assert left == kept(row(n, request_id), epoch, options)


def test_one_pass_in_eleven_sees_the_whole_history():
    options = TrainingOptions(empty_history=0)
    n_passes = 3300
    whole = sum(len(kept(row(20), epoch, options)) == 20 for epoch in range(n_passes))
    # Four standard deviations of a binomial.
    mean, deviation = n_passes / 11, (n_passes * (1 / 11) * (10 / 11)) ** 0.5
    assert abs(whole - mean) < 4 * deviation


def test_dropped_behaviors_change_with_epoch_request_and_seed():
    first = kept(row(30))
    assert kept(row(30), epoch=1) != first
    assert kept(row(30, "another")) != first
    assert kept(row(30), options=replace(OPTIONS, seed=1)) != first


def test_all_behaviors_are_dropped_equally_often():
    options = replace(OPTIONS, empty_history=0)
    n_rows, n = 2000, 10
    counts = np.zeros(n)
    for number in range(n_rows):
        counts[kept(row(n, str(number)), options=options)] += 1
    # int(10·U(0, 0.5)) + 1 is uniform on 1 … 5, with mean 3. Five standard deviations of a binomial.
    assert np.abs(counts - 0.7 * n_rows).max() < 5 * np.sqrt(n_rows * 0.7 * 0.3)


def test_the_given_share_of_rows_loses_the_whole_history():
    options = replace(OPTIONS, empty_history=0.2)
    n_rows = 2000
    empty = sum(not kept(row(3, str(number)), options=options) for number in range(n_rows))
    assert abs(empty - 0.2 * n_rows) < 5 * np.sqrt(n_rows * 0.2 * 0.8)  # five standard deviations of a binomial
    assert kept(row(3), options=replace(OPTIONS, empty_history=0)) != []


def test_an_empty_history_share_of_one_removes_every_history():
    options = replace(OPTIONS, empty_history=1)
    assert not any(kept(row(3, str(number)), options=options) for number in range(300))


def test_only_the_history_changes_and_the_given_row_is_not_modified():
    given_row = row(9)
    before = dict(given_row)
    found = drop_behaviors(given_row, width=WIDTH, epoch=0, options=OPTIONS)
    assert given_row == before
    assert {**found, "history": b""} == {**before, "history": b""}


# Alignment --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(encoder_folder) -> TextEncoder:
    return TextEncoder(encoder_folder, pooling="cls", max_tokens=32, precision="fp32", device="cpu")


def test_only_the_first_steps_replace_histories_by_their_targets(encoder):
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
            # An empty history stays empty.
            expected = encoder.encode([one["target"]]).vectors[0] if before["history"] else np.empty(0)
            found = np.frombuffer(one["history"], "<f2")
            # Other batch sizes round float32 sums differently: half a unit of float16, 2^-12 of the largest value.
            np.testing.assert_allclose(found, expected, rtol=0, atol=2**-11)
            assert {**one, "history": b""} == {**before, "history": b""}
    assert len({one["history"] for one in seen[0]}) > 2


def test_after_alignment_no_encoder_is_needed():
    rest = {"epoch": 0, "width": ENCODER_WIDTH, "options": TrainingOptions(alignment=0.5), "encoder": None}
    assert len(step_rows(ROWS, step=5, n_steps=10, **rest)) == len(ROWS)
    with pytest.raises(AssertionError):
        step_rows(ROWS, step=4, n_steps=10, **rest)


@given(st.integers(1, 500), st.floats(0, 0.99))
def test_the_given_share_of_steps_aligns(n_steps, share):
    found = aligned_steps(n_steps, TrainingOptions(alignment=share))
    assert abs(found - share * n_steps) <= 0.5
    assert found > 0 or share * n_steps <= 0.5


# Contrast pairs ---------------------------------------------------------------------------------------------


def test_neighbors_of_different_users_are_paired():
    users = ["a", "b", "b", "c", "d", "a"]
    rows = [{**row(n, str(i)), "user_id": users[i]} for i, n in enumerate([2, 3, 1, 0, 4, 5])]
    others = with_other_histories(rows)
    histories = [None if other is None else other["history"] for other in others]
    # Row 3 has no history, so 2 and 3 are no pair.
    assert histories == [rows[1]["history"], rows[0]["history"], None, None, rows[5]["history"], rows[4]["history"]]
    assert [other["request_id"] for other in others if other] == ["0", "1", "4", "5"]
    # Rows 1 and 2 are of one user, and the last row has no neighbor.
    assert with_other_histories([*rows[1:3], rows[4]]) == [None, None, None]
