"""Batches by tokens: every row once, within the budget, padded without changes."""

from itertools import accumulate, pairwise

import numpy as np
import torch
from hypothesis import given, strategies as st

from persona.models.batching import TokenRows, full_batches, pad, position_ids, token_batches


@given(st.lists(st.integers(0, 60)), st.integers(1, 200))
def test_batches_contain_each_row_once_within_the_budget(lengths, budget):
    batches = list(token_batches(lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, after in pairwise(batches):
        # No batch is smaller than necessary: the next row would not have fit.
        assert (len(batch) + 1) * max(lengths[batch[0]], 1) > budget or lengths[after[0]] > lengths[batch[0]]


@given(st.lists(st.integers(0, 60)), st.integers(1, 200))
def test_packed_batches_contain_each_row_once_within_the_budget(lengths, budget):
    batches = list(token_batches(lengths, budget, packed=True))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    totals = [sum(lengths[row] for row in batch) for batch in batches]
    for batch, total in zip(batches, totals, strict=True):
        assert len(batch) == 1 or total <= budget
    for total, after in zip(totals, batches[1:], strict=False):
        assert total + lengths[after[0]] > budget  # the next row would not have fit


@given(st.lists(st.integers(0, 60)), st.lists(st.integers(0, 30)), st.integers(1, 200), st.booleans())
def test_batches_of_parts_equal_those_of_all_rows_at_once(lengths, sizes, budget, packed):
    rows = [(number, [number] * length) for number, length in enumerate(sorted(lengths, reverse=True))]
    ends = [0, *accumulate(sizes), len(rows)]
    parts = [part(rows[start:end]) for start, end in pairwise(ends)]
    batches = list(full_batches(parts, budget, packed=packed))
    expected = token_batches([len(row) for _, row in rows], budget, packed=packed)
    assert [numbers.tolist() for numbers, _ in batches] == [batch.tolist() for batch in expected]
    for numbers, found in batches:
        assert found.ids_M.tolist() == np.repeat(numbers, found.lengths_N).tolist()
        assert found.lengths_N.tolist() == [len(rows[number][1]) for number in numbers]


def part(rows: list[tuple[int, list[int]]]) -> tuple[np.ndarray, TokenRows]:
    return np.array([number for number, _ in rows], np.int64), TokenRows.of([row for _, row in rows])


def test_full_batches_of_a_part_come_before_the_next_part_is_read():
    read = []

    def parts():
        for number, length in enumerate((9, 5, 4)):
            read.append(length)
            yield part([(2 * number, [0] * length), (2 * number + 1, [0] * length)])

    batches = full_batches(parts(), 10)
    assert next(batches)[0].tolist() == [0] and read == [9]
    assert [numbers.tolist() for numbers, _ in batches] == [[1], [2, 3], [4, 5]]


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5), st.booleans())
def test_padding_keeps_every_token_and_masks_the_rest(rows, left):
    ids_NT, mask_NT = pad(rows, 0, torch.device("cpu"), left=left)
    assert ids_NT.shape == mask_NT.shape == (len(rows), max([1, *map(len, rows)]))
    assert [ids[mask].tolist() for ids, mask in zip(ids_NT, mask_NT, strict=True)] == rows
    assert not ids_NT[~mask_NT].any()
    assert all(mask == sorted(mask, reverse=not left) for mask in mask_NT.tolist())


def test_positions_do_not_count_padding():
    mask_NT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]]).bool()
    assert position_ids(mask_NT).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 2]]
