"""One MLflow run per pipeline run, written by one process: the driver.

    with track(config.tracking, run_name="rex", params=config.model_dump(), tags={...}, resume_key=key) as run:
        run.log_metrics({"loss": 0.1}, step=1)
        run.log_image(picture, "samples", step=200)
    print(run.hint)

A run that was killed is taken up again by its `resume_key`, so that one training is one curve.
"""

import contextlib
import json
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from dreambooth.addresses import shown
from dreambooth.config import TrackingConfig
from dreambooth.errors import InputError
from pipelines.mlflow_client import (
    SQLITE,
    check_connection,
    connect,
    quietly,
    resolve_tracking_uri,
)

# Only after mlflow_client has told MLflow to be silent.
from mlflow import MlflowClient  # isort: skip
from mlflow.entities import Metric, Param, Run, RunTag  # isort: skip

RESUME_TAG = "dreambooth.resume_key"
_PARENT_TAG = "mlflow.parentRunId"
_LONGEST_PARAM = 6000
_LONGEST_TAG = 8000
_FLUSH_SECONDS = 2.0  # a write takes some 10 ms, and training steps can be shorter than that
_FLUSH_COUNT = 500  # of the 1000 that MLflow takes at once
_PARAMS_AT_ONCE = 100


def check_tracking(config: TrackingConfig, *, nodes: int = 1) -> str:
    """Resolve the tracking address and prove within seconds that it answers.

    Raises InputError when it can't be reached or written, refuses the credentials, the experiment was deleted, or a
    cluster of several `nodes` would keep it in a file.
    """
    uri = resolve_tracking_uri(config.uri)
    if nodes > 1 and uri.startswith(SQLITE):
        raise InputError(
            f"the cluster has {nodes} nodes, but MLflow would be kept in {uri}, a file on whichever of them the driver "
            f"runs on; start 'mlflow server' where all can reach it, and set tracking.uri (or MLFLOW_TRACKING_URI) to "
            f"its address, such as http://HEAD:5000"
        )
    client = check_connection(uri)
    with quietly():
        experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise InputError(
            f"the MLflow experiment {config.experiment!r} was deleted; set tracking.experiment to another name, or run "
            f"'mlflow experiments restore --experiment-id {experiment.experiment_id}'"
        )
    return uri


class TrackedRun:
    """A running MLflow run; made by `track`."""

    def __init__(self, client: MlflowClient, uri: str, run: Run) -> None:
        """Take up a run that exists."""
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.tracking_uri = uri
        self._client = client
        self._pending: list[Metric] = []
        self._flushed = time.monotonic()
        self._lock = threading.Lock()

    @property
    def url(self) -> str | None:
        """The run's page, where the tracking address is a server."""
        if not self.tracking_uri.startswith("http"):
            return None
        return f"{shown(self.tracking_uri)}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    @property
    def hint(self) -> str:
        """How to look at the run: its page, or the command that serves it."""
        return self.url or f"mlflow ui --backend-store-uri {shown(self.tracking_uri)}"

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add points to curves; they are written every two seconds, and at the end."""
        now = int(time.time() * 1000)
        with self._lock:
            self._pending += [Metric(name, float(value), now, step) for name, value in metrics.items()]
            due = len(self._pending) >= _FLUSH_COUNT or time.monotonic() - self._flushed > _FLUSH_SECONDS
        if due:
            self.flush()

    def flush(self) -> None:
        """Write the points that wait."""
        with self._lock, quietly():
            while self._pending:
                self._client.log_batch(self.run_id, metrics=self._pending[:_FLUSH_COUNT], synchronous=True)
                del self._pending[:_FLUSH_COUNT]
            self._flushed = time.monotonic()

    def logged_steps(self, metric: str) -> set[int]:
        """The steps that a curve has points at."""
        self.flush()
        with quietly():
            return {point.step for point in self._client.get_metric_history(self.run_id, metric)}

    def log_image(self, image: Image.Image | Path, key: str, step: int) -> None:
        """Add a picture to the row of pictures named `key`."""
        name = re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)
        if isinstance(image, Path):
            with Image.open(image) as opened:
                image = opened.convert("RGB")
        with quietly():
            self._client.log_image(self.run_id, image, key=name, step=step, synchronous=True)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file with the run."""
        with quietly():
            self._client.log_artifact(self.run_id, str(path), folder)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Keep rows as a table artifact that MLflow shows."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with quietly():
            self._client.log_table(self.run_id, {c: [row.get(c) for row in rows] for c in columns}, name)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Keep settings, nested ones under dotted names; those the run already has stay as they are.

        A value longer than MLflow takes is cut, and all values are kept whole in the artifact params.json.
        """
        flat = dict(_flatten(params))
        with quietly():
            known = self._client.get_run(self.run_id).data.params
            new = [Param(name, _cut(value, _LONGEST_PARAM)) for name, value in flat.items() if name not in known]
            for start in range(0, len(new), _PARAMS_AT_ONCE):
                self._client.log_batch(self.run_id, params=new[start : start + _PARAMS_AT_ONCE], synchronous=True)
        if any(len(value) > _LONGEST_PARAM for value in flat.values()):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "params.json")
                path.write_text(json.dumps(flat, indent=2, ensure_ascii=False) + "\n")
                self.log_artifact(path)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the run; a tag that is there already gets the new value."""
        with quietly():
            pairs = [RunTag(name, _cut(str(value), _LONGEST_TAG)) for name, value in tags.items()]
            self._client.log_batch(self.run_id, tags=pairs, synchronous=True)

    def end(self, status: str) -> None:
        """Write what waits and set the status: FINISHED, FAILED or KILLED."""
        try:
            self.flush()
        finally:
            with quietly():
                self._client.set_terminated(self.run_id, status)


@contextlib.contextmanager
def track(
    config: TrackingConfig,
    *,
    run_name: str,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, object] | None = None,
    resume_key: str | None = None,
    parent: str | None = None,
) -> Iterator[TrackedRun]:
    """Start a run, or take up the unfinished one of the same `resume_key`; it ends FINISHED, FAILED or KILLED.

    With `parent`, a run's id, it is shown nested in that run.
    """
    uri = resolve_tracking_uri(config.uri)
    client = connect(uri)
    with quietly():
        experiment_id = _experiment(client, uri, config.experiment)
        unfinished = None if resume_key is None else _unfinished(client, experiment_id, resume_key)
        if unfinished is None:
            first_tags = {} if resume_key is None else {RESUME_TAG: resume_key}
            run = TrackedRun(client, uri, client.create_run(experiment_id, run_name=run_name, tags=first_tags))
        else:
            run = TrackedRun(client, uri, unfinished)
            client.update_run(run.run_id, status="RUNNING")
    try:
        run.log_params(params or {})
        run.set_tags({**(tags or {}), **({} if parent is None else {_PARENT_TAG: parent})})
        yield run
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except BaseException:
        run.end("FAILED")
        raise
    run.end("FINISHED")


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None
    if uri.startswith(SQLITE):
        # Beside the database, not in whatever folder the first run happened to start from.
        database = Path(uri.removeprefix(SQLITE).partition("?")[0])
        location = (database.parent / "mlruns" / quote(name, safe="")).as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _unfinished(client: MlflowClient, experiment_id: str, resume_key: str) -> Run | None:
    quoted = resume_key.replace("'", "")
    if quoted != resume_key:
        raise ValueError(f"resume_key must not hold a quote, got {resume_key!r}")
    runs = client.search_runs([experiment_id], f"tags.`{RESUME_TAG}` = '{resume_key}'", order_by=["start_time DESC"])
    return next((run for run in runs if run.info.status != "FINISHED"), None)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
