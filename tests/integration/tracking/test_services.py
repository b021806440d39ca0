"""`make services`: MLflow with TLS and a password, on Postgres where the machine has it, artifacts in a real store."""

import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from plain_mlflow import begin_loading, drawn, refused
from s3fs import S3FileSystem
from served import facts_of

from dreambooth.config.settings import TrackingConfig
from dreambooth.errors import InputError
from pipelines.apps.garbage import find_leftovers, remove_leftovers
from pipelines.storage.files import remove, write_bytes
from pipelines.storage.patient_s3 import PatientS3
from pipelines.storage.publications import publish
from pipelines.tracking.client import connect, default_tracking
from pipelines.tracking.registry import register
from pipelines.tracking.runs import check_tracking, track

# Only after tracking.client, which silences MLflow.
import mlflow  # isort: skip

LAUNCHER = Path(__file__).parents[3] / "infra" / "services" / "services.py"


def services(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    arguments = [sys.executable, str(LAUNCHER), command, "--folder", str(folder)]
    return subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=400)


def variables(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(line.removeprefix("export ").split("=", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Not under pytest's own folder, which only root may enter: Postgres runs as another user then."""
    made = Path(tempfile.mkdtemp(prefix="services-"))
    yield made
    services("stop", made)
    shutil.rmtree(made)


def test_a_run_ends_up_in_them_and_survives_a_restart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leading = variables(services("start", folder))
    assert services("status", folder).returncode == 0
    # The password of MLflow is all that a client has: artifacts go through it.
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, leading[name])
    with pytest.raises(InputError, match="certificate"):
        check_tracking(TrackingConfig())
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", leading["MLFLOW_TRACKING_SERVER_CERT_PATH"])
    assert check_tracking(TrackingConfig()) == leading["MLFLOW_TRACKING_URI"]
    Path("sheet.txt").write_text("five instance images")
    with track(TrackingConfig(), run_name="rex") as run:
        run.log_metrics({"loss": 0.5}, step=1)
        run.log_artifact(Path("sheet.txt"))

    trusting = ssl.create_default_context(cafile=leading["MLFLOW_TRACKING_SERVER_CERT_PATH"])
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{leading['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search", context=trusting)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(InputError, match="refuses the credentials"):
        check_tracking(TrackingConfig())
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", leading["MLFLOW_TRACKING_PASSWORD"])

    assert services("stop", folder).returncode == 0
    assert services("status", folder).returncode == 1
    assert variables(services("start", folder)) == leading
    assert run.logged_steps("loss") == {1}
    with default_tracking(leading["MLFLOW_TRACKING_URI"]):
        assert mlflow.artifacts.load_text(f"runs:/{run.run_id}/sheet.txt") == "five instance images"
    secrets = {value for name, value in leading.items() if name.endswith(("PASSWORD", "KEY"))}
    logs = "".join(path.read_text(errors="replace") for path in folder.rglob("*.log"))
    assert not [secret for secret in secrets if secret in logs]


def test_a_version_on_postgres_refers_to_a_publication_in_the_store_past_gc_until_it_is_deleted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Path, tmp_path: Path
) -> None:
    for name, value in variables(services("start", folder)).items():
        monkeypatch.setenv(name, value)
    for kind in (S3FileSystem, PatientS3):
        kind.clear_instance_cache()  # they keep the address and credentials that they were opened with
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    uri = check_tracking(TrackingConfig())
    manifest = publish(tiny_pipeline, "s3://dreambooth/rex/model", metadata={})
    with track(TrackingConfig(), run_name="rex") as run:
        version = register(
            run_id=run.run_id,
            tracking_uri=uri,
            model=manifest,
            name="dreambooth-rex",
            tags={},
            identifier="zqx",
            class_noun="dog",
            result_key="rex",
            served=facts_of(tiny_pipeline),
            num_inference_steps=2,
            guidance_scale=4.0,
        )
    killed = "s3://dreambooth/rex/model/20200101T000000000000Z-0123abcd"
    write_bytes(f"{killed}/unet/config.json", b"{}")
    leftovers = find_leftovers("s3://dreambooth/rex", older_than=timedelta(0))
    assert [leftover.uri for leftover in leftovers] == [killed]
    remove_leftovers(leftovers)
    prompt = "a photo of [V] dog"
    assert drawn(begin_loading(version.uri, prompt, tracking_uri=uri, folder=tmp_path / "plain")).size == (64, 64)
    remove(manifest.uri)
    elsewhere = {"DREAMBOOTH_CACHE": str(tmp_path / "another machine")}
    said = refused(begin_loading(version.uri, prompt, tracking_uri=uri, folder=tmp_path / "plain", variables=elsewhere))
    assert f"refers to the publication {manifest.uri}: it isn't there" in said
    client = connect(uri)
    client.delete_model_version(version.name, str(version.version))
    client.delete_logged_model(version.model_id)
    with pytest.raises(MlflowException, match="not found"):
        client.get_model_version(version.name, str(version.version))
    for kind in (S3FileSystem, PatientS3):
        kind.clear_instance_cache()
