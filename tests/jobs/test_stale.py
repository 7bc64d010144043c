"""Tests on a real Ray that exactly the stale answers are replaced, and that readers can find what has changed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import generate
from persona.storage import copy_folder, join
from persona.store.store import Store
from persona.store.writer import merge
from tests import pages
from tests.jobs.conftest import Job, Row, behaviors, changed, encoded, new_plug, requests, stored, write
from tests.stores import IDENTITY, answers, write_rows


@pytest.fixture
def flags(store: Path, plug: str, tmp_path: Path) -> dict[str, Any]:
    """Requests by two users on each of five days; each sees the last three behaviors before it."""
    source = write(str(tmp_path / "requests.parquet"), requests(2, 5))
    decoding = {"beams": 1, "max_new_tokens": 4, "precision": "fp32", "batch_size": 4}
    return {"requests": source, "store": str(store), "plug": plug, "actors": 1, **decoding}


@pytest.fixture
def changed_since(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], list[Row]]:
    """The function that docs/data.md shows."""
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    (block,) = (block for block in pages.blocks(pages.DATA, "python") if "def changed_since" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    return lambda uri, version: names["changed_since"](uri, version).to_pylist()


def test_no_answer_is_stored_under_a_plug_that_did_not_generate_it(
    do: Job,
    flags: dict[str, Any],
    models: dict[str, str],
    store: Path,
    tmp_path: Path,
    while_it_waits: Callable[..., None],
) -> None:
    """As when a new plug is published during the run."""
    plug = shutil.copytree(flags["plug"], tmp_path / "plug")
    newer = new_plug(tmp_path / "newer", models["encoder"], models["llama"], seed=1)
    while_it_waits(lambda: copy_folder(newer, str(plug)))
    done = do(generate, **{**flags, "plug": plug})
    assert done.code == 2
    assert "was replaced while the job ran" in done.said and "run the same command again" in done.said
    assert not stored(store, "generations")


def test_exactly_the_stale_answers_are_replaced(
    do: Job,
    flags: dict[str, Any],
    store: Path,
    models: dict[str, str],
    changed_since: Callable[[str, int], list[Row]],
) -> None:
    both = {**flags, "persona": ("own", "none")}
    first = do(generate, **both)
    assert (first.code, first.result["answered"], first.result["stale"]) == (0, 20, 0)
    before = stored(store, "generations")

    # The text of user-1's second day is visible from the third day on, until three later ones replace it.
    edited = next(row for row in behaviors() if (row["user_id"], row["behavior_id"]) == ("user-1", "b1"))
    rows = encoded(models["encoder"], [{**edited, "text": "something else"}], change="edited")
    write_rows(Store.open(str(store)), "behaviors", rows)
    by_id = {row["request_id"]: row for row in requests(2, 5)}
    by_id["r0-2"] |= {"input": "another title"}
    write(flags["requests"], [*by_id.values(), *requests(1, 1, first_user=4)])
    stale = {("r1-1", "own"), ("r1-2", "own"), ("r1-3", "own"), ("r0-2", "own"), ("r0-2", "none")}
    new = {("r4-0", "own"), ("r4-0", "none")}

    done = do(generate, keep_stale=True, **both)
    assert done.code == 0
    assert (done.result["stale"], done.result["answered"], done.result["already_answered"]) == (5, 2, 20)
    assert "5 of them out of date and kept" in done.table
    kept = stored(store, "generations")
    assert changed(before, kept) == new

    done = do(generate, **both)
    assert done.code == 0
    assert (done.result["stale"], done.result["answered"], done.result["already_answered"]) == (5, 5, 17)
    assert "5 more were out of date" in done.table
    after = stored(store, "generations")
    assert changed(kept, after) == stale
    assert all(after[key]["created_at"] > kept[key]["created_at"] for key in stale)
    uri, versions = f"{store}/generations", (first.result["version"], done.result["version"])
    keys = [{(row["request_id"], row["variant"]) for row in changed_since(uri, version)} for version in versions]
    assert keys == [stale | new, set()]


def test_another_decoding_or_plug_replaces_the_answers_of_its_variant(
    do: Job, flags: dict[str, Any], store: Path, models: dict[str, str], tmp_path: Path
) -> None:
    do(generate, **{**flags, "persona": ("own", "mean")})
    before = stored(store, "generations")
    longer = do(generate, **{**flags, "persona": "mean", "max_new_tokens": 5})
    assert (longer.result["stale"], longer.result["answered"]) == (10, 10)
    middle = stored(store, "generations")
    assert changed(before, middle) == {key for key in before if key[1] == "mean"}

    other = new_plug(tmp_path / "other", models["encoder"], models["llama"], seed=1)
    done = do(generate, **{**flags, "plug": other})
    assert (done.result["stale"], done.result["answered"]) == (10, 10)
    after = stored(store, "generations")
    assert changed(middle, after) == {key for key in before if key[1] == "own"}
    assert len({row["plug"] for row in after.values()}) == 2


def test_a_reader_finds_the_changes_since_a_version(root: str, changed_since: Callable[[str, int], list[Row]]) -> None:
    store = Store.create(join(root, "store"), IDENTITY, 4)
    uri = join(store.uri, "generations")
    names = [f"request {number}" for number in range(8)]
    # The second one is not a valid folder name. Both are staged together, with one timestamp.
    variants = [answers(*names, variant=variant, fingerprint=variant) for variant in ("own", "a/b c")]
    write_rows(store, "generations", pa.concat_tables(variants))
    since = store.version("generations")
    assert changed_since(uri, since) == []
    assert len(changed_since(uri, 0)) == 16
    write_rows(store, "generations", answers(*names[:2], output="second", changes=["edited"] * 2))
    write_rows(store, "generations", answers(names[2], variant="a/b c", output="third", changes=["edited"]))
    write_rows(store, "generations", answers("request 9", output="fourth"))
    expected = [
        ("request 0", "own", "second"),
        ("request 1", "own", "second"),
        ("request 2", "a/b c", "third"),
        ("request 9", "own", "fourth"),
    ]

    def found() -> list[tuple[str, str, str]]:
        return sorted((row["request_id"], row["variant"], row["output"]) for row in changed_since(uri, since))

    assert found() == expected
    with store.writer("generations", job="test") as writer:
        writer.exchange_merged([merge(writer.table, group) for group in writer.small_files(2**20)])
    assert found() == expected, "merged files contain nothing new"
