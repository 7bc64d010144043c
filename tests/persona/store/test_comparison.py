"""The comparison of two stores: every behavior that one lacks or that differs, whatever their numbers of buckets."""

from pathlib import Path

import numpy as np
import pytest

from persona.store import comparison
from persona.store.store import Store
from tests.stores import IDENTITY, NASTY, behaviors, refresh

Row = tuple[str, str, str, int | None]


def new_store(folder: Path, rows: list[Row], n_buckets: int) -> Store:
    store = Store.create(str(folder), IDENTITY, n_buckets)
    if rows:
        refresh(store, behaviors(*rows, n_buckets=n_buckets))
    return store


@pytest.mark.parametrize("n_buckets", [(4, 4), (2, 6), (6, 4), (3, 5)])
def test_the_comparison_is_that_of_two_dictionaries(tmp_path: Path, n_buckets: tuple[int, int]) -> None:
    draw = np.random.default_rng(sum(n_buckets))
    keys = [(user, name) for user in [*NASTY, *"abcdefgh"] for name in ("1", "2", "11")]
    sides: list[dict[tuple[str, str], tuple[str, int | None]]] = []
    for _ in range(2):
        kept = [key for key in keys if draw.random() < 0.8]
        sides.append(
            {key: ("text" if draw.random() < 0.8 else "other", [1, 1, 1, 2, None][draw.integers(5)]) for key in kept}
        )
    stores = [
        new_store(tmp_path / str(i), [(*key, *value) for key, value in side.items()], n)
        for i, (side, n) in enumerate(zip(sides, n_buckets, strict=True))
    ]
    old, new = sides
    expected = {
        "missing": old.keys() - new.keys(),
        "extra": new.keys() - old.keys(),
        "differing": {key for key in old.keys() & new.keys() if old[key] != new[key]},
    }
    assert all(expected.values())
    pair = dict(zip(("old", "new"), stores, strict=True))
    found = comparison.added([comparison.compare(group, **pair) for group in comparison.groups(**pair)])
    assert (found.old, found.new, found.is_equal) == (len(old), len(new), False)
    named = found.examples.to_pylist()
    for name, wanted in expected.items():
        assert getattr(found, name) == len(wanted)
        assert {(row["user_id"], row["behavior_id"]) for row in named if row["difference"] == name} == wanted


def test_equal_stores_are_equal_and_an_empty_one_lacks_everything(tmp_path: Path) -> None:
    rows: list[Row] = [(user, "1", "text", None) for user in NASTY]
    one, two = new_store(tmp_path / "one", rows, 4), new_store(tmp_path / "two", rows, 8)
    empty = new_store(tmp_path / "empty", [], 4)
    for new, missing in ((two, 0), (empty, len(rows))):
        found = comparison.added([comparison.compare(g, old=one, new=new) for g in comparison.groups(one, new)])
        assert (found.missing, found.extra, found.differing, found.is_equal) == (missing, 0, 0, not missing)
