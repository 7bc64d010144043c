"""The table `plugs`: one live version at any time, and the way back."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from deltalake import DeltaTable

from persona.errors import InputError, UsageError
from persona.storage import delta_options, join
from persona.store import registry
from persona.store.registry import PlugVersion, Registry
from persona.store.store import Store

START = datetime(2026, 1, 1, tzinfo=UTC)


def proposed(fingerprint: str, *, day: int = 0) -> PlugVersion:
    return PlugVersion(
        version=0,
        stage="refused",
        uri=f"s3://corp/plugs/{fingerprint}",
        fingerprint=fingerprint,
        run="weekly-1",
        loss=2.5,
        saved_against_other=0.2,
        saved_against_live=None,
        metrics="{}",
        evaluation="s3://corp/evaluations/1",
        reason="a test",
        decided_at=START + timedelta(days=day),
        live_since=None,
    )


def stages(found: Registry) -> dict[str, str]:
    return {one.fingerprint: one.stage for one in found.versions}


def save(store: Store, after: Registry) -> Registry:
    with store.writer(registry.NAME, job="test") as writer:
        registry.write(writer, registry.read(store), after)
    return registry.read(store)


def test_versions_are_promoted_refused_and_rolled_back(store: Store) -> None:
    empty = registry.read(store)
    assert empty.live is None
    first = save(store, empty.promoted(proposed("a")))
    assert first.require_live() == replace(proposed("a"), version=1, stage="live", live_since=START)
    third = save(store, save(store, first.refused(proposed("bad", day=1))).promoted(proposed("c", day=2)))
    assert stages(third) == {"a": "retired", "bad": "refused", "c": "live"}
    assert [one.version for one in third.versions] == [1, 2, 3]
    back = save(store, third.rolled_back())
    assert stages(back) == {"a": "live", "bad": "refused", "c": "rolled_back"}
    with pytest.raises(InputError, match="no plug that was live before version 1"):
        back.rolled_back()
    # Another promotion makes the way back lead to the first plug, not to the one that was rolled back.
    again = save(store, save(store, back.promoted(proposed("d", day=3))).rolled_back())
    assert stages(again) == {"a": "live", "bad": "refused", "c": "rolled_back", "d": "rolled_back"}


def test_a_plug_that_was_live_can_be_gone_back_to_even_if_it_is_refused_later(store: Store) -> None:
    found = Registry(store="s").promoted(proposed("a")).promoted(proposed("b", day=1))
    assert stages(found.refused(proposed("a", day=2)).rolled_back()) == {"a": "live", "b": "rolled_back"}


def test_a_refused_plug_keeps_its_number_when_it_is_promoted_after_all(store: Store) -> None:
    found = save(store, Registry(store="s").promoted(proposed("a")).refused(proposed("b")))
    found = save(store, found.promoted(proposed("b", day=1)))
    assert [(one.version, one.stage) for one in found.versions] == [(1, "retired"), (2, "live")]


def test_a_change_is_one_commit_that_any_delta_reader_sees(store: Store) -> None:
    first = save(store, Registry(store="s").promoted(proposed("a")))
    version = store.version(registry.NAME)
    save(store, first.promoted(proposed("b", day=1)))
    assert store.version(registry.NAME) == version + 2  # the lease and the rows
    uri = join(store.uri, registry.NAME)
    rows = DeltaTable(uri, storage_options=delta_options(uri)).to_pyarrow_table().to_pylist()
    assert {row["fingerprint"]: row["stage"] for row in rows} == {"a": "retired", "b": "live"}


def test_the_live_plug_is_found_by_its_name_only(store: Store) -> None:
    assert registry.find("s3://corp/plugs/live", store) is None
    with pytest.raises(InputError, match=r"no live plug yet; promote one with python -m jobs\.plugs promote"):
        registry.find("live", store)
    with pytest.raises(UsageError, match="no store yet"):
        registry.find("live", None)
    save(store, registry.read(store).promoted(proposed("a")))
    found = registry.find("live", store)
    assert found is not None
    assert found.uri == "s3://corp/plugs/a"
