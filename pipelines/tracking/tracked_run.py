"""One MLflow run, written to without waiting: what is logged is put in the process's line of calls (`mlflow_line`)."""

import json
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from dreambooth.config.addresses import shown
from dreambooth.config.settings import TrackingConfig
from pipelines.tracking.client import connect, mlflow_line, quietly
from pipelines.tracking.database import MAKING_SECONDS, database_path
from pipelines.tracking.experiments import RESUME_TAG, experiment_id_of, unfinished_run
from pipelines.tracking.line import Away, Call, chunks, is_refusal, not_twice

# Import after tracking.client, which silences MLflow.
from mlflow import MlflowClient  # isort: skip
from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag  # isort: skip
from mlflow.exceptions import MlflowException  # isort: skip

_T = TypeVar("_T")
_WORKFLOW = "workflowType=machine_learning"  # without it MLflow's pages show traces instead of runs
_LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` listens
_PARENT_TAG = "mlflow.parentRunId"
_LONGEST_PARAM = 6000
_LONGEST_TAG = 8000
_FLUSH_SECONDS = 2.0  # a write takes some 10 ms, and training steps can be shorter than that
_AT_ONCE = 500  # points, of the 1000 that MLflow takes
_MOST_POINTS = 100_000
"""Most points kept while MLflow is away; the training record supplies the others."""
_MOST_CALLS = 100
_TABLES_TAG = "mlflow.loggedArtifacts"  # of MLflow's own pages
_PARAMS_AT_ONCE = 100


class TrackedRun:
    """A running MLflow run; made by `track`. What is logged is sent by another thread, in order, when it can be."""

    def __init__(self, uri: str, run: Run | None = None) -> None:
        """Take up a run that exists, or stand for one that `begin` will start."""
        self.tracking_uri = uri
        self.run = run
        self._client: MlflowClient | None = None
        self._line = mlflow_line()
        self._begun: Call[Run] | None = None
        self._points: list[list[Metric]] = []
        self._flushing = False
        self._flushed = time.monotonic()
        self._lock = threading.Lock()
        self._refused: Exception | None = None
        self._ended = False

    def begin(self, config: TrackingConfig, name: str, resume_key: str | None, parent: str | None) -> None:
        """Start the run, or take up the unfinished one of the same `resume_key`."""
        key = resume_key or secrets.token_hex(8)  # an attempt whose answer was lost may have made it

        def begin() -> Run:
            client = self._connected()
            experiment_id = experiment_id_of(client, self.tracking_uri, config.experiment)
            run = unfinished_run(client, experiment_id, key)
            if run is None:
                with not_twice():
                    run = client.create_run(experiment_id, run_name=name, tags={RESUME_TAG: key})
            elif run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
            if parent is not None:
                client.set_tag(run.info.run_id, _PARENT_TAG, parent)
            self.run = run
            return run

        database = database_path(self.tracking_uri)
        extra = MAKING_SECONDS if database is not None and not database.exists() else 0.0
        self._begun = self._line.post(_quiet(begin), owner=self, extra=extra, alive=self._answers)

    @property
    def run_id(self) -> str:
        """The run's id in MLflow; waits for it, and raises Away when it can't be had."""
        if self.run is None:
            assert self._begun is not None
            self._line.wait(self._begun)
        assert self.run is not None
        return str(self.run.info.run_id)

    @property
    def experiment_id(self) -> str:
        """The id of the run's experiment; waits as `run_id` does."""
        assert self.run_id
        assert self.run is not None
        return str(self.run.info.experiment_id)

    @property
    def known_id(self) -> str | None:
        """The run's id, or None where MLflow has not given one yet."""
        return None if self.run is None else str(self.run.info.run_id)

    @property
    def url(self) -> str | None:
        """The run's page, where the tracking address is a server."""
        if not self.tracking_uri.startswith("http"):
            return None
        address = shown(self.tracking_uri)
        if self.run is None:
            return address
        return f"{address}/#/experiments/{self.run.info.experiment_id}/runs/{self.run.info.run_id}?{_WORKFLOW}"

    @property
    def hint(self) -> str:
        """How to look at the run: its page, or the command that serves it, with that page behind a #."""
        if self.url is not None:
            return self.url
        command = f"mlflow ui --backend-store-uri {shown(self.tracking_uri)}"
        if self.run is None:
            return command
        return f"{command}  # {_LOCAL}/#/experiments/{self.run.info.experiment_id}/runs?{_WORKFLOW}"

    @property
    def behind(self) -> bool:
        """Whether MLflow is so far behind that anything that can be sent later should wait."""
        return self._line.waiting(self) > _MOST_CALLS

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add points to curves; they are sent every two seconds, and at the end."""
        now = int(time.time() * 1000)
        with self._lock:
            if len(self._points) * max(1, len(metrics)) < _MOST_POINTS:
                self._points.append([Metric(name, float(value), now, step) for name, value in metrics.items()])
            due = time.monotonic() - self._flushed > _FLUSH_SECONDS and not self._flushing
        if due:
            self.flush()

    def flush(self) -> None:
        """Send the points that wait."""
        with self._lock:
            self._flushing, self._flushed = True, time.monotonic()
        self._post(self._send_points)

    def log_missing(self, curve: str, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Add the points of those steps at which `curve` has none when all that was logged before has arrived."""
        self.flush()
        now = int(time.time() * 1000)

        def send(client: MlflowClient, run_id: str) -> None:
            known = {point.step for point in client.get_metric_history(run_id, curve)}
            groups = [
                [Metric(name, float(value), now, step) for name, value in metrics.items()]
                for step, metrics in points
                if step not in known
            ]
            for batch in chunks(groups, _AT_ONCE):
                client.log_batch(run_id, metrics=batch, synchronous=True)

        self._post(send)

    def logged_steps(self, metric: str) -> set[int]:
        """The steps that a curve has points at."""
        self.flush()
        history = self.call(lambda client, run_id: client.get_metric_history(run_id, metric))
        return {point.step for point in history}

    def log_image(self, image: Image.Image | Path, key: str, step: int) -> None:
        """Add a picture to the row of pictures named `key`, unless it has one at that step."""
        if isinstance(image, Path):
            with Image.open(image) as opened:
                image = opened.convert("RGB")
        self.log_missing_images({(key, step): lambda: image})

    def log_missing_images(self, pictures: Mapping[tuple[str, int], Callable[[], Image.Image]]) -> None:
        """Add the pictures, each by its row and step, that the run doesn't have."""

        def send(client: MlflowClient, run_id: str) -> None:
            there = [item.path for item in client.list_artifacts(run_id, "images")]
            for (key, step), picture in pictures.items():
                name = re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)
                prefix = f"images/{name.replace('/', '~')}+step+{step}+"  # MLflow's; the small copy comes last
                if not any(path.startswith(prefix) and path.endswith(".webp") for path in there):
                    client.log_image(run_id, picture(), key=name, step=step, synchronous=True)

        if pictures:
            self._post(send, extra=float(len(pictures)))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file with the run, as it is now."""
        content, name = path.read_bytes(), path.name

        def send(client: MlflowClient, run_id: str) -> None:
            with tempfile.TemporaryDirectory() as temporary:
                Path(temporary, name).write_bytes(content)
                client.log_artifact(run_id, str(Path(temporary, name)), folder)

        self._post(send)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Keep rows as a table artifact that MLflow shows, in the place of an earlier one of that name."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        content = json.dumps({"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]})

        def send(client: MlflowClient, run_id: str) -> None:
            client.log_text(run_id, content, name)
            # MLflow's own log_table would add its rows to those of an attempt whose answer was lost.
            known = json.loads(client.get_run(run_id).data.tags.get(_TABLES_TAG, "[]"))
            entry = {"path": name, "type": "table"}
            if entry not in known:
                client.set_tag(run_id, _TABLES_TAG, json.dumps([*known, entry]))

        self._post(send)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Keep settings, nested ones under dotted names; those the run already has stay as they are.

        A value longer than MLflow takes is cut, and all values are kept whole in the artifact params.json.
        """
        flat = dict(_flatten(params))

        def send(client: MlflowClient, run_id: str) -> None:
            known = client.get_run(run_id).data.params
            new = [Param(name, _cut(value, _LONGEST_PARAM)) for name, value in flat.items() if name not in known]
            for start in range(0, len(new), _PARAMS_AT_ONCE):
                client.log_batch(run_id, params=new[start : start + _PARAMS_AT_ONCE], synchronous=True)
            if any(len(value) > _LONGEST_PARAM for value in flat.values()):
                client.log_text(run_id, json.dumps(flat, indent=2, ensure_ascii=False) + "\n", "params.json")

        self._post(send)

    def log_inputs(self, inputs: Sequence[DatasetInput]) -> None:
        """Keep what the run reads; what it has already, by name and digest, stays as it is."""
        self._post(lambda client, run_id: client.log_inputs(run_id, datasets=inputs))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the run; a tag that is there already gets the new value."""
        pairs = [RunTag(name, _cut(str(value), _LONGEST_TAG)) for name, value in tags.items()]
        self._post(lambda client, run_id: client.log_batch(run_id, tags=pairs, synchronous=True))

    def set_version_tags(self, name: str, version: int, tags: Mapping[str, object]) -> None:
        """Set tags of a registered version; a tag that is there already gets the new value."""

        def send(client: MlflowClient, run_id: str) -> None:
            for key, value in tags.items():
                client.set_model_version_tag(name, str(version), key, _cut(str(value), _LONGEST_TAG))

        self._post(send)

    def call(self, operation: Callable[[MlflowClient, str], _T], *, extra: float = 0.0) -> _T:
        """Wait for what only MLflow can answer, when all that was logged before has arrived.

        `operation` takes a client and the run's id, may take `extra` seconds more than others, and may be called again.
        Raises Away, and MlflowException for what MLflow refuses.
        """
        return self._line.wait(self._post(operation, extra=extra, note=False))

    def end(self, status: str) -> Exception | None:
        """Send what waits and set the status: FINISHED, FAILED or KILLED. Returns why MLflow lacks something, if so.

        What it lacks then is not sent any more. A second call does nothing.
        """
        if self._ended:
            return None
        self._ended = True
        self.flush()
        try:
            self.call(lambda client, run_id: client.set_terminated(run_id, status))
        except (Away, MlflowException, LookupError) as error:
            self._line.discard(self)
            return error
        return self._refused

    def _post(self, operation: Callable[[MlflowClient, str], _T], *, extra: float = 0.0, note: bool = True) -> Call[_T]:
        def send() -> _T:
            if self.run is None:
                raise LookupError("the run could not be started")
            return operation(self._connected(), str(self.run.info.run_id))

        call = self._line.post(_quiet(send), owner=self, extra=extra, alive=self._answers)
        if note:
            call.future.add_done_callback(self._note)
        return call

    def _note(self, future: Future[_T]) -> None:
        if isinstance(error := future.exception(), Exception):
            self._refused = self._refused or error

    def _send_points(self, client: MlflowClient, run_id: str) -> None:
        with self._lock:
            points, self._flushing = list(self._points), False
        try:
            for batch in chunks(points, _AT_ONCE):
                client.log_batch(run_id, metrics=batch, synchronous=True)  # of the same time twice is one point
        except Exception as error:
            if not is_refusal(error):
                raise
            self._refused = self._refused or error
        with self._lock:
            del self._points[: len(points)]

    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = connect(self.tracking_uri)
        return self._client

    def _answers(self) -> None:
        self._connected().search_experiments(max_results=1)


def _quiet(operation: Callable[[], _T]) -> Callable[[], _T]:
    def quiet() -> _T:
        with quietly():
            return operation()

    return quiet


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted name; values by file name stay one, as MLflow takes no other alphabet than ours in names."""
    for name, value in params.items():
        if isinstance(value, Mapping) and all(name.isidentifier() and name.isascii() for name in value):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
