"""Jobs on a real Ray cluster with token auth, submitted from outside it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_nodes import Cluster, free_port, started
from replicas import built

from dreambooth.miniature import subject_dir
from dreambooth.models.families import family_of
from pipelines.storage.files import read_json


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("cluster"), (3,)) as cluster:
        yield cluster


@pytest.fixture
def table(tiny_pipeline: Path, tmp_path: Path) -> Path:
    settings: dict[str, Any] = {
        "base_model": str(tiny_pipeline),
        "prior": {"num_class_images": 2, "num_inference_steps": 1},
        # So slow that it can be stopped in the middle.
        "train": {"max_train_steps": 60, "checkpoint_every": 5, "gradient_accumulation_steps": 20},
        "evaluation": {"enabled": False},
        "storage": {"root": str(tmp_path / "out")},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "subjects": [
            {"name": name, "class_noun": "car", "instance_images": str(subject_dir(name))}
            for name in ("coral-car", "lime-car")
        ],
    }
    of_another_family = {
        "name": "teal-bird",
        "class_noun": "bird",
        "identifier": "sks",
        "instance_images": str(subject_dir("teal-bird")),
        "base_model": str(built("flux-dev", tmp_path / "flux")),
        "images.resolution": 64,
        "train.max_train_steps": 2,
        "train.gradient_accumulation_steps": 1,
    }
    settings["subjects"].append(of_another_family)
    path = tmp_path / "cars.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_who_has_no_token_or_a_wrong_one_stays_outside(cluster: Cluster) -> None:
    assert cluster.ask(None) == 401
    assert cluster.ask("0" * 64) == 403
    refused = cluster.dreambooth("jobs", "list", RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode == 2
    assert "refuses the token (403)" in refused.stderr
    # The address that is given counts, whatever variables say.
    welcome = cluster.dreambooth(
        "jobs", "list", RAY_ADDRESS="http://127.0.0.1:9", RAY_API_SERVER_ADDRESS="http://127.0.0.1:9"
    )
    assert welcome.returncode == 0, welcome.stderr
    nameless = cluster.dreambooth("jobs", "list", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    assert nameless.returncode == 2
    assert "requires a token (401)" in nameless.stderr


def test_who_has_no_certificate_stays_outside(cluster: Cluster) -> None:
    def healthy(environment: dict[str, str], seconds: float) -> bool:
        command = [Path(sys.executable).with_name("ray"), "health-check", "--address", cluster.gcs]
        try:
            asked = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:  # Ray goes on trying
            return False
        return asked.returncode == 0

    began = time.monotonic()
    assert healthy(cluster.environment, 60)
    plain = {name: value for name, value in cluster.environment.items() if "TLS" not in name}
    assert not healthy(plain, 3 * (time.monotonic() - began))


@pytest.mark.slow  # Ray tries for fifteen seconds
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refuses the token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}, "requires a token"),
    ],
)
def test_a_driver_that_joins_without_the_token(
    cluster: Cluster, table: Path, environment: dict[str, str], said: str
) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "batch", str(table), "--dry-run", "--address", cluster.gcs]
    joined = subprocess.run(
        command,
        cwd=cluster.folder,
        env=cluster.environment | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert joined.returncode == 2, joined.stderr
    assert f"the Ray cluster at {cluster.gcs} {said}" in joined.stderr


@pytest.mark.slow
def test_a_batch_is_stopped_goes_on_and_is_one_job(cluster: Cluster, table: Path, tmp_path: Path) -> None:
    submit = ("submit", "batch", str(table), "--set", "cluster.lanes=1")
    detached = cluster.dreambooth(*submit, "--detach")
    assert detached.returncode == 0, detached.stderr
    job = detached.stdout.strip()
    assert detached.stderr == f"{job}: submitted\n"
    again = cluster.dreambooth(*submit, "--detach")
    assert "already running" in again.stderr
    deadline = time.monotonic() + 180
    while not list((tmp_path / "out").glob("*/checkpoints/*/*/manifest.json")):
        assert time.monotonic() < deadline, cluster.dreambooth("jobs", "logs", job).stdout
        time.sleep(0.2)
    assert "stopping" in cluster.dreambooth("jobs", "stop", job).stdout
    while cluster.dreambooth("jobs", "status", job).stdout.strip() == "RUNNING":
        assert time.monotonic() < deadline
    assert cluster.dreambooth("jobs", "status", job).stdout.strip() == "STOPPED"

    finished = cluster.dreambooth(*submit)
    assert finished.returncode == 0, finished.stdout + finished.stderr + cluster.log()
    assert f"{job.removesuffix('1')}2: submitted again" in finished.stderr
    assert "3 done" in finished.stdout
    assert read_json(str(tmp_path / "out" / "batches" / "cars" / "summary.json"))["subjects"]["done"] == 3
    of_other = read_json(str(tmp_path / "out" / "teal-bird" / "summary.json"))
    assert family_of(Path(of_other["model_uri"])).pipeline_class == "FluxPipeline"
    resumed = [read_json(str(path))["resumed_from"] for path in (tmp_path / "out").glob("*/training/*.json")]
    assert max(resumed) >= 5
    assert "already done" in cluster.dreambooth(*submit).stderr
    assert job in cluster.dreambooth("jobs", "list").stdout


def test_what_is_not_there_is_named(cluster: Cluster) -> None:
    unknown = cluster.dreambooth("jobs", "logs", "dreambooth-run-0")
    assert unknown.returncode == 2
    assert "no job 'dreambooth-run-0'" in unknown.stderr
    missing = cluster.dreambooth("submit", "batch", "x.yaml", "--env", "NOT_SET_ANYWHERE")
    assert missing.returncode == 2
    assert "NOT_SET_ANYWHERE" in missing.stderr


def test_an_address_where_nothing_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "jobs", "list", "--address", f"http://127.0.0.1:{free_port()}"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode == 2
    assert "nothing answers at http://127.0.0.1" in refused.stderr
