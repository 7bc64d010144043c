"""Stored answers belong to a request of a user: one of another user with the same request id is not taken for it."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from jobs.runtime.answers import AllAnswered, AnswerSpec, Unanswered, read_outputs
from jobs.runtime.plugs import PlugRef, read_plug
from persona.errors import InputError
from persona.front_texts import FrontTexts
from persona.inputs.histories import bucket_of
from persona.options import Decoding
from persona.store.store import Store
from tests.stores import IDENTITY, answers, write_rows

USERS = [f"u{number}" for number in range(40)]


@pytest.fixture
def store(tmp_path: Any) -> Store:
    return Store.create(str(tmp_path / "store"), IDENTITY, 4)


@pytest.fixture(scope="module")
def ref(plug: str) -> PlugRef:
    return replace(read_plug(plug), fingerprint="p")


def users_of(bucket: int) -> list[str]:
    return [user for user, of in zip(USERS, bucket_of(USERS, 4).tolist(), strict=True) if of == bucket]


def joined(request: str, user: str) -> pa.Table:
    row = {"request_id": request, "user_id": user, "input": "a", "query": "a", "system": None}
    return pa.Table.from_pylist([{**row, "history_hash": "", "persona": "own"}])


def test_the_answers_read_are_those_of_the_users(store: Store) -> None:
    (first, *_), (second, *_) = users_of(0), users_of(1)
    for user in (first, second):
        write_rows(store, "generations", answers("r", users=[user], output=f"of {user}"))
    write_rows(store, "generations", answers("s", "t", users=[first, second]))
    assert read_outputs(store, ["own"], ["r", "t"], [first, second]) == {"own": {"r": f"of {first}", "t": "o"}}
    assert read_outputs(store, ["own"], ["s", "r"], [first, second]) == {"own": {"s": "o", "r": f"of {second}"}}


def test_an_answer_of_another_user_does_not_count_and_is_replaced(store: Store, ref: PlugRef) -> None:
    mine, other = users_of(2)[:2]
    spec = AnswerSpec(plug=ref, decoding=Decoding(), front=FrontTexts())
    fingerprint = spec.fingerprint(joined("r", mine).to_pylist()[0])
    write_rows(store, "generations", answers("r", users=[other], fingerprint=fingerprint))
    check = AllAnswered(["own"], ref)
    assert check(joined("r", other), store, 2, {}).num_rows == 1
    with pytest.raises(InputError, match="the variant 'own' has no answer to 'r'"):
        check(joined("r", mine), store, 2, {})
    unanswered = Unanswered(spec, keep_stale=False)
    assert unanswered(joined("r", other), store, 2, {}).num_rows == 0
    assert unanswered(joined("r", mine), store, 2, {})["change"].to_pylist() == ["edited"]
