"""Overlap of units against an enumeration of all sets of that size."""

from itertools import combinations

import pytest

from persona.locating.findings import overlaps
from persona.locating.overlap import overlap


def test_the_overlap_by_chance_is_that_of_all_sets_of_that_size():
    first = {0, 1, 2}
    sizes = [len(first & set(other)) for other in combinations(range(7), 4)]
    for second in ({0, 1, 2, 3}, {0, 1, 5, 6}, {0, 4, 5, 6}):
        found = overlap(first, second, 7)
        assert found.shared == len(first & second)
        assert found.expected == pytest.approx(sum(sizes) / len(sizes))
        assert found.p == pytest.approx(sum(size >= found.shared for size in sizes) / len(sizes))


def test_only_groups_with_units_in_the_same_layer_are_compared():
    rows = [
        {"group": "a", "layer": 1, "units": [0, 1], "units_shuffled": [5]},
        {"group": "b", "layer": 1, "units": [1, 2], "units_shuffled": [5, 6]},
        {"group": "c", "layer": 1, "units": [], "units_shuffled": []},
        {"group": "a", "layer": 2, "units": [1], "units_shuffled": [1]},
        {"group": "b", "layer": 2},
    ]
    [found] = overlaps(rows, 10)
    assert (found["layer"], found["first"], found["second"], found["shared"]) == (1, "a", "b", 1)
    assert (found["shared_shuffled"], found["expected_shuffled"]) == (1, pytest.approx(0.2))
