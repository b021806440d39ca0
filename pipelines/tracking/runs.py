"""One MLflow run per pipeline run, written by one process: the driver.

    with track(config.tracking, run_name="rex", params=config.model_dump(), tags={...}, resume_key=key) as run:
        run.log_metrics({"train/loss": 0.1}, step=1)
        run.log_image(picture, "samples", step=200)
    print(run.hint)

No work waits for MLflow or fails because of it: where it is away, what is logged is sent later. `run.end` says what it
still lacks; all of that lies in the run's own folder too, so the same command makes up for it. A run that was killed is
taken up again by its `resume_key`: one training is one curve.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dreambooth.config.addresses import shown
from dreambooth.config.settings import TrackingConfig
from dreambooth.errors import InputError
from pipelines.tracking.client import explain, mlflow_line, prove_connection, resolve_tracking_uri
from pipelines.tracking.database import SQLITE
from pipelines.tracking.inputs import Images
from pipelines.tracking.line import Away
from pipelines.tracking.tracked_run import TrackedRun

# Import after tracking.client, which silences MLflow.
from mlflow.exceptions import MlflowException  # isort: skip


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
    client = prove_connection(uri)
    if client is None:
        return uri
    line = mlflow_line()
    try:
        experiment = line.wait(line.post(lambda: client.get_experiment_by_name(config.experiment), once=True))
    except (Away, MlflowException) as error:
        raise InputError(f"no MLflow tracking at {shown(uri)}: {explain(error)}") from error
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise InputError(
            f"the MLflow experiment {config.experiment!r} was deleted; set tracking.experiment to another name, or run "
            f"'mlflow experiments restore --experiment-id {experiment.experiment_id}'"
        )
    return uri


def begin(
    config: TrackingConfig,
    *,
    run_name: str,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, object] | None = None,
    inputs: Sequence[Images] = (),
    resume_key: str | None = None,
    parent: str | None = None,
) -> TrackedRun:
    """Start a run as `track` does; whoever calls it ends it."""
    run = TrackedRun(resolve_tracking_uri(config.uri))
    run.begin(config, run_name, resume_key, parent)
    run.log_params(params or {})
    run.set_tags(tags or {})
    if inputs:
        run.log_inputs([images.as_input() for images in inputs])
    return run


@contextlib.contextmanager
def track(
    config: TrackingConfig,
    *,
    run_name: str,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, object] | None = None,
    inputs: Sequence[Images] = (),
    resume_key: str | None = None,
    parent: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[TrackedRun]:
    """Start a run, or take up the unfinished one of the same `resume_key`; it ends FINISHED, FAILED or KILLED.

    With `parent`, a run's id, it is shown nested in that run. `say` is called when MLflow goes away and comes back.
    """
    if say is not None:
        mlflow_line().say = say
    run = begin(
        config, run_name=run_name, params=params, tags=tags, inputs=inputs, resume_key=resume_key, parent=parent
    )
    try:
        yield run
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except BaseException:
        run.end("FAILED")
        raise
    finally:
        if say is not None:
            mlflow_line().say = None
    run.end("FINISHED")
