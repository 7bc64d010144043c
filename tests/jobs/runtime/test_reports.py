"""`forget --reports`: after it, no byte of an evaluation is about the users, and all else is as it was."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.runtime import losses, reports
from persona.errors import InputError
from persona.inputs.lamp import TASKS
from persona.inputs.lamp_files import outputs_json
from persona.report.pages import chart_files, evaluation_page
from persona.storage import join, list_files, read_bytes, write_bytes
from tests.persona.report.test_pages import metrics

STAYING = ["stays-1", "stays-2", "stays-3"]


def example_of(user: str) -> dict[str, Any]:
    """An example with texts that only this user has written."""
    texts = {name: f"{name} words of <{user}>" for name in ("input", "target", "own", "none")}
    behavior = {"behavior_id": "b7", "written": "2024-05-06", "weight": 0.75, "text": f"past words of <{user}>"}
    nats = {"own": 1.0, "none": 2.0, "other": 3.0}
    ids = {"request_id": f"request of {user}", "user_id": user, "n_behaviors": 7}
    return {**ids, **texts, "nats_a_token": nats, "listened_to": [behavior]}


def write_evaluation(folder: str, users: list[str], *, with_charts: bool = False) -> None:
    """What `jobs.evaluate` writes for a LaMP task, with an example of each user."""
    found = metrics(
        examples=[example_of(user) for user in users],
        largest_gains=[example_of(user) for user in users[:2]],
        map=[{"user_id": user, "x": 0.1 * i, "y": 0.2, "saved": 0.3, "n_behaviors": 3} for i, user in enumerate(users)],
    )
    pairs = [(user, persona) for user in users for persona in ("own", "none")]
    measured = {
        "request_id": [f"request of {user}" for user, _ in pairs],
        "user_id": [user for user, _ in pairs],
        "persona": [persona for _, persona in pairs],
        **{name: [1] * len(pairs) for name in ("n_behaviors", "nats", "tokens")},
    }
    answers = {f"request of {user}": f"an answer to <{user}>" for user in users}
    files = {
        "losses.parquet": losses.to_parquet(measured),
        "metrics.json": json.dumps(found).encode(),
        "report.html": evaluation_page(found),
        **(chart_files(found) if with_charts else {}),
        "lamp/golds.json": outputs_json(TASKS["LaMP_4"], answers),
        "lamp/own.json": outputs_json(TASKS["LaMP_4"], answers),
    }
    for name, data in files.items():
        write_bytes(join(folder, name), data)


def contents(folder: str) -> dict[str, bytes]:
    """The bytes of each file; of Parquet also the values, which may be compressed."""
    found = {file.uri.removeprefix(f"{folder}/"): read_bytes(file.uri) for file in list_files(folder, hidden=True)}
    for name, data in found.items():
        if name.endswith(".parquet"):
            found[name] = data + repr(pq.read_table(pa.BufferReader(data)).to_pylist()).encode()
    return found


def remove(folder: str, *users: str, dry_run: bool = False) -> int:
    found = reports.find([folder])
    return sum(reports.remove_users(one, users, dry_run=dry_run) for one in found.evaluations)


def test_no_file_is_about_the_users_and_the_rest_is_drawn_anew(root: str) -> None:
    folder = join(root, "evaluations", "monday")
    write_evaluation(folder, ["leaves-1", *STAYING, "leaves-2"], with_charts=True)
    before = contents(folder)
    texts = ("losses.parquet", "metrics.json", "report.html", "lamp/golds.json", "lamp/own.json")
    assert all(b"leaves-1" in before[name] for name in texts), "the search finds what is there"

    # Of each user 2 losses, an example, a dot and 2 answers; of the first also a large gain
    assert remove(join(root, "evaluations"), "leaves-1", "leaves-2", dry_run=True) == 13
    assert contents(folder) == before
    assert remove(join(root, "evaluations"), "leaves-1", "leaves-2") == 13

    after = contents(folder)
    assert not [name for name, data in after.items() if b"leaves" in data]
    assert after.keys() == before.keys() and all(b"stays-2" in after[name] for name in texts)
    assert after["map.png"] != before["map.png"] and after["curves.png"] == before["curves.png"]
    old, new = (json.loads(found["metrics.json"]) for found in (before, after))
    assert {name for name in old if old[name] != new[name]} == {"examples", "largest_gains", "map"}
    assert remove(folder, "leaves-1", "leaves-2", dry_run=True) == remove(folder, "unknown") == 0


def test_other_evaluations_and_their_bytes_stay(tmp_path: Path) -> None:
    for name, users in (("one", ["leaves-1", *STAYING]), ("two", STAYING)):
        write_evaluation(str(tmp_path / name), users)
    before = contents(str(tmp_path / "two"))
    assert remove(str(tmp_path), "leaves-1")
    assert contents(str(tmp_path / "two")) == before


def test_an_evaluation_of_nobody_else_is_deleted(tmp_path: Path) -> None:
    write_evaluation(str(tmp_path), ["leaves-1"])
    remove(str(tmp_path), "leaves-1")
    assert contents(str(tmp_path)) == {}


def test_a_page_that_cannot_be_drawn_anew_is_deleted(tmp_path: Path) -> None:
    write_evaluation(str(tmp_path), ["leaves-1", *STAYING])
    found = json.loads((tmp_path / "metrics.json").read_text())
    del found["gain_by_history_length"]  # as of an older version
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    remove(str(tmp_path), "leaves-1")
    left = contents(str(tmp_path))
    assert left.keys() == {"losses.parquet", "metrics.json", "lamp/golds.json", "lamp/own.json"}
    assert not [name for name, data in left.items() if b"leaves" in data]


@pytest.mark.parametrize("first", ["lamp/own.json", "losses.parquet"])
def test_a_run_that_ends_before_a_file_is_written_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    write_evaluation(str(tmp_path), ["leaves-1", *STAYING])
    write = write_bytes

    def fails(uri: str, data: bytes) -> None:
        if uri.endswith(first):
            raise KeyboardInterrupt
        write(uri, data)

    with monkeypatch.context() as patched:
        patched.setattr("persona.storage.write_bytes", fails)
        with pytest.raises(KeyboardInterrupt):
            remove(str(tmp_path), "leaves-1")
    assert remove(str(tmp_path), "leaves-1")
    assert not [name for name, data in contents(str(tmp_path)).items() if b"leaves" in data]


def test_files_of_others_are_named_and_a_folder_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    write_evaluation(str(tmp_path / "one"), STAYING)
    (tmp_path / "one" / "notes.txt").touch()
    write_bytes(run_file := f"{tmp_path}/killed/_exchange/evaluate-f00d/0.run", b"")
    found = reports.find([str(tmp_path)])
    assert (found.unknown, found.run_files) == ([f"{tmp_path}/one/notes.txt"], [run_file])
    with pytest.raises(InputError, match=r"--reports .*lamp: has no losses.parquet or metrics.json"):
        reports.find([str(tmp_path / "one" / "lamp")])
    (tmp_path / "one" / "losses.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"losses.parquet is not a file of jobs.evaluate"):
        remove(str(tmp_path), "stays-1")
