"""What a dry run finds when it looks at the first requests: which of them see behaviors of their user."""

from pathlib import Path
from typing import Any

import pytest

from jobs.runtime import first_look
from jobs.runtime.inputs import find_requests
from jobs.runtime.job_options import RequestFormat
from persona.errors import UsageError
from persona.store.store import Store
from tests.jobs.conftest import write
from tests.stores import IDENTITY, behaviors, refresh

DAY = 24 * 3600 * 10**6  # microseconds; behaviors of 1970-01-02 to 1970-01-06


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.create(str(tmp_path / "store"), IDENTITY, 4)
    refresh(store, behaviors(*((f"u{u}", f"b{b}", f"text {u} {b}", (b + 1) * DAY) for u in range(3) for b in range(5))))
    return store


def look(folder: Path, store: Store, *users: str, must_see: bool = True, **more: Any) -> first_look.FirstLook:
    rows = [
        {"request_id": f"r{i}", "user_id": user, "input": "i", "target": "t", **more} for i, user in enumerate(users)
    ]
    write(str(folder / "requests.jsonl"), rows)
    found = find_requests(str(folder / "requests.jsonl"), RequestFormat(), flag="--requests", needs_target=True)
    return first_look.look(found, store, max_behaviors=4, must_see=must_see)


def test_requests_with_and_without_a_history_are_counted(tmp_path: Path, store: Store) -> None:
    found = look(tmp_path, store, "u0", "u1", "u2", "stranger")
    assert found.rows() == [("first 4 requests", "3 see behaviors of their user, 3.0 on average")]
    assert found.facts() == {"looked_at": 4, "with_history": 3, "mean_behaviors": 3.0}


def test_a_request_sees_only_what_is_older(tmp_path: Path, store: Store) -> None:
    assert look(tmp_path, store, "u0", "u1", as_of="1970-01-04").mean_behaviors == 2.0


def test_only_the_first_requests_are_read(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_look, "_REQUESTS", 2)
    assert look(tmp_path, store, "u0", "u1", "u2").n_requests == 2


@pytest.mark.parametrize("more", [{}, {"as_of": "1970-01-01"}])
def test_a_store_from_which_no_request_sees_anything_is_refused(
    more: dict[str, str], tmp_path: Path, store: Store
) -> None:
    users = ("u0", "u1") if more else ("v0", "v1")
    with pytest.raises(UsageError, match=r"none of the first 2 requests sees a behavior in .*store.*embed their"):
        look(tmp_path, store, *users, **more)


def test_prompt_tuning_may_see_nothing(tmp_path: Path, store: Store) -> None:
    assert look(tmp_path, store, "v0", must_see=False).facts() == {
        "looked_at": 1,
        "with_history": 0,
        "mean_behaviors": 0.0,
    }
