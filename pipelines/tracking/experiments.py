"""Find or make an experiment, and find the unfinished run in it that a command takes up again."""

from urllib.parse import quote

from pipelines.tracking import client as _client  # noqa: F401 - before MLflow, which it silences
from pipelines.tracking.database import database_path

from mlflow import MlflowClient  # isort: skip
from mlflow.entities import Run  # isort: skip
from mlflow.exceptions import MlflowException  # isort: skip

RESUME_TAG = "dreambooth.resume_key"


def experiment_id_of(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment at a tracking address, made if it isn't there."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None
    if (database := database_path(uri)) is not None:
        # Beside the database, not in whatever folder the first run happened to start from.
        location = (database.parent / "mlruns" / quote(name, safe="")).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.get_experiment_by_name(name)  # by another command, meanwhile
    if made is None:
        raise RuntimeError(f"the MLflow experiment {name!r} was created and then deleted")
    return str(made.experiment_id)


def unfinished_run(client: MlflowClient, experiment_id: str, resume_key: str) -> Run | None:
    """The newest run of a `resume_key` that isn't finished, or None. Raises ValueError for a key with a quote."""
    if "'" in resume_key:
        raise ValueError(f"resume_key must not hold a quote, got {resume_key!r}")
    runs = client.search_runs([experiment_id], f"tags.`{RESUME_TAG}` = '{resume_key}'", order_by=["start_time DESC"])
    return next((run for run in runs if run.info.status != "FINISHED"), None)
