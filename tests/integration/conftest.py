"""One Ray for the whole session: starting it takes longer than most of what is tested on it."""

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dreambooth.config.settings import ClusterConfig, DreamBoothConfig, load_config


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with four CPUs, whatever the machine has, so that four actors can be compared with one."""
    import ray

    from pipelines.cluster.ray_cluster import ray_cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.cluster.ray_cluster.local_resources", _four_cpus)
        with ray_cluster(ClusterConfig()):
            yield
    assert not ray.is_initialized()


def _four_cpus() -> Any:
    from pipelines.cluster.ray_cluster import Resources

    return Resources(cpus=4, gpus=0)


@pytest.fixture(scope="module")
def class_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the class images of a file's first test lie for its others, too."""
    return tmp_path_factory.mktemp("prior")


@pytest.fixture
def make_config(tiny_pipeline: Path, tmp_path: Path) -> Any:
    """Configurations of a subject of the miniature on a tiny random base; keywords are dotted with `__`."""

    def make(**settings: Any) -> DreamBoothConfig:
        from dreambooth.miniature import subject_dir

        plain = {
            "base_model": str(tiny_pipeline),
            "subject": {
                "name": "coral-car",
                "class_noun": "car",
                "identifier": "tfz",
                "instance_images": str(subject_dir("coral-car")),
            },
            "prior": {"num_class_images": 8, "num_inference_steps": 2, "batch_size": 4},
            "train": {"max_train_steps": 6, "learning_rate": 1e-3, "checkpoint_every": 100},
            "storage": {"root": str(tmp_path / "output")},
            "evaluation": {"images_per_prompt": 1, "num_inference_steps": 2},
        }
        overrides = tuple(f"{name.replace('__', '.')}={value}" for name, value in settings.items())
        return load_config(plain, overrides)

    return make


class ObjectStore:
    """OpenStack Swift with its S3 in front, in a folder of its own; what a test breaks on purpose, it starts again."""

    bucket = "s3://dreambooth"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        """Start it, on the port it had before; returns when objects can be written."""
        done = self._swift("start")
        if done.returncode == 3:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        exports = (line.removeprefix("export ").partition("=") for line in done.stdout.splitlines())
        self.environment = {name: value for name, _, value in exports}

    def stop(self) -> None:
        """Stop it, as if the machine had gone; its data stay."""
        done = self._swift("stop")
        assert done.returncode == 0, done.stderr

    def _swift(self, command: str) -> "subprocess.CompletedProcess[str]":
        launcher = Path(__file__).parents[2] / "infra" / "s3" / "swift.py"
        arguments = [sys.executable, str(launcher), command, "--folder", str(self.folder)]
        return subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 store for the whole session. Its first start installs it, into .venv-s3."""
    store = ObjectStore(tmp_path_factory.mktemp("object-store"))
    store.start()
    yield store
    store.stop()


@pytest.fixture
def s3(object_store: ObjectStore, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address of its own in the store, with the variables that lead there."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    forget_open_stores()
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())
    yield f"{object_store.bucket}/{name}-{secrets.token_hex(4)}"
    forget_open_stores()


def forget_open_stores() -> None:
    """Close what is open: a file system keeps the address and the credentials that it was opened with."""
    from s3fs import S3FileSystem

    from pipelines.storage import patient_s3

    S3FileSystem.clear_instance_cache()
    patient_s3.PatientS3.clear_instance_cache()  # fsspec keeps a cache for each class
    patient_s3._away.clear()
