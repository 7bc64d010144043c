"""The join of a bucket gives what `join_histories` gives, and reads each history once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from jobs.runtime import joining
from jobs.runtime.tally import Tally
from persona.errors import InputError
from persona.inputs import requests
from persona.options import PersonaKind
from persona.store.join import join_histories
from persona.store.store import Store
from tests.stores import IDENTITY, behaviors, encode, write_rows

N_USERS, N_REQUESTS = 30, 70
PERSONAS = [PersonaKind.OWN, PersonaKind.NONE, PersonaKind.OTHER, PersonaKind.MEAN]


class ReadCounter(Store):
    """A store that counts how often it reads which users: "bucket" is a read of all."""

    reads: "Counter[tuple[str, bool]]"

    def read_histories(
        self, bucket: int, user_ids: Sequence[str] | None = None, *, with_vectors: bool = True
    ) -> pa.Table:
        self.reads.update((user, with_vectors) for user in (["bucket"] if user_ids is None else user_ids))
        return super().read_histories(bucket, user_ids, with_vectors=with_vectors)


class Notes:
    """The counts of the last unit."""

    def note(self, stage: str, unit: str, counts: Mapping[str, float]) -> None:
        del stage, unit
        self.counts = dict(counts)


class Odd:
    """Selects the requests with an odd number."""

    adds = ("number",)

    def __call__(self, joined: pa.Table, store: Store, bucket: int, counts: dict[str, float]) -> pa.Table:
        del store, bucket, counts
        numbers = pa.array([int(name[1:]) for name in joined["request_id"].to_pylist()])
        return joined.append_column("number", numbers).filter(pa.compute.equal(pa.compute.bit_wise_and(numbers, 1), 1))


@pytest.fixture
def store(tmp_path: Path) -> ReadCounter:
    opened = Store.create(str(tmp_path / "store"), IDENTITY, 1)
    rows = [(f"u{i:02}", f"b{j}", "x" * (i + j), j) for i in range(N_USERS) for j in range(i % 4)]
    write_rows(
        opened, "behaviors", encode(behaviors(*rows, n_buckets=1)).append_column("change", pa.repeat("new", len(rows)))
    )
    snapshot = opened.snapshot("behaviors")
    counter = ReadCounter(*cast("tuple[Any, ...]", snapshot.__reduce__()[1]))
    counter.reads = Counter()
    return counter


def asked() -> pa.Table:
    """Some requests of each user but the first, in no order, one of them twice."""
    numbers = [*range(N_REQUESTS), 3]
    return pa.table(
        {
            "request_id": [f"r{number}" for number in numbers],
            "user_id": [f"u{1 + number * 7 % (N_USERS - 1):02}" for number in numbers],
            **{name: ["text"] * len(numbers) for name in ("input", "query", "target", "system")},
            "as_of": pa.array([None if n % 3 else n % 5 for n in numbers], pa.timestamp("us", "UTC")),
            "bucket": [0] * len(numbers),
        },
        schema=requests.SCHEMA,
    )


def run(store: Store, **how: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    notes = Notes()
    plan = joining.JoinPlan(job="test", personas=PERSONAS, max_behaviors=2, needs_target=False, **how)
    parts = list(joining.join_bucket(asked(), store=store, tally=cast("Tally", notes), plan=plan))
    return [row for part in parts for row in part.to_pylist()], notes.counts


@pytest.mark.parametrize("selection", [None, Odd()])
def test_a_bucket_is_joined_as_its_requests_are_and_each_history_read_once(
    store: ReadCounter, monkeypatch: pytest.MonkeyPatch, selection: Odd | None
) -> None:
    monkeypatch.setattr(joining, "_JOINED_ROWS", 8)
    rows, counts = run(store, selection=selection)
    reads = store.reads.copy()
    expected: dict[tuple[str, str], dict[str, Any]] = {}
    for persona in PERSONAS:
        joined = join_histories(asked().slice(0, N_REQUESTS), store, 0, persona=persona, max_behaviors=2)
        expected |= {
            (row["request_id"], persona.value): {**row, "persona": persona.value} for row in joined.to_pylist()
        }
    if selection is not None:
        expected = {
            (name, persona): {**row, "number": int(name[1:])}
            for (name, persona), row in expected.items()
            if int(name[1:]) % 2
        }
    assert {(row["request_id"], row["persona"]): row for row in rows} == expected and len(rows) == len(expected)
    own = [row for row in expected.values() if row["persona"] == "own"]
    assert (counts["asked"], counts["repeated"], counts["kept"]) == (N_REQUESTS, 1, len(rows))
    if selection is None:
        assert counts["empty"] == [row["n_behaviors"] for row in own].count(0) > 0
        assert counts["untimed"] == 0

    assert reads["bucket", False] == 1, "`other` looks for users once a bucket"
    of_keys = [n for (user, with_vectors), n in reads.items() if user != "bucket" and not with_vectors]
    assert set(of_keys) == (set() if selection is None else {1})
    of_vectors = Counter(n for (_, with_vectors), n in reads.items() if with_vectors)
    # A user is read again only as the next one of the user at the end of a group.
    assert of_vectors[1] > 0 and max(of_vectors) == 2 and of_vectors[2] <= N_REQUESTS / 8


def test_an_id_of_several_users_is_refused(store: ReadCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = asked()
    users = rows["user_id"].to_pylist()
    users[-1] = "u00"  # of the two requests r3
    others = rows.set_column(1, "user_id", pa.array(users))
    monkeypatch.setitem(globals(), "asked", lambda: others)
    with pytest.raises(InputError, match="the request_id 'r3' is that of requests of several users"):
        run(store)


def test_a_persona_at_several_strengths_has_one_history_that_is_read_once(store: ReadCounter) -> None:
    rows, counts = run(store, strengths=[0.5, 1])
    by_persona: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["request_id"]):
        by_persona.setdefault(row.pop("persona"), []).append(row)
    scaled = ["own", "other", "mean"]
    assert set(by_persona) == {"none", *scaled, *(f"{name}-strength-0.5" for name in scaled)}
    for name in scaled:
        assert by_persona[f"{name}-strength-0.5"] == by_persona[name]
    assert counts["kept"] == len(rows) == 7 * N_REQUESTS
    assert counts["empty"] == [row["n_behaviors"] for row in by_persona["own"]].count(0)
    assert max(n for (_, with_vectors), n in store.reads.items() if with_vectors) == 1


def test_a_later_window_of_a_bucket_does_not_look_for_users_again(store: ReadCounter) -> None:
    run(store)
    run(store)
    assert store.reads["bucket", False] == 1


def test_without_vectors_only_keys_are_read(store: ReadCounter) -> None:
    rows, counts = run(store, with_vectors=False)
    assert {with_vectors for _, with_vectors in store.reads} == {False}
    assert len(rows) == N_REQUESTS * len(PERSONAS) == counts["kept"]
    assert "history" not in rows[0] and {row["n_behaviors"] for row in rows} == {0, 1, 2}
