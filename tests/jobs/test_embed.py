"""Tests for `embed` on a real Ray: what it reads, encodes and skips, on disk and on S3."""

import gzip
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable

from jobs import embed
from jobs.runtime import pools, session
from persona.models import resolve as persona_models
from persona.models.encoder import TextEncoder
from persona.storage import delta_options, exists, join, read_bytes, write_bytes
from persona.store.store import Store
from tests.encoders import reference, sentence_transformer
from tests.jobs.conftest import BUCKETS, START, Job, behaviors, stored, write


@pytest.fixture
def flags(models: dict[str, str], root: str) -> dict[str, object]:
    store = join(root, "store")
    return {"store": store, "encoder": models["encoder"], "max_tokens": 32, "buckets": BUCKETS, "actors": 1}


def rejects(uri: str) -> list[dict[str, object]]:
    rows = DeltaTable(join(uri, "rejects"), storage_options=delta_options(uri)).to_pyarrow_table().to_pylist()
    return sorted(rows, key=lambda row: (row["source"], row["row"]))


@pytest.mark.parametrize("root", ["s3"], indirect=True)
def test_a_refresh_encodes_only_new_and_edited_behaviors(
    do: Job, refuse: Job, flags: dict, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of each layout; the vectors are those of the encoder itself."""
    rows = behaviors()
    write(join(root, "in", "1.parquet"), rows[:10])
    by_user = {}
    for row in rows[10:]:
        by_user.setdefault(row["user_id"], []).append({k: v for k, v in row.items() if k != "user_id"})
    write(join(root, "in", "2.jsonl"), [{"user_id": user, "behaviors": items} for user, items in by_user.items()])

    first = do(embed, histories=join(root, "in"), **flags)
    assert first.code == 0
    assert (first.result["read"], first.result["new"], first.result["committed"]) == (30, 30, 30)
    before = stored(flags["store"], "behaviors")
    texts = [row["text"] for row in rows]
    encoder = TextEncoder(persona_models.resolve(flags["encoder"], flag=""), pooling="cls", max_tokens=32)
    for row, vector in zip(rows, encoder.encode(texts).vectors, strict=True):
        found = before[row["user_id"], row["behavior_id"]]
        # float16 of float32 sums whose order depends on the batch: 2 units in the last place of numbers below 1.
        np.testing.assert_allclose(np.frombuffer(found["vector"], "<f2"), vector, atol=2**-10, rtol=0)
        assert found["timestamp"] == row["timestamp"]

    with monkeypatch.context() as patch:
        patch.setattr(session, "connect", lambda: pytest.fail("it needs no Ray"))
        again = refuse(embed, histories=join(root, "in"), sync=True, **flags)
        plan = refuse(embed, histories=join(root, "in"), dry_run=True, **flags)
    assert (again.code, again.result["read"], again.result["version"]) == (0, 0, first.result["version"])
    assert again.result["input_files"]["known"]["files"] == 2 and plan.result["would"].startswith("read nothing")
    reread = do(embed, histories=join(root, "in"), reread=True, **flags)
    assert reread.code == 0
    assert (reread.result["known"], reread.result["committed"], reread.result["tokens"]) == (30, 0, 0)
    # Only the lease adds a version to the log.
    assert reread.result["version"] == first.result["version"] + 1

    new = {"user_id": "user-9", "behavior_id": "b0", "text": "i like it", "timestamp": START + timedelta(days=9)}
    edited = {**rows[0], "text": "something else"}
    write(join(root, "in", "1.parquet"), [edited, *rows[1:10], new])
    third = do(embed, histories=join(root, "in"), **flags)
    assert (third.result["known"], third.result["new"], third.result["edited"]) == (29, 1, 1)
    after = stored(flags["store"], "behaviors")
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {("user-9", "b0"), ("user-0", "b0")}

    write(join(root, "in", "3.jsonl"), [{**new, "behavior_id": "b1"}])
    last = do(embed, histories=join(root, "in"), **flags)
    assert (last.result["files"], last.result["read"], last.result["new"]) == (1, 1, 1)
    assert "3.jsonl" in last.table


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_what_the_encoders_folder_declares_is_applied_and_kept_with_the_store(
    do: Job, flags: dict, root: str, tmp_path: Path
) -> None:
    rows = behaviors(2, 2)
    write(join(root, "in.parquet"), rows)
    prompts = {"query": "query: ", "document": "passage: "}
    folder = sentence_transformer(tmp_path / "encoder", dense=[(24, torch.nn.Tanh())], prompts=prompts)
    changed = {**flags, "encoder": str(folder), "width": 7, "precision": "fp32", "max_tokens": 512}
    done = do(embed, histories=join(root, "in.parquet"), **changed)
    assert done.code == 0
    settings = "width 7, mean pooling, 512 tokens, prompt 'passage: '"
    assert settings in done.table
    assert Store.open(str(flags["store"])).identity.describe() == settings

    # The same folder as sentence-transformers reads it; float16 rounds components below 1 by at most 2^-12.
    expected = reference(folder).encode_document(
        [row["text"] for row in rows], truncate_dim=7, normalize_embeddings=True
    )
    kept = stored(flags["store"], "behaviors")
    found = [np.frombuffer(kept[row["user_id"], row["behavior_id"]]["vector"], "<f2") for row in rows]
    np.testing.assert_allclose(np.stack(found), expected, atol=2**-11, rtol=0)

    other = do(embed, histories=join(root, "in.parquet"), **{**changed, "document_prompt": ""}, dry_run=True)
    assert other.code == 2
    assert "document_prompt is 'passage: ' in the store and '' here" in other.said


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_bad_rows_are_rejected_and_good_rows_are_kept(do: Job, flags: dict, root: str) -> None:
    rows = behaviors(4, 2)
    good = write(join(root, "in", "good.parquet"), rows)
    lines = [json.dumps({"user_id": "u", "text": f"text {i}"}).encode() for i in range(3)]
    bad_lines = [
        b'{"user_id": null, "text": "a"}',
        b'{"user_id": "u", "text": " "}',
        b'{"user_id": "u", "text": "\xff"}',
    ]
    write_bytes(join(root, "in", "mixed.jsonl"), b"\n".join([*lines[:2], *bad_lines, lines[2]]))
    write_bytes(join(root, "in", "cut.parquet"), read_bytes(good)[:-20])
    write_bytes(join(root, "in", "cut.jsonl.gz"), gzip.compress(b'{"user_id": "v", "text": "whole"}\n' * 2)[:-12])

    done = do(embed, histories=join(root, "in"), max_reject_fraction=0.5, **flags)
    assert done.code == 0
    assert done.result["rejects"] == 5
    kept = stored(flags["store"], "behaviors")
    assert {user for user, _ in kept} >= {*(row["user_id"] for row in rows), "u"}
    assert len([user for user, _ in kept if user == "u"]) == 3
    found = [(row["job"], row["source"].rsplit("/", 1)[1], row["reason"]) for row in rejects(flags["store"])]
    reasons = {source: [reason for _, one, reason in found if one == source] for _, source, _ in found}
    assert {job for job, _, _ in found} == {"embed"}
    assert [reason.split(":")[0] for reason in reasons["mixed.jsonl"]] == [
        "user_id is missing",
        "text is empty",
        "line is not JSON",
    ]
    assert len(reasons["cut.parquet"]) == len(reasons["cut.jsonl.gz"]) == 1

    # By default so many rejects are too many, but all good rows are kept. Only files with broken lines are read again.
    strict = do(embed, histories=join(root, "in"), **flags)
    assert strict.code == 3
    assert strict.result["known"] == len(kept) - len(rows)


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_an_input_of_only_bad_rows_ends_with_exit_code_3(do: Job, flags: dict, root: str) -> None:
    write(join(root, "in.jsonl"), [{"user_id": None, "text": "a"}, {"user_id": "", "text": "b"}])
    done = do(embed, histories=join(root, "in.jsonl"), **flags)
    assert (done.code, done.result["rejects"], done.result["committed"]) == (3, 2, 0)


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_renamed_columns_and_a_limit(do: Job, flags: dict, root: str) -> None:
    table = pa.table({"author": ["a", "a", "b"], "body": ["one", "two", "three"]})
    write(join(root, "in.parquet"), table.to_pylist())
    named = {"histories": join(root, "in.parquet"), "columns": "user_id=author,text=body"}
    done = do(embed, **named, **flags, limit=2)
    assert done.result["committed"] == 2
    assert {user for user, _ in stored(flags["store"], "behaviors")} == {"a"}
    assert do(embed, **named, **flags).result["committed"] == 1


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_small_blocks_are_committed_one_by_one(do: Job, flags: dict, root: str) -> None:
    write(join(root, "in.parquet"), behaviors(4, 5))
    done = do(embed, histories=join(root, "in.parquet"), block_rows=5, **flags)
    assert done.result["committed"] == 20
    files = DeltaTable(join(flags["store"], "behaviors")).file_uris()
    assert len(files) >= 4
    assert len(stored(flags["store"], "behaviors")) == 20
    assert len(stored(flags["store"], "behaviors")) == 20
    assert Store.open(str(flags["store"])).n_buckets == BUCKETS


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_a_dry_run_shows_the_plan_and_writes_nothing(refuse: Job, flags: dict, root: str) -> None:
    write(join(root, "in.parquet"), behaviors(2, 2))
    done = refuse(embed, histories=join(root, "in.parquet"), dry_run=True, **flags)
    assert (done.code, done.result["would"], done.result["behaviors"]) == (0, "create the store", 4)
    assert refuse(embed, histories=join(root, "in.parquet"), dry_run=True, limit=3, **flags).result["behaviors"] == 3
    assert not exists(str(flags["store"]))


def test_a_dry_run_says_how_many_behaviors_the_store_lacks(
    refuse: Job, models: dict[str, str], filled_store: Path, tmp_path: Path
) -> None:
    rows = behaviors(2, 4)
    rows[0] |= {"text": "edited"}
    rows[1:3] = [{**row, "behavior_id": f"new-{row['behavior_id']}"} for row in rows[1:3]]
    flags = {"histories": write(str(tmp_path / "in.jsonl"), rows), "encoder": models["encoder"], "store": filled_store}
    done = refuse(embed, **flags, max_tokens=32, dry_run=True)
    assert {name: done.result[name] for name in ("behaviors", "compared", "missing")} == {
        "behaviors": 8,
        "compared": 8,
        "missing": 3,
    }
    assert "8; the store lacks 3 of the first 8" in done.table
    assert "2; the store lacks 2 of the first 2" in refuse(embed, **flags, max_tokens=32, dry_run=True, limit=2).table


def test_a_dry_run_refuses_what_the_run_would_refuse(
    refuse: Job, models: dict[str, str], filled_store: Path, tmp_path: Path
) -> None:
    flags = {"histories": write(str(tmp_path / "in.parquet"), behaviors()), "encoder": models["encoder"]}
    flags |= {"store": filled_store, "max_tokens": 32}
    assert "add missing behaviors" in refuse(embed, **flags, dry_run=True).result["would"]
    for other in ({"max_tokens": 16}, {"buckets": BUCKETS + 1}):
        done = refuse(embed, **{**flags, **other}, dry_run=True)
        assert (done.code, done.result) == (2, None)
        assert "in the store and" in done.said


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_sync_deletes_nothing_when_a_file_is_replaced_between_listing_and_reading(
    do: Job, models: dict[str, str], store: Path, tmp_path: Path, while_it_waits: Callable[..., None], kind: str
) -> None:
    """As when the nightly export is written during the run."""
    histories = str(tmp_path / f"in.{kind}")
    yesterday, rows = behaviors()[15:], behaviors(40)
    write(histories, yesterday)
    while_it_waits(lambda: write(histories, rows))
    flags = {"histories": histories, "encoder": models["encoder"], "max_tokens": 32, "store": store, "actors": 1}
    done = do(embed, sync=True, **flags)
    assert (done.result["gone"], done.result["new"]) == (0, len(rows) - len(behaviors()))
    assert set(stored(store, "behaviors")) == {(row["user_id"], row["behavior_id"]) for row in rows}
    assert "file changed during the run" in done.table and "deleted" in done.table


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_the_only_actor_uses_all_cores(do: Job, flags: dict, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, int]] = []
    by_models = pools.by_models

    def recorded(rows: Any, model: Any, *, pool: pools.ModelPool, **more: Any) -> Any:
        used.append((pool.max_size, pool.n_threads))
        return by_models(rows, model, pool=pool, **more)

    monkeypatch.setattr(pools, "by_models", recorded)
    monkeypatch.setattr(session, "usable_cores", lambda: 2)
    write(join(root, "in.parquet"), behaviors(4, 5))
    for number, more in enumerate([{"block_rows": 20}, {"block_rows": 5}, {"block_rows": 5, "actors": 1}]):
        sizes = {**flags, "actors": 2, "store": join(root, f"store{number}"), **more}
        assert do(embed, histories=join(root, "in.parquet"), **sizes).result["committed"] == 20
    # One block, of which a second actor would get nothing; four blocks for two actors, and for one.
    assert used == [(1, 2), (2, 1), (1, 2)]
