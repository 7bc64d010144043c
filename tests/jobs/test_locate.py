"""`locate` on a real Ray: its states against the model itself, exactly once after a kill, and what it refuses."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import locate
from persona.models import resolve as models
from persona.models.frozen_llm import FrozenLLM
from persona.models.hidden_states import last_hidden_states
from persona.models.prompts import PromptText
from persona.plug import folder as plug_folder, record as plug_record
from persona.storage import list_files, read_bytes
from tests.jobs.conftest import Job, Row, arguments, requests, seen, write

ROOT = Path(__file__).parents[2]
# Small, so that a layer takes milliseconds.
QUICK: Row = {"actors": 1, "precision": "fp32", "runs": 2, "restarts": 1, "components": 2}
RESULTS = ("layers.parquet", "scan.parquet", "overlaps.parquet", "locate.html", "locate.json")


def statements(n: int = 8) -> list[Row]:
    """Statements of two groups; the word `not` is what the labels differ by."""
    return [
        {"group": group, "text": f"i {'' if label else 'not '}like the {group} {'abcdefgh'[i] * 3}", "label": label}
        for group in ("red", "blue")
        for label in (1, 0)
        for i in range(n)
    ]


@pytest.fixture
def flags(models: dict[str, str], tmp_path: Path) -> Row:
    """Flags of a `locate` of statements that works."""
    source = write(str(tmp_path / "statements.jsonl"), statements())
    return {"statements": source, "llm": models["llama"], "prompt_format": "plain", "max_input_tokens": 32, **QUICK}


@pytest.fixture
def of_plug(filled_store: Path, plug: str, tmp_path: Path) -> Row:
    """Flags of a `locate` of requests that works."""
    source = write(str(tmp_path / "requests.jsonl"), requests())
    return {"requests": source, "store": str(filled_store), "plug": plug, **QUICK}


def tables(out: str) -> dict[str, list[Row]]:
    """The rows of the tables of a run."""
    return {name: pq.read_table(io.BytesIO(read_bytes(f"{out}/{name}"))).to_pylist() for name in RESULTS[:3]}


def test_statements_from_s3_to_s3(do: Job, flags: Row, s3: str) -> None:
    bad = [{"group": "red", "text": "i", "label": "maybe"}, {"group": "red", "text": " ", "label": 1}]
    source = write(f"{s3}/statements.parquet", [{**row, "label": str(row["label"])} for row in [*statements(), *bad]])
    out = f"{s3}/located"
    done = do(locate, **{**flags, "statements": source}, out=out, max_reject_fraction=0.5)
    assert done.code == 0
    found = tables(out)
    layers = found["layers.parquet"]
    assert [(row["group"], row["layer"]) for row in layers] == [(g, i) for g in ("blue", "red") for i in range(3)]
    assert {(row["rows"], row["rows_other"]) for row in layers} == {(8, 8)}
    assert all(0 <= row["auc"] <= 1 and row["moved"] is None for row in layers)
    assert len(found["scan.parquet"]) == 2 * 3 * 2
    assert (done.result["computed"], done.result["rejects"], done.result["states"], done.result["width"]) == (
        32,
        2,
        3,
        48,
    )
    assert "label is not one of" in done.table
    assert json.loads(read_bytes(f"{out}/locate.json"))["groups"] == done.result["groups"]
    assert b"AUC of a linear probe" in read_bytes(f"{out}/locate.html")
    assert {file.uri.rpartition("/")[2] for file in list_files(out, hidden=True)} == set(RESULTS)  # no states left

    again = do(locate, **{**flags, "statements": source}, out=out, max_reject_fraction=0.5)
    assert (again.code, again.result["already_done"]) == (0, True)
    assert again.result["groups"] == done.result["groups"]
    assert do(locate, **{**flags, "statements": source}, out=out).code == 3  # the same results, under another limit


def test_states_are_those_of_the_llm_under_each_persona(do: Job, of_plug: Row, tmp_path: Path) -> None:
    out = str(tmp_path / "located")
    done = do(locate, **of_plug, out=out, keep_states=True, block_rows=7, batch_size=4)
    assert done.code == 0
    rows = pq.read_table(next(Path(out, "states").iterdir()) / "hidden").to_pylist()
    asked = requests()
    assert len(rows) == len({(row["group"], row["row_id"], row["layer"]) for row in rows}) == 3 * 3 * len(asked)
    states = {(row["group"], row["row_id"], int(row["layer"])): row["hidden"] for row in rows}

    folder = Path(of_plug["plug"])
    record = plug_record.read(folder)
    encoder, llm_folder = (models.resolve(card["name"], flag="") for card in (record.encoder, record.llm))
    llm = FrozenLLM.load(llm_folder, precision="fp32", max_input_tokens=record.max_input_tokens)
    model = plug_folder.load(folder, encoder=encoder, llm=llm)
    for row in asked[::5]:
        for kind in ("own", "none"):
            history = b"".join(seen(of_plug["store"], row, record.max_behaviors)) if kind == "own" else b""
            batch = model.collate([{**row, "query": row["input"], "history": history}])
            [expected] = last_hidden_states(
                llm, model.soft_tokens(batch).detach(), llm.tokenizer.prompts([PromptText(input=row["input"])])
            )
            found = np.array([states[kind, row["request_id"], layer] for layer in range(3)])
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)

    layers = tables(out)["layers.parquet"]
    assert [row["group"] for row in layers] == ["own / none"] * 3 + ["own / other"] * 3
    assert [row["moved"] for row in layers if row["layer"] == 0] == [0, 0]  # no block has read the persona
    own, none = (np.array([states[kind, row["request_id"], 2] for row in asked]) for kind in ("own", "none"))
    moved = np.linalg.norm(own - none, axis=1) / np.linalg.norm(none, axis=1)
    assert layers[2]["moved"] == pytest.approx(moved.mean(), rel=1e-4)
    assert done.result["groups"][0]["moved"] > 0

    # Other settings of the analysis take the states that are there.
    more = do(locate, **{**of_plug, "components": 1}, out=out, keep_states=True, block_rows=7)
    assert (more.code, more.result["computed"], more.result["already_done"]) == (0, 0, False)
    plain = [row["auc"] for row in tables(out)["layers.parquet"]]
    assert plain == [row["auc"] for row in layers]


KILLED = """
import os, signal, sys
from jobs import locate
from jobs.runtime import {module} as at
from jobs.runtime.cli import run
original, calls = at.{function}, []
def dies(*args, **more):
    {before}
    result = original(*args, **more)
    {after}
    return result
at.{function} = dies
sys.exit(run(locate.Config, locate.main, sys.argv[1:]))
"""


@pytest.fixture
def killed(flags: Row, local_ray: None) -> Callable[..., int]:
    """Runs the job in a process of its own that kills itself before or after a function of the runtime."""
    import ray

    def call(module: str, function: str, *, after: bool, **more: Any) -> int:
        kill = "os.kill(os.getpid(), signal.SIGKILL)"
        code = KILLED.format(
            module=module, function=function, before="" if after else kill, after=kill if after else ""
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        command = [sys.executable, "-c", code, *arguments(**{**flags, **more})]
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    return call


@pytest.mark.soak
def test_after_kills_the_results_are_those_of_an_undisturbed_run(
    do: Job, killed: Callable[..., int], flags: Row, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    assert killed("locating_work", "complete", after=False, out=out, block_rows=5) == -9  # all states are there
    parts = {file.uri: file.tag for file in list_files(out) if "/hidden/" in file.uri}
    assert parts
    done_index = sorted(file.uri for file in list_files(out) if "/index/" in file.uri)
    Path(done_index[0]).unlink()  # as if the last block had been cut off before its index was written
    assert killed("locating_results", "write", after=False, out=out, block_rows=5) == -9  # all layers are measured
    first = {file.uri: file.tag for file in list_files(out) if "/analysis/" in file.uri}
    assert len(first) == 3 * 2 * 3
    done = do(locate, **flags, out=out, block_rows=5)
    assert (done.code, done.result["computed"]) == (0, 0)
    undisturbed = do(locate, **flags, out=str(tmp_path / "other"))
    assert undisturbed.result["computed"] == 32
    found, expected = tables(out), tables(str(tmp_path / "other"))
    assert [len(rows) for rows in found.values()] == [len(rows) for rows in expected.values()]
    for row, other in zip(found["layers.parquet"], expected["layers.parquet"], strict=True):
        names = ("group", "layer", "rows", "rows_other")
        assert [row[name] for name in names] == [other[name] for name in names]
        # The same rows, in other batches of the LLM.
        assert row["calinski_harabasz"] == pytest.approx(other["calinski_harabasz"], rel=1e-3)
    assert not Path(out, "states").exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(refuse: Job, flags: Row, tmp_path: Path) -> None:
    out = tmp_path / "new"
    done = refuse(locate, **flags, out=str(out), dry_run=True)
    assert done.code == 0
    assert "read the statements of 1 files (plain)" in done.table
    assert "TFLOP for the states of all rows" in done.table
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statements": None}, "give either --statements, or --requests"),
        ({"requests": "r.jsonl"}, "give either --statements, or --requests"),
        ({"llm": None}, "--statements needs --llm"),
        ({"plug": "p"}, "--plug p goes with --requests"),
        ({"components": 0}, "--components 0: must be 1 or more"),
        ({"max_rows": 3}, "--max-rows 3: must be 4 or more"),
        ({"tails": "none"}, "must be both, upper or lower"),
        ({"prompt_format": "chat"}, "needs a chat template"),
        ({"statement_columns": "text=body"}, "no column 'body'"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(
    refuse: Job, flags: Row, tmp_path: Path, change: Row, message: str
) -> None:
    done = refuse(locate, **{**flags, **change}, out=str(tmp_path / "new"))
    assert (done.code, message in done.said) == (2, True), done.said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store": None}, "--requests needs --store"),
        ({"persona": ("own",)}, "--persona own: give two or more"),
        ({"prompt_format": "plain"}, "prompt options go with --statements"),
    ],
)
def test_requests_that_cannot_be_compared_are_refused(
    refuse: Job, of_plug: Row, tmp_path: Path, change: Row, message: str
) -> None:
    done = refuse(locate, **{**of_plug, **change}, out=str(tmp_path / "new"))
    assert (done.code, message in done.said) == (2, True), done.said


def test_without_a_group_of_both_labels_there_is_nothing_to_compare(do: Job, flags: Row, tmp_path: Path) -> None:
    write(flags["statements"], [row for row in statements() if row["label"]])
    done = do(locate, **flags, out=str(tmp_path / "new"))
    assert (done.code, "there is nothing to compare: blue is left out: it has 0 rows of one side" in done.said) == (
        2,
        True,
    )
