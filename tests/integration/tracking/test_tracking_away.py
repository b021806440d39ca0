"""MLflow goes away, misbehaves and comes back: work does not wait, and every point arrives once.

A real server behind a proxy that misbehaves for it; and, killed for real, with a whole run that goes on meanwhile.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from faulty_store import faulty_proxy
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from PIL import Image

from dreambooth.config.settings import TrackingConfig
from dreambooth.miniature import subject_dir
from pipelines.plan.doctor import probe_tracking
from pipelines.storage.publications import published
from pipelines.tracking.client import connect, quietly
from pipelines.tracking.line import Away
from pipelines.tracking.runs import track


class Tracker:
    """A proxy before MLflow; `fate` is what becomes of calls."""

    fate = "passes"
    count = 0

    def decide(self) -> str:
        self.count += 1
        if self.fate == "every third answer lost":
            return "passes" if self.count % 3 else "answer lost"
        return self.fate


@pytest.fixture(scope="module")
def server(tracking_in: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    tracking_in(folder)
    server = MlflowServer(folder)
    server.start()
    with track(TrackingConfig(uri=server.uri), run_name="first"):
        pass  # a server's first answers take seconds
    yield server
    server.kill()


@pytest.fixture
def tracker(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Tracker, TrackingConfig]]:
    """Requests may take three seconds here, so callers wait for six."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    tracker = Tracker()
    with faulty_proxy(server.host, tracker.decide) as address:
        yield tracker, TrackingConfig(uri=address)


@pytest.fixture
def mortal(tracking_in: Callable[[Path], str], tmp_path: Path) -> Iterator[MlflowServer]:
    """A server of its own, to be killed."""
    tracking_in(tmp_path)
    server = MlflowServer(tmp_path)
    server.start()
    yield server
    with suppress(ProcessLookupError):
        server.kill()


@pytest.fixture(scope="module")
def client(server: MlflowServer) -> MlflowClient:
    return connect(server.uri)


def points(client: MlflowClient, run_id: str, metric: str = "loss") -> list[tuple[int, float]]:
    with quietly():
        return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def pictures(client: MlflowClient, run_id: str) -> list[str]:
    with quietly():
        return [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]


@pytest.mark.parametrize(
    "fate",
    [
        "503",
        "401",
        "silent",
        *(pytest.param(fate, marks=pytest.mark.recovery) for fate in ("500", "429", "403", "late")),
    ],
)
def test_a_server_that_misbehaves_in_mid_run_holds_nothing_up_and_gets_all_later(
    fate: str, tracker: tuple[Tracker, TrackingConfig], client: MlflowClient
) -> None:
    proxy, config = tracker
    picture, key = Image.new("RGB", (64, 64), "teal"), f"rex-{fate}"
    with track(config, run_name="rex", params={"steps": 40}, resume_key=key) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        run.flush()
        run_id = run.run_id
        proxy.fate = fate
        began = time.monotonic()
        for step in range(2, 40):
            run.log_metrics({"loss": 1 / step}, step=step)
            run.flush()
        run.log_image(picture, "samples", step=40)
        run.log_table([{"subject": "rex", "seconds": 1.5}], "subjects.json")
        run.set_tags({"subject": "rex"})
        assert time.monotonic() - began < 1.0
        missing = run.end("FINISHED")
        assert isinstance(missing, Away), missing
        assert time.monotonic() - began < 40.0
    proxy.fate = "passes"
    with track(config, run_name="rex", params={"steps": 40}, resume_key=key) as again:
        assert again.run_id == run_id
        again.log_missing("loss", [(step, {"loss": 1 / step}) for step in range(1, 41)])
        again.log_image(picture, "samples", step=40)
        again.log_table([{"subject": "rex", "seconds": 1.5}], "subjects.json")
        assert again.end("FINISHED") is None
    assert points(client, run_id) == [(step, 1 / step) for step in range(1, 41)]
    assert len(pictures(client, run_id)) == 1
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize("fate", ["503", "every third answer lost"])
def test_a_server_that_comes_back_within_the_run_gets_every_point_once(
    fate: str, tracker: tuple[Tracker, TrackingConfig], client: MlflowClient
) -> None:
    proxy, config = tracker
    proxy.fate = fate
    with track(config, run_name="rex", params={"steps": 40}, resume_key=f"back-{fate}") as run:
        for step in range(1, 30):
            run.log_metrics({"loss": 1 / step}, step=step)
            run.flush()
        run.log_image(Image.new("RGB", (64, 64), "teal"), "samples", step=29)
        run.log_table([{"subject": "rex"}, {"subject": "tim"}], "subjects.json")
        if fate == "503":
            threading.Timer(1.5, setattr, (proxy, "fate", "passes")).start()
        assert run.end("FINISHED") is None
    with quietly():
        experiment = client.get_experiment_by_name(config.experiment)
        assert experiment is not None
        found = client.search_runs([experiment.experiment_id], f"tags.`dreambooth.resume_key` = 'back-{fate}'")
        assert [one.info.run_id for one in found] == [run.run_id]
        assert points(client, run.run_id) == [(step, 1 / step) for step in range(1, 30)]
        assert len(pictures(client, run.run_id)) == 1
        table = json.loads(Path(client.download_artifacts(run.run_id, "subjects.json")).read_text())
        assert table == {"columns": ["subject"], "data": [["rex"], ["tim"]]}


def test_a_server_that_is_away_from_the_start_of_the_run(
    tracker: tuple[Tracker, TrackingConfig], client: MlflowClient
) -> None:
    proxy, config = tracker
    proxy.fate = "503"
    began = time.monotonic()
    with track(config, run_name="rex", params={"steps": 40}, resume_key="never") as run:
        assert run.known_id is None
        assert run.hint == config.uri
        assert time.monotonic() - began < 1.0
        assert isinstance(run.end("FINISHED"), Away)
    assert time.monotonic() - began < 40


def test_what_one_call_is_refused_is_said_and_the_rest_arrives(
    tracker: tuple[Tracker, TrackingConfig], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # a slow machine's server is not away
    _, config = tracker
    with track(config, run_name="rex", resume_key="refused") as run:
        run.log_params({"a name that/is:no<good>": 1})
        run.log_metrics({"loss": 0.5}, step=1)
        error = run.end("FINISHED")
    assert error is not None
    assert "a name that/is:no<good>" in str(error)
    assert points(client, run.run_id) == [(1, 0.5)]


def test_the_doctor_leaves_a_server_as_it_was(
    tracker: tuple[Tracker, TrackingConfig], client: MlflowClient, make_config: Any
) -> None:
    _, config = tracker
    assert "takes runs and models" in probe_tracking(make_config(tracking__uri=config.uri))
    assert not client.search_registered_models(filter_string="name LIKE 'dreambooth-doctor%'")
    experiment = client.get_experiment_by_name("dreambooth-doctor")
    assert experiment is not None
    assert not client.search_runs([experiment.experiment_id])


@pytest.mark.recovery
def test_a_run_whose_server_is_killed_ends_in_seconds_and_the_same_command_completes_it(
    mortal: MlflowServer, working_folder: Path
) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "run", "--images", str(subject_dir("coral-car")), "--quiet"]
    for setting in (
        f"tracking.uri={mortal.uri}",
        "train.max_train_steps=30",
        "train.validate_every=10",
        "prior.num_class_images=8",
        "evaluation.num_inference_steps=2",
        "evaluation.images_per_prompt=1",
        "storage.root=out",
    ):
        command += ["--set", setting]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}

    def give() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, cwd=working_folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    first = give()
    run_folder = working_folder / "out" / "coral-car"
    deadline = time.monotonic() + 400
    while not list((run_folder / "validation").rglob("*.png")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    mortal.kill()
    said = first.communicate(timeout=500)[0]
    assert first.returncode == 3, said
    assert "the model is published, but MLflow has no model of this run yet" in said
    assert "to complete  dreambooth run --images" in said
    assert "Traceback" not in said
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["wall_seconds"]["register"] < 60
    print("seconds that the dead server cost:", summary["wall_seconds"]["register"])

    mortal.start()
    began = time.monotonic()
    again = give()
    said = again.communicate(timeout=500)[0]
    assert again.returncode == 0, said
    print("seconds to complete it:", round(time.monotonic() - began, 1))
    summary = json.loads((run_folder / "summary.json").read_text())
    assert (summary["registered_model"], summary["version"], summary["untracked"]) == ("dreambooth-coral-car", 1, None)
    client, run_id = connect(mortal.uri), summary["mlflow"]["run_id"]
    assert [step for step, _ in points(client, run_id, "train/loss")] == list(range(1, 31))
    validated = sorted(path for path in pictures(client, run_id) if "validation" in path)
    assert len(validated) == len(list((run_folder / "validation").rglob("*.png"))) > 2
    assert len(client.search_model_versions("name = 'dreambooth-coral-car'")) == 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("away", ["from the start", "in the middle"])
def test_a_batch_whose_server_is_away_publishes_all_and_the_same_command_registers_it(
    away: str, mortal: MlflowServer, working_folder: Path
) -> None:
    names = ("coral-car", "navy-dog")
    table = {
        "prior": {"prior_loss_weight": 0},
        "train": {"max_train_steps": 30},
        "evaluation": {"enabled": False},
        "storage": {"root": "out"},
        "tracking": {"uri": mortal.uri},
        "cluster": {"lanes": 1},
        "subjects": [
            {"name": name, "class_noun": name.rsplit("-", 1)[-1], "instance_images": str(subject_dir(name))}
            for name in names
        ],
    }
    (working_folder / "pets.yaml").write_text(yaml.safe_dump(table))
    command = [sys.executable, "-m", "pipelines.cli", "batch", "pets.yaml"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}

    def give() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, cwd=working_folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    first = give()
    # Before work starts, an address that doesn't answer is refused: the first moment to lose it is after that.
    begun = "out/batches/*/subjects/*.json" if away == "from the start" else f"out/{names[0]}/model/*/manifest.json"
    deadline = time.monotonic() + 400
    while not list(working_folder.glob(begun)):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mortal.kill()
    said = first.communicate(timeout=500)[0]
    assert first.returncode == 3, said
    assert re.search(r"MLflow lacks [12] published subjects? of this batch", said), said
    assert "to complete  dreambooth batch pets.yaml" in said
    assert "Traceback" not in said
    assert all(published(f"{working_folder}/out/{name}/model") is not None for name in names)

    refused = give()
    said = refused.communicate(timeout=500)[0]
    assert refused.returncode == 2, said
    assert mortal.uri in said

    mortal.start()
    again = give()
    said = again.communicate(timeout=500)[0]
    assert again.returncode == 0, said
    assert "2: 2 done" in said
    client = connect(mortal.uri)
    for name in names:
        [version] = client.search_model_versions(f"name = 'dreambooth-{name}'")
        assert int(version.version) == 1
        assert [step for step, _ in points(client, version.run_id, "train/loss")] == list(range(1, 31))
