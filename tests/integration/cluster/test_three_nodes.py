"""A batch submitted from outside a cluster of three nodes, its data on S3, and a node dies in the middle."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from local_nodes import Cluster, free_port, in_the_middle, kill_node, running_a_lane, started

from dreambooth.miniature import subject_dir
from pipelines.storage import files, publications
from pipelines.tracking.client import connect, quietly

NAMES = ("coral-car", "mint-dog", "lime-car", "navy-dog", "second-car", "second-dog")
STEPS, CHECKPOINT_EVERY = 100, 10

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("cluster"), (0, 1, 1)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One process owns the database, and all others go through it."""
    folder, port = tmp_path_factory.mktemp("mlflow-server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "art")]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "startup complete" not in (folder / "log").read_text():
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 9)
        server.wait(30)


@pytest.fixture
def table(s3: str, tiny_pipeline: Path, tmp_path: Path) -> Path:
    """Six subjects of two classes, their photographs and the base in the store."""
    fs, root = files.filesystem(s3)
    folders = {
        name: subject_dir(name.replace("second-car", "coral-car").replace("second-dog", "mint-dog")) for name in NAMES
    }
    for target, folder in {"base": tiny_pipeline, **folders}.items():
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            fs.put_file(str(path), f"{root}/{target}/{path.relative_to(folder).as_posix()}")
    rows = [{"name": name, "class_noun": name.rsplit("-", 1)[-1], "instance_images": f"{s3}/{name}"} for name in NAMES]
    settings = {
        "base_model": f"{s3}/base",
        "prior": {"num_class_images": 4, "num_inference_steps": 1, "batch_size": 2},
        "train": {"max_train_steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY},
        "evaluation": {"enabled": False},
        "storage": {"root": f"{s3}/results"},
        "cluster": {"lanes": 2},
    }
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump(settings | {"subjects": rows}))
    return path


def submission(table: Path, *more: str) -> tuple[str, ...]:
    aws = [name for name in os.environ if name.startswith("AWS_")]
    return ("submit", "batch", str(table), *more, *(f"--env={name}" for name in aws))


def with_store(cluster: Cluster) -> Mapping[str, str]:
    return cluster.environment | {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def test_sqlite_and_too_large_workers_are_refused(cluster: Cluster, table: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    sqlite = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    refused = cluster.dreambooth(*submission(table, "--set", sqlite), **environment)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "the cluster has 3 nodes, but MLflow would be kept in sqlite:///" in refused.stdout
    assert "start 'mlflow server'" in refused.stdout
    large = cluster.dreambooth(*submission(table, "--set", "cluster.num_workers=5"), **environment)
    assert large.returncode == 2, large.stdout + large.stderr
    assert "takes 5 CPUs and 0 GPUs, but the cluster has 2 CPUs and 0 GPUs" in large.stdout


def test_a_node_is_lost_and_no_subject(
    cluster: Cluster, mlflow_server: str, table: Path, s3: str, tmp_path: Path
) -> None:
    arguments = submission(table, "--set", f"tracking.uri={mlflow_server}")
    with subprocess.Popen(
        cluster.command(*arguments),
        cwd=tmp_path,
        env=with_store(cluster),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        deadline = time.monotonic() + 300
        while not in_the_middle(f"{s3}/results") or not running_a_lane(cluster):
            assert follower.poll() is None, follower.communicate()
            assert time.monotonic() < deadline, cluster.log()
            time.sleep(0.2)
        again = cluster.dreambooth(*arguments, "--detach", **dict(with_store(cluster)))
        assert "already running" in again.stderr
        kill_node(running_a_lane(cluster)[0])
        stdout, stderr = follower.communicate(timeout=500)
    assert follower.returncode == 0, stdout + stderr
    assert "6 done" in stdout
    # There is no room for another lane: the one that is left does it all, and waits for nobody.
    assert "has lost a node: other lanes take over its work" in stdout + stderr
    assert "in training" in stderr  # the view that it would have had here
    assert "dreambooth-view" not in stdout + stderr
    check_the_end(s3, mlflow_server, tmp_path)
    assert "already done" in cluster.dreambooth(*arguments, **dict(with_store(cluster))).stderr


def check_the_end(s3: str, mlflow_server: str, tmp_path: Path) -> None:
    summary = files.read_json(f"{s3}/results/batches/pets/summary.json")
    rows = {row["subject"]: row for row in summary["results"]}
    assert {row["state"] for row in rows.values()} == {"done"}
    assert sum(row["failures"] for row in rows.values()) == 0  # a lost node is no subject's fault
    for name in NAMES:
        manifest = publications.published(f"{s3}/results/{name}/model")
        assert manifest is not None
        publications.fetch(manifest, tmp_path / name)
        [training] = files.filesystem(s3)[0].glob(f"{s3}/results/{name}/training/*.json")
        record = files.read_json(f"s3://{training}")
        assert [step["step"] for step in record["history"]] == list(range(1, STEPS + 1))
        assert record["resumed_from"] % CHECKPOINT_EVERY == 0
    with quietly():
        client = connect(mlflow_server)
        versions = [(version.name, int(version.version)) for version in client.search_model_versions()]
    assert sorted(versions) == sorted((f"dreambooth-{name}", 1) for name in NAMES)
