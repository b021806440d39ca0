import http.server
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from local_nodes import free_port
from mlflow import MlflowClient
from PIL import Image

from dreambooth.config.settings import TrackingConfig
from dreambooth.errors import InputError
from pipelines.cluster.certificates import make_authority, make_node_certificate
from pipelines.tracking.client import connect
from pipelines.tracking.experiments import RESUME_TAG
from pipelines.tracking.runs import check_tracking, track

INFRA = Path(__file__).parents[3] / "infra"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """One database for all tests here: making its tables takes seconds."""
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db")


@pytest.fixture(scope="module")
def client(config: TrackingConfig) -> MlflowClient:
    return connect(check_tracking(config))


def test_a_run_keeps_curves_pictures_settings_and_files(
    config: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    picture = tmp_path / "sheet.png"
    Image.new("RGB", (96, 64), "teal").save(picture)
    repeats = {"é (1).jpg": 3}
    params = {"train": {"learning_rate": 1e-4, "ema_decay": None}, "images": {"repeats": repeats}, "note": "x" * 7000}
    with track(config, run_name="rex", params=params, tags={"subject": "rex"}) as run:
        for step in range(600):
            run.log_metrics({"loss": 1 / (step + 1), "learning_rate": 1e-4}, step=step)
        run.log_image(Image.new("RGB", (64, 64)), "samples: beach", step=200)
        run.log_image(picture, "samples/sheet", step=200)
        run.log_artifact(picture, "pictures")
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "rex"
    assert stored.data.tags["subject"] == "rex"
    assert stored.data.params["train.learning_rate"] == "0.0001"
    assert stored.data.params["train.ema_decay"] == "None"
    assert stored.data.params["images.repeats"] == str(repeats)
    assert stored.data.params["note"] == "x" * 5999 + "…"
    history = client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / (step + 1)) for step in range(600)]
    images = [item.path for item in client.list_artifacts(run.run_id, "images") if item.path.endswith(".png")]
    assert sorted(path.split("+")[0] for path in images) == ["images/samples_ beach", "images/samples~sheet"]
    assert [item.path for item in client.list_artifacts(run.run_id, "pictures")] == ["pictures/sheet.png"]
    whole = json.loads(Path(client.download_artifacts(run.run_id, "params.json")).read_text())
    assert whole["note"] == "x" * 7000


def test_artifacts_lie_beside_the_database(config: TrackingConfig, client: MlflowClient, working_folder: Path) -> None:
    with track(config, run_name="rex") as run:
        run.log_artifact(_text_file(working_folder))
    assert config.uri is not None
    root = Path(config.uri.removeprefix("sqlite:///")).parent
    assert len(list((root / "mlruns" / "dreambooth" / run.run_id).rglob("note.txt"))) == 1
    assert [path.name for path in working_folder.iterdir()] == ["note.txt"]


def test_how_to_look_at_a_run_is_said(config: TrackingConfig) -> None:
    with track(config, run_name="rex") as run:
        assert run.url is None
        run.flush()
        assert run.run_id
        [command, page] = run.hint.split("  # ")
        assert command == f"mlflow ui --backend-store-uri {config.uri}"
        assert re.fullmatch(r"http://127.0.0.1:5000/#/experiments/\d+/runs\?workflowType=machine_learning", page)


def test_an_unfinished_run_is_taken_up_again(config: TrackingConfig, client: MlflowClient) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):  # noqa: PT012, SIM117
        with track(config, run_name="rex", params={"steps": 200}, resume_key="rex-1234") as first:
            first.log_metrics({"loss": 0.5}, step=1)
            raise RuntimeError("out of memory")
    assert client.get_run(first.run_id).info.status == "FAILED"
    with track(config, run_name="rex", params={"steps": 200, "more": 1}, resume_key="rex-1234") as second:
        assert client.get_run(second.run_id).info.status == "RUNNING"
        second.log_metrics({"loss": 0.4}, step=2)
    assert second.run_id == first.run_id
    stored = client.get_run(second.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"steps": "200", "more": "1"}
    assert stored.data.tags[RESUME_TAG] == "rex-1234"
    assert len(client.get_metric_history(second.run_id, "loss")) == 2
    with track(config, run_name="rex", resume_key="rex-1234") as third:
        assert third.run_id != first.run_id
    with track(config, run_name="rex", resume_key="rex-5678") as other:
        assert other.run_id not in (first.run_id, third.run_id)


def test_an_interrupted_run_is_marked_killed(config: TrackingConfig, client: MlflowClient) -> None:
    with pytest.raises(KeyboardInterrupt), track(config, run_name="rex", resume_key="stopped") as run:
        raise KeyboardInterrupt
    assert client.get_run(run.run_id).info.status == "KILLED"
    with track(config, run_name="rex", resume_key="stopped") as again:
        assert again.run_id == run.run_id


def test_nothing_is_printed_and_the_default_is_the_working_folder(working_folder: Path) -> None:
    script = (
        "from dreambooth.config.settings import TrackingConfig\n"
        "from pipelines.tracking.runs import check_tracking, track\n"
        "config = TrackingConfig()\n"
        f"assert check_tracking(config) == 'sqlite:///{working_folder}/mlflow.db'\n"
        "with track(config, run_name='rex', params={'a': 1}) as run:\n"
        "    run.log_metrics({'loss': 1.0}, step=0)\n"
    )
    checkout = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", script], env=_environment(checkout), capture_output=True, text=True, check=True
    )
    assert result.stdout == ""
    assert result.stderr == ""
    assert (working_folder / "mlflow.db").is_file()


def test_what_cannot_be_tracked_to_is_refused(tmp_path: Path, config: TrackingConfig, client: MlflowClient) -> None:
    (tmp_path / "notes.txt").write_text("a file, not a folder")
    for uri, message in {
        "./mlruns": "a folder; expected a database",
        f"file://{tmp_path}": "a folder; expected a database",
        f"sqlite:///{tmp_path}/notes.txt/mlflow.db": "can't be written",
        "http://127.0.0.1:9": "nothing answers at 127.0.0.1:9",
        "postgresql://me:secret@127.0.0.1:9/mlflow": r"://me:\*\*\*@127.0.0.1:9/mlflow: nothing answers",
        "nosuch://host": "no MLflow tracking at nosuch://host",
    }.items():
        begin = time.monotonic()
        with pytest.raises(InputError, match=message):
            check_tracking(TrackingConfig(uri=uri))
        assert time.monotonic() - begin < 10
    (tmp_path / "notes.db").write_text("not a database at all" * 100)
    with pytest.raises(InputError, match="isn't an SQLite database"):
        check_tracking(TrackingConfig(uri=f"sqlite:///{tmp_path}/notes.db"))
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(InputError, match="'gone' was deleted"):
        check_tracking(TrackingConfig(uri=config.uri, experiment="gone"))


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that gives every request the same answer."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("answering", "message"), [(401, "refuses the credentials"), (503, "503")], indirect=["answering"]
)
def test_a_server_that_refuses_is_noticed_at_once(answering: str, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InputError, match=message):
        check_tracking(TrackingConfig(uri=answering))
    assert time.monotonic() - begin < 10


def _text_file(folder: Path) -> Path:
    path = folder / "note.txt"
    path.write_text("a note")
    return path


def _environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "default"}


def test_a_server_that_talks_tls_as_in_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_authority(tmp_path / "authority")
    make_node_certificate(tmp_path / "authority", tmp_path / "tls", [])
    [deployment] = [
        each
        for each in yaml.safe_load_all((INFRA / "kubernetes" / "base" / "mlflow.yaml").read_text())
        if each["kind"] == "Deployment"
    ]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    [options] = [word for word in container["args"] if word.startswith("--uvicorn-opts=")]
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        options.replace(" /tls/", f" {tmp_path}/tls/"),
    ]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            config = TrackingConfig(uri=f"https://localhost:{port}")
            trusting = ssl.create_default_context(cafile=tmp_path / "tls" / "ca.crt")
            deadline = time.monotonic() + 90
            while not _answers(f"{config.uri}/health", trusting):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
            with pytest.raises(InputError, match="certificate"):
                check_tracking(config)
            monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "tls" / "ca.crt"))
            with track(config, run_name="rex", params={"steps": 2}) as run:
                run.log_metrics({"loss": 0.5}, step=1)
            assert connect(config.uri).get_run(run.run_id).data.metrics["loss"] == 0.5
        finally:
            server.terminate()


def _answers(url: str, context: ssl.SSLContext) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
