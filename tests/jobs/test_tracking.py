"""`--track` on a real Ray: the run's curves, results and files are in TensorBoard, each step once, and no user is."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import compare, evaluate, train
from jobs.runtime.tracking import Tracked
from persona.tracking import tracker as trackers
from persona.tracking.tracker import TrackedRun
from tests.jobs.conftest import TRAINING, Job, requests, write
from tests.jobs.test_compare import save

STEPS = 12


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    return tmp_path / "board"


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_training_and_its_evaluation_are_tracked(
    do: Job, store: Path, models: dict[str, str], board: Path, tmp_path: Path
) -> None:
    inputs = {
        "requests": write(str(tmp_path / "train.parquet"), requests()),
        "validation": write(str(tmp_path / "validation.jsonl"), requests(3)),
        "store": str(store),
        "llm": models["llama"],
    }
    plug = str(tmp_path / "plug")
    flags: dict[str, Any] = {**TRAINING, **inputs, "runs": str(tmp_path / "runs"), "plug": plug, "track": "tensorboard"}
    assert do(train, **flags).code == 0
    (folder,) = board.iterdir()
    training = json.loads(Path(plug, "plug.json").read_text())["training"]
    for name, curve, first in (
        ("train/loss", "training_curve", 1),
        ("validation/loss", "validation_curve", 0),
        ("validation/loss_no_persona", "none_curve", 0),
    ):
        logged = scalars(folder, name)
        assert [step for step, _ in logged] == list(range(first, STEPS + 1))
        assert dict(logged) == pytest.approx(dict(training[curve]), abs=2e-5)
    assert all(value > 1 for _, value in scalars(folder, "system/peak_memory_mib"))
    assert (folder / "files" / "plug" / "plug.safetensors").exists()

    # The finished run again: the same folder, and no step a second time.
    assert do(train, **flags).code == 0
    assert list(board.iterdir()) == [folder]
    assert len(scalars(folder, "train/loss")) == STEPS

    out = str(tmp_path / "evaluation")
    found = {name: inputs[name] for name in ("store", "validation")}
    found = {"store": found["store"], "requests": found["validation"], "plug": plug, "out": out}
    assert do(evaluate, **found, losses_only=True, actors=1, precision="fp32", track="tensorboard").code == 0
    (folder,) = (one for one in board.iterdir() if one.name.startswith("evaluate-"))
    loss = json.loads(Path(out, "metrics.json").read_text())["loss"]["own"]["mean"]
    assert scalars(folder, "loss/own") == [(0, pytest.approx(loss, abs=1e-5))]
    assert b"user-1" in Path(out, "report.html").read_bytes()
    every = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"saved against" in every and b"user-1" not in every


def test_a_comparison_is_tracked_without_ray(refuse: Job, board: Path, tmp_path: Path) -> None:
    folders = (save(tmp_path, "a"), save(tmp_path, "b", training={"epochs": 3}))
    assert refuse(compare, evaluations=folders, out=str(tmp_path / "both"), track="tensorboard").code == 0
    (folder,) = board.iterdir()
    assert {"loss/a/own", "above_reference/b/own"} <= names(folder)
    assert (folder / "files" / "report" / "comparison.html").exists()
    shown = settings(folder)
    assert f"| evaluations | {' '.join(folders)} |" in shown
    assert "| track |" not in shown and "None" not in shown


def settings(folder: Path) -> str:
    """The table of settings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (event,) = EventAccumulator(str(folder)).Reload().Tensors("settings/text_summary")
    return str(event.tensor_proto.string_val[0], "utf-8")


def names(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])


def test_a_resumed_run_logs_no_step_twice_and_fills_gaps(board: Path, plug: str, tmp_path: Path) -> None:
    run = TrackedRun(key="k" * 16, name="r", job="train")
    curve = [(step, 5.0 - step) for step in range(1, 7)]

    def follow(*steps: int) -> None:
        tracked = Tracked(trackers.start("tensorboard", run))
        tracked.log(
            [(step, {"train/loss": loss, "train/requests_per_s": 1.0}) for step, loss in curve if step in steps]
        )
        tracked.close(failed=True)

    follow(1, 2)  # killed before step 3 arrived
    follow(2, 4, 4)  # resumed at the checkpoint of step 1; a worker that crashes takes step 4 twice
    copy = tmp_path / "plug"
    copy.mkdir()
    for file in Path(plug).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    record = json.loads((copy / "plug.json").read_text())
    record["training"] |= {"training_curve": curve, "validation_curve": [(6, 0.5)]}
    (copy / "plug.json").write_text(json.dumps(record))
    tracked = Tracked(trackers.start("tensorboard", run))
    tracked.plug(str(copy))
    tracked.close(failed=False)
    (folder,) = board.iterdir()
    assert sorted(scalars(folder, "train/loss")) == curve
    assert sorted(step for step, _ in scalars(folder, "train/requests_per_s")) == [1, 2, 4]
    assert scalars(folder, "validation/loss") == [(6, 0.5)]


def test_a_tracker_that_fails_costs_a_warning(
    board: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = trackers.start("tensorboard", TrackedRun(key="k" * 16, name="r", job="train"))
    tracked = Tracked(tracker)
    (folder,) = board.iterdir()
    (folder / "files").write_text("where a folder should be")
    tracked.results({"loss/own": 1.0}, {"report.html": b"page"})
    assert not tracked.is_on
    assert "no longer tracked" in capsys.readouterr().err
    tracked.close(failed=False)
