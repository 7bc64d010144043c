"""Each tracker with its own library: what is logged is read back from the server or the files, also after a resume."""

from pathlib import Path
from typing import Any

import pytest

from persona.errors import TrackingError, UsageError
from persona.tracking import tracker as trackers
from persona.tracking.tracker import TrackedRun

RUN = TrackedRun(key="0123456789abcdef", name="weekly-47", job="train")


@pytest.fixture
def plug(tmp_path: Path) -> Path:
    folder = tmp_path / "plug"
    folder.mkdir()
    (folder / "README.md").write_text("a card")
    return folder


def log_twice(track: str, plug: Path) -> trackers.Tracker:
    """A run that ends after step 2, and goes on with step 3."""
    first = trackers.start(track, RUN)
    assert first.steps("train/loss") == set()
    first.log_settings({"learning_rate": "0.001", "system": "a | b"})
    first.log_numbers([(1, {"train/loss": 3.0}), (2, {"train/loss": 2.5, "train/requests_per_s": 8.0})])
    first.close(failed=True)
    second = trackers.start(track, RUN)
    assert second.steps("train/loss") == {1, 2}
    second.log_settings({"learning_rate": "0.001", "workers": "2"})
    second.log_numbers([(3, {"train/loss": 2.0})])
    second.log_files(plug, "plug")
    second.close(failed=False)
    return second


def test_mlflow_has_one_run_with_settings_curve_and_plug(
    mlflow_server: str, plug: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "trackers")
    tracker = log_twice("mlflow", plug)
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("trackers")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("train-weekly-47", "FINISHED")
    assert run.data.params == {"learning_rate": "0.001", "system": "a | b", "workers": "2"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 3.0), (2, 2.5), (3, 2.0)]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "plug")] == ["plug/README.md"]
    assert tracker.place == f"{mlflow_server}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"


def test_mlflow_that_does_not_answer_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match="MLflow at MLFLOW_TRACKING_URI"):
        trackers.start("mlflow", RUN)


def test_tensorboard_has_one_folder_with_settings_curve_and_plug(board: Path, plug: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = log_twice("tensorboard", plug)
    (folder,) = board.iterdir()
    assert tracker.place == str(folder) == str(board / "train-weekly-47-01234567")
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 3.0), (2, 2.5), (3, 2.0)]
    settings: Any = found.Tensors("settings/text_summary")[0]
    assert b"| system | a &#124; b |" in settings.tensor_proto.string_val[0]
    assert (folder / "files" / "plug" / "README.md").read_text() == "a card"


@pytest.mark.parametrize(
    ("track", "variable"), [("mlflow", "MLFLOW_TRACKING_URI"), ("tensorboard", "TENSORBOARD_LOGGING_DIR")]
)
def test_the_environment_must_say_where_a_tracker_is(
    track: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UsageError, match=f"set {variable} to"):
        trackers.start(track, RUN)


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(UsageError, match=r"needs the package mlflow: pip install 'persona-plug\[mlflow\]'"):
        trackers.start("mlflow", RUN)
