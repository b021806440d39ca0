"""The main job and a batch on one GPU, as a user runs them: with Ray, from images to a registered model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth.miniature import subject_dir

DREAMBOOTH = [sys.executable, "-m", "pipelines.cli"]


def dreambooth(*arguments: str) -> str:
    done = subprocess.run(
        [*DREAMBOOTH, *arguments], check=False, capture_output=True, text=True, timeout=400, env=dict(os.environ)
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    settings = [f"storage.prior={folder}/prior", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    options = [option for setting in settings for option in ("--set", setting)]
    dreambooth("run", "--images", str(subject_dir("coral-car")), "--output", str(folder / "run"), *options)
    summary: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return folder, summary


def test_the_subject_is_learned(run: tuple[Path, dict[str, Any]]) -> None:
    _, summary = run
    print(json.dumps({name: summary[name] for name in ("similarity", "wall_seconds", "steps_per_second")}))
    similarity = summary["similarity"]
    gain = similarity["identifier"] - similarity["class_before"]
    assert gain >= 0.4
    assert similarity["class_after"] - similarity["class_before"] < gain / 4
    assert summary["peak_memory_bytes"][0] > 2**20


def test_pictures_come_out_of_the_registry(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = run
    model = f"models:/{summary['registered_model']}/{summary['version']}"
    uri = f"sqlite:///{folder}/mlflow.db"
    arguments = [
        "a photo of a [V] car on the beach",
        "--num",
        "2",
        "--seed",
        "1",
        "--output",
        str(tmp_path / "pictures"),
    ]
    dreambooth("generate", "--model", model, *arguments, "--tracking-uri", uri)
    pictures = sorted((tmp_path / "pictures").rglob("*.png"))
    assert len(pictures) >= 3
    with Image.open(pictures[0]) as picture:
        assert len(set(picture.convert("RGB").get_flattened_data())) > 100


def test_a_batch_of_two_classes(tmp_path: Path) -> None:
    """Class images and lanes take turns on the one GPU that there is."""
    subjects = [
        {"name": name, "class_noun": name.rsplit("-", 1)[-1], "instance_images": str(subject_dir(name))}
        for name in ("coral-car", "navy-dog", "lime-car")
    ]
    settings = {
        "prior": {"num_class_images": 16},
        "train": {"max_train_steps": 40},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "storage": {"root": str(tmp_path / "output")},
    }
    (tmp_path / "subjects.yaml").write_text(json.dumps(settings | {"subjects": subjects}))  # which is YAML, too
    dreambooth("batch", str(tmp_path / "subjects.yaml"))
    [summary] = [json.loads(path.read_text()) for path in (tmp_path / "output").glob("batches/*/summary.json")]
    print(json.dumps({name: summary.get(name) for name in ("lane_busy_share", "wall_seconds", "subjects")})[:2000])
    assert summary["failures"] == {}
