"""A changed encoder on a real Ray: a second store beside the first, one switch, every job follows, and back again."""

import json
from pathlib import Path

import pytest

from jobs import embed, evaluate, forget, generate, store as job
from jobs.runtime import switching
from persona import open_store, storage
from persona.errors import LeaseLost
from persona.storage import join
from persona.store.store import Store
from tests.jobs.conftest import Job, behaviors, fill_store, requests, write
from tests.models import tiny_encoder


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of another encoder."""
    return str(tiny_encoder(tmp_path_factory.mktemp("newer") / "encoder", seed=9))


def users(uri: str) -> set[str]:
    store = Store.open(uri)
    return {user for bucket in range(store.n_buckets) for user in store.users(bucket)}


def test_a_changed_encoder_is_one_switch_and_back(
    do: Job, refuse: Job, root: str, models: dict[str, str], newer: str, plug: str, tmp_path: Path
) -> None:
    v1, v2, live = (join(root, name) for name in ("v1", "v2", "live"))
    histories = write(join(root, "histories.jsonl"), behaviors())
    fill_store(v1, models["encoder"], behaviors())
    first = do(job, action="switch", store=live, to=v1)
    assert (first.code, first.result["before"], first.result["to"]) == (0, None, v1)
    assert f"{v1} (via {live})" in do(job, action="show", store=live).table

    # The new store is built while the old one is in use, and is not taken before it is complete.
    fill_store(v2, newer, behaviors()[:-3])
    listed = tmp_path / "differences.jsonl"
    for dry_run in (True, None):
        early = do(job, action="switch", store=live, to=v2, differences=listed, dry_run=dry_run)
        assert early.code == 2
        assert (
            f"--to {v2} has 27 behaviors and {v1}, now in use, has 30: 3 are missing there. Run jobs.embed"
            in early.said
        )
        assert [json.loads(line) for line in listed.read_text().splitlines()] == [
            {"user_id": row["user_id"], "behavior_id": row["behavior_id"], "difference": "missing"}
            for row in behaviors()[-3:]
        ]
        assert open_store(live).uri == v1
    flags = {"histories": histories, "max_tokens": 32, "precision": "fp32"}
    assert do(embed, **flags, store=v2, encoder=newer, pooling="cls").result["new"] == 3
    plan = do(job, action="switch", store=live, to=v2, dry_run=True)
    assert (plan.code, plan.result["would"], open_store(live).uri) == (0, f"point {live} to {v2}", v1)
    done = do(job, action="switch", store=live, to=v2)
    assert (done.code, done.result["before"], done.result["behaviors"]) == (0, v1, 30)
    assert (done.result["missing"], done.result["extra"], done.result["differing"]) == (0, 0, 0)

    # Every job uses the new store, says so, and refuses the old encoder and its plugs.
    refreshed = do(embed, **flags, store=live, encoder=newer, pooling="cls", reread=True)
    assert (refreshed.result["store"], refreshed.result["known"]) == (v2, 30)
    assert f"{v2} (via {live}), version" in refreshed.table
    old_encoder = refuse(embed, **flags, store=live, encoder=models["encoder"], pooling="cls")
    assert (old_encoder.code, f"the store at {v2} was made by encoder {newer}" in old_encoder.said) == (2, True)
    asked = {"requests": write(join(root, "requests.jsonl"), requests()), "store": live, "plug": plug}
    for other, more in ((generate, {}), (evaluate, {"out": tmp_path / "out"})):
        old_plug = refuse(other, **asked, **more)
        assert (old_plug.code, "but the store has those of" in old_plug.said) == (2, True), old_plug.said
    assert storage.list_files(live) == []

    # A user leaves the store in use and the one before it.
    left = do(forget, store=live, user="user-1")
    assert (left.code, left.result["stores"]) == (0, [v2, v1])
    assert (left.result["rows_before"]["behaviors"], left.result["rows_after"]["behaviors"]) == (10, 0)
    assert users(v1) == users(v2) == {f"user-{number}" for number in (0, 2, 3, 4, 5)}

    back = do(job, action="switch", store=live, to=v1)
    assert (back.code, back.result["before"], open_store(live).uri) == (0, v2, v1)
    again = do(job, action="switch", store=live, to=v1)
    assert (again.code, "as before" in again.table) == (0, True)


def test_a_store_with_forgotten_or_other_behaviors_is_taken_only_when_asked_to(
    do: Job, models: dict[str, str], tmp_path: Path
) -> None:
    v1, v2, live = (str(tmp_path / name) for name in ("v1", "v2", "live"))
    fill_store(Path(v1), models["encoder"], behaviors(5))
    changed = [{**row, "text": "another"} if row["behavior_id"] == "b0" else row for row in behaviors(6)]
    fill_store(Path(v2), models["encoder"], changed)
    assert do(job, action="switch", store=live, to=v1).code == 0
    refused = do(job, action="switch", store=live, to=v2)
    assert "5 are only there, 5 have another text or timestamp there" in refused.said
    taken = do(job, action="switch", store=live, to=v2, allow_differences=True)
    assert (taken.code, taken.result["extra"], taken.result["differing"]) == (0, 5, 5)
    assert open_store(live).uri == v2
    # A pointer whose store was deleted can be moved on, too.
    Path(v2).rename(tmp_path / "moved")
    assert "where there is no store" in do(job, action="show", store=live).said
    assert "To switch without a comparison, add --allow-differences" in do(job, action="switch", store=live, to=v1).said
    assert do(job, action="switch", store=live, to=v1, allow_differences=True).code == 0
    assert [store.uri for store in Store.open_all(live)] == [v1]


def test_a_switch_that_another_one_has_overtaken_is_refused(store: Path, tmp_path: Path) -> None:
    live = str(tmp_path / "live")
    first, second = switching.plan(live, str(store)), switching.plan(live, str(store))
    switching.write(first)
    with pytest.raises(LeaseLost, match=f"another run has switched {live} meanwhile; run the same command again"):
        switching.write(second)
    assert not switching.plan(live, str(store)).is_needed


def test_wrong_usage(refuse: Job, store: Path, tmp_path: Path) -> None:
    live = tmp_path / "live"
    assert "switch needs --to" in refuse(job, action="switch", store=live).said
    assert "--to goes with switch, not with show" in refuse(job, action="show", store=store, to=store).said
    assert "there is no store at" in refuse(job, action="switch", store=live, to=tmp_path).said
    assert "is a store, and readers" in refuse(job, action="switch", store=store, to=store).said
    assert refuse(job, action="switch", store=live, to=store).code == 0
    assert f"is a pointer to {store}; give" in refuse(job, action="switch", store=tmp_path / "l", to=live).said
