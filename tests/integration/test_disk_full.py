"""A disk that fills up in the middle of a run: a sentence, no second attempt, nothing half-written, and it goes on."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.storage.publications import read_json

pytestmark = pytest.mark.recovery
SIZE = 40 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave half a megabyte of a disk."""
    filler, usage = disk / "filler", os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(usage.f_bavail * usage.f_frsize - (1 << 19)))
    return filler


def test_a_run_ends_with_a_sentence_and_goes_on_with_room(make_config: Any, tmp_path: Path, disk: Path) -> None:
    config = make_config(
        cluster__num_workers=2,
        zero__stage=2,
        prior__prior_loss_weight=0,
        train__max_train_steps=400,
        train__checkpoint_every=20,
        evaluation__enabled="false",
        storage__run=disk / "run",
        tracking__uri=f"sqlite:///{tmp_path}/mlflow.db",
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    command = [sys.executable, "-m", "pipelines.cli", "run", str(path)]

    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as driver:
        deadline = time.monotonic() + 300
        while not list(disk.glob("run/checkpoints/*/step-*/manifest.json")):
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        filler = fill(disk)
        _, said = driver.communicate(timeout=200)
    assert driver.returncode == 1
    assert "can't write the checkpoint of step" in said
    assert "no space is left there" in said
    assert "Traceback" not in said
    left = list(disk.glob("run/checkpoints/*/step-*"))
    assert left
    assert all((folder / "manifest.json").is_file() for folder in left)
    assert said.count("training: 1/") <= 1  # it was not begun a second time

    filler.unlink()
    subprocess.run([*command, "--quiet"], cwd=tmp_path, check=True, timeout=400)
    summary = read_json(f"{disk}/run/summary.json")
    assert summary["resumed_from"] > 0
    assert summary["steps"] == 400
