"""A batch whose every byte is in an object store, and the store is busy, or goes away in the middle."""

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.miniature import subject_dir
from pipelines.apps.garbage import find_leftovers
from pipelines.storage import files, publications
from tests.integration.conftest import forget_open_stores
from tests.integration.faulty_store import faulty_store

NAMES = ("coral-car", "lime-car", "navy-dog")
SECONDS_AWAY = 20


def upload(folder: Path, address: str) -> None:
    fs, root = files.filesystem(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.put_file(str(path), f"{root}/{path.relative_to(folder).as_posix()}")


def wait_for(found: Callable[[], Any], driver: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240
    while not found():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.3)


@pytest.fixture
def command(s3: str, make_config: Any) -> list[str]:
    """`dreambooth batch` of three subjects; base, photographs, table and results are in the store."""
    config: DreamBoothConfig = make_config()
    upload(Path(config.base_model), f"{s3}/base")
    for name in NAMES:
        upload(subject_dir(name), f"{s3}/photos/{name}")
    settings = {
        "base_model": f"{s3}/base",
        "prior": config.prior.model_dump(),
        "train": config.train.model_dump() | {"max_train_steps": 60, "checkpoint_every": 10},
        "evaluation": {"enabled": False},
        "storage": {"root": f"{s3}/results"},
        "cluster": {"lanes": 1},
    }
    rows = [
        {"name": name, "class_noun": name.rsplit("-", 1)[-1], "instance_images": f"photos/{name}"} for name in NAMES
    ]
    files.write_bytes(f"{s3}/pets.yaml", yaml.safe_dump(settings | {"subjects": rows}).encode())
    return [sys.executable, "-m", "pipelines.cli", "batch", f"{s3}/pets.yaml"]


def check_all_is_there(s3: str, tmp_path: Path) -> None:
    summary = files.read_json(f"{s3}/results/batches/pets/summary.json")
    assert summary["subjects"]["done"] == len(NAMES)
    assert {row["failures"] for row in summary["results"]} == {0}
    for name in NAMES:
        manifest = publications.published(f"{s3}/results/{name}/model")
        assert manifest is not None
        publications.fetch(manifest, tmp_path / name)  # compares sizes and sha256
        assert files.read_json(f"{s3}/results/{name}/summary.json")["version"] == 1
    assert files.exists(f"{s3}/results/batches/pets/report.html")
    assert not find_leftovers(f"{s3}/results", older_than=datetime.timedelta(0))
    assert not list(tmp_path.glob("output"))


@pytest.mark.slow
def test_a_batch_outlives_its_store(s3: str, object_store: Any, command: list[str], tmp_path: Path) -> None:
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        first = f"{s3}/results/{NAMES[0]}/model"
        wait_for(lambda: publications.published(first), driver)
        object_store.stop()
        time.sleep(SECONDS_AWAY)
        object_store.start()
        stdout, stderr = driver.communicate(timeout=400)
    assert driver.returncode == 0, stderr
    assert "3 done" in stdout
    check_all_is_there(s3, tmp_path)


@pytest.mark.slow
def test_a_batch_gets_through_to_a_busy_store(s3: str, object_store: Any, command: list[str], tmp_path: Path) -> None:
    with faulty_store(object_store.environment["AWS_ENDPOINT_URL_S3"], every=5) as (address, store):
        here = {"AWS_ENDPOINT_URL": address, "AWS_ENDPOINT_URL_S3": address}
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | here, capture_output=True, text=True, check=False, timeout=500
        )
    assert done.returncode == 0, done.stderr
    assert store.refused > 50
    check_all_is_there(s3, tmp_path)


def test_publications_get_through_to_a_busy_store(
    s3: str, object_store: Any, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_store(object_store.environment["AWS_ENDPOINT_URL_S3"], every=5) as (address, store):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        forget_open_stores()
        published = publications.publish(tiny_pipeline, f"{s3}/model", metadata={})
        assert publications.published(f"{s3}/model") == published
        publications.fetch(published, tmp_path / "copy")
        for number in range(8):
            files.write_json(f"{s3}/record.json", {"number": number})
            assert files.read_json(f"{s3}/record.json") == {"number": number}
        assert not find_leftovers(s3, older_than=datetime.timedelta(0))
    assert store.refused >= 8
