"""A results folder that fails in mid-run: a sentence, nothing half-written, what is published stays, and it goes on."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.miniature import subject_dir
from pipelines.storage.publications import opened, published, read_json
from pipelines.tracking.client import connect, quietly

pytestmark = pytest.mark.recovery
SIZE = 40 << 20
STEPS, EVERY = 160, 20
"""So many that what happens at the first checkpoint is long before the last step."""


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


def test_a_run_ends_with_a_sentence_and_goes_on_with_room(
    make_config: Any, tracking_in: Callable[[Path], str], tmp_path: Path, disk: Path
) -> None:
    config = make_config(
        cluster__num_workers=2,
        zero__stage=2,
        prior__prior_loss_weight=0,
        train__max_train_steps=STEPS,
        train__checkpoint_every=EVERY,
        evaluation__enabled="false",
        storage__run=disk / "run",
        tracking__uri=tracking_in(tmp_path),
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
    assert summary["steps"] == STEPS


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("fate", ["read-only", "removed"])
def test_a_batch_whose_folder_fails_ends_with_a_sentence_and_goes_on(
    fate: str, make_config: Any, tracking_in: Callable[[Path], str], tmp_path: Path, disk: Path
) -> None:
    root = disk / "out"
    table = tmp_path / "pets.yaml"
    table.write_text(yaml.safe_dump(two_subjects(make_config(), root)))
    command = [sys.executable, "-m", "pipelines.cli", "batch", str(table), "--set", "cluster.lanes=1"]
    command += ["--set", f"tracking.uri={tracking_in(tmp_path)}"]

    def of(name: str, what: str) -> list[Path]:
        return list(root.glob(f"{name}/{what}/*/**/manifest.json"))

    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        deadline = time.monotonic() + 400
        while not (root / "coral-car" / "summary.json").is_file() or not of("navy-dog", "checkpoints"):
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if fate == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        else:
            root.rename(disk / "elsewhere")
        said, _ = driver.communicate(timeout=300)
    print(said)
    assert "Traceback" not in said
    if fate == "read-only":
        assert driver.returncode == 1
        [sentence] = [line for line in said.splitlines() if line.startswith("failed: ")]
        assert "can't write" in sentence
        assert str(root) in sentence
        assert "it is on a read-only file system" in sentence
        assert is_whole(root / "coral-car")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    else:
        assert driver.returncode in (0, 1, 3)
        shutil.rmtree(root, ignore_errors=True)
        (disk / "elsewhere").rename(root)

    again = subprocess.run(command, cwd=tmp_path, check=False, timeout=400, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2: 2 done" in again.stdout
    assert is_whole(root / "coral-car")
    assert is_whole(root / "navy-dog")


THROW = """
import sys
from pipelines.driver import driving
from pipelines.cli import main
look = driving.Driver._look
def throw(self):
    snapshot = look(self)
    if snapshot.counts["done"] and snapshot.running:
        raise ZeroDivisionError("nobody foresaw it")
    return snapshot
driving.Driver._look = throw
main(sys.argv[1:])
"""


@pytest.mark.timeout(1500)
def test_the_unforeseen_in_the_next_subject_leaves_the_published_one_whole(
    make_config: Any, tracking_in: Callable[[Path], str], tmp_path: Path
) -> None:
    tracking_in(tmp_path)
    root = tmp_path / "out"
    table = tmp_path / "pets.yaml"
    table.write_text(yaml.safe_dump(two_subjects(make_config(), root)))
    arguments = ["batch", str(table), "--set", "cluster.lanes=1"]
    throwing = [sys.executable, "-c", THROW, *arguments]
    thrown = subprocess.run(throwing, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
    assert thrown.returncode == 1, thrown.stdout + thrown.stderr
    [details] = tmp_path.glob("dreambooth-error-*.log")
    [said] = [line for line in thrown.stderr.splitlines() if line.startswith("failed: ")]
    assert said == f"failed: ZeroDivisionError: nobody foresaw it; details: {details}"
    assert "Traceback" not in thrown.stderr
    assert "Traceback" in details.read_text()
    assert is_whole(root / "coral-car")
    before = published(f"{root}/coral-car/model")

    again = [sys.executable, "-m", "pipelines.cli", *arguments]
    subprocess.run(again, cwd=tmp_path, check=True, timeout=400)
    assert is_whole(root / "navy-dog")
    assert published(f"{root}/coral-car/model") == before
    with quietly():
        client = connect(f"sqlite:///{tmp_path}/mlflow.db")
        assert {(one.name, int(one.version)) for one in client.search_model_versions()} == {
            ("dreambooth-coral-car", 1),
            ("dreambooth-navy-dog", 1),
        }


def two_subjects(config: DreamBoothConfig, root: Path) -> dict[str, Any]:
    """The table of a batch of two, whose checkpoints come often."""
    names = ("coral-car", "navy-dog")
    return {
        "base_model": config.base_model,
        "prior": {"prior_loss_weight": 0},
        "train": {"max_train_steps": STEPS, "checkpoint_every": EVERY, "learning_rate": 1e-3},
        "evaluation": {"enabled": False},
        "storage": {"root": str(root)},
        "subjects": [
            {"name": name, "class_noun": name.rsplit("-", 1)[-1], "instance_images": str(subject_dir(name))}
            for name in names
        ],
    }


def is_whole(run: Path) -> bool:
    """Whether a model is published, and every file of it has the size and sha256 of its manifest."""
    model = published(f"{run}/model")
    assert model is not None
    with opened(model, compare=True) as folder:
        return (folder / "model_index.json").is_file()
