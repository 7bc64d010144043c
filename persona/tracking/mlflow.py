"""MLflow as a tracker: MLFLOW_TRACKING_URI says where, MLFLOW_EXPERIMENT_NAME under which experiment.

Other settings of its client, such as MLFLOW_TRACKING_TOKEN, come from the environment, too.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from persona.errors import TrackingError, UsageError
from persona.tracking.tracker import Point, TrackedRun

PACKAGE = "mlflow"
_KEY = "persona_plug.key"
_LONGEST_VALUE = 500  # characters of a parameter that every version of the server accepts
_SETTINGS_TOGETHER, _NUMBERS_TOGETHER = 100, 1000  # what a server accepts in one request


def start(run: TrackedRun) -> "MLflow":
    """The run with this key, or a new one. Raises as `tracker.start`."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise UsageError("--track mlflow: set MLFLOW_TRACKING_URI to the address of the server, like http://host:5000")
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")  # stdout is for a job's result
    client = MlflowClient(uri)
    with _errors():
        experiment = _experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME", "persona-plug"))
        found = client.search_runs([experiment], filter_string=f"tags.`{_KEY}` = '{run.key}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            tags = {_KEY: run.key, "persona_plug.job": run.job}
            name = f"{run.job}-{run.name}"  # the list of runs shows no tags
            run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    return MLflow(client, uri, experiment, run_id)


class MLflow:
    """A run on an MLflow server."""

    def __init__(self, client: Any, uri: str, experiment: str, run_id: str) -> None:
        """Use `start`."""
        self._client = client
        self._run_id = run_id
        self.place = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}" if "://" in uri else uri

    def steps(self, name: str) -> set[int]:
        """See `Tracker`."""
        with _errors():
            return {point.step for point in self._client.get_metric_history(self._run_id, name)}

    def log_settings(self, settings: Mapping[str, str]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Param

        with _errors():
            known = self._client.get_run(self._run_id).data.params  # a parameter cannot be changed
            new = [Param(name, value[:_LONGEST_VALUE]) for name, value in settings.items() if name not in known]
            for start in range(0, len(new), _SETTINGS_TOGETHER):
                self._client.log_batch(self._run_id, params=new[start : start + _SETTINGS_TOGETHER])

    def log_numbers(self, points: Sequence[Point]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = [Metric(name, value, now, step) for step, values in points for name, value in values.items()]
        with _errors():
            for start in range(0, len(numbers), _NUMBERS_TOGETHER):
                self._client.log_batch(self._run_id, metrics=numbers[start : start + _NUMBERS_TOGETHER])

    def log_files(self, folder: Path, name: str) -> None:
        """See `Tracker`."""
        with _errors():
            self._client.log_artifacts(self._run_id, os.fspath(folder), artifact_path=name)

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        with _errors():
            self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")


def _experiment(client: Any, name: str) -> str:
    """The id of an experiment, which is created if there is none of that name."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    return str(found.experiment_id)


@contextmanager
def _errors() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # the errors of `requests` are OSErrors
        raise TrackingError(f"MLflow at MLFLOW_TRACKING_URI: {str(error).splitlines()[0][:300]}") from error
