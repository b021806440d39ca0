"""How often is a photograph read? Through a store that counts, in every process of a run and of a batch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import counted_files
import pytest
import yaml

from dreambooth.miniature import subject_dir

ONCE = {
    "checks": 1,  # by the driver: decoded, warned of, and hashed for the keys of the model and of its figures
    "training": 1,  # by the worker: encoded as latents
    "evaluation": 1,  # by the worker, after training: embedded for the protocol's figures and the samples for the eye
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "batch"])
def test_a_photograph_is_read_once_for_each_purpose(command: str, tmp_path: Path, tiny_pipeline: Path) -> None:
    names = ["coral-car", "mint-dog"][: 1 if command == "run" else 2]
    for name in names:
        shutil.copytree(subject_dir(name), tmp_path / "photos" / name)
        beside = {"class_noun": name.rpartition("-")[2], "identifier": {"coral-car": "tfz", "mint-dog": "qxv"}[name]}
        (tmp_path / "photos" / name / "subject.yaml").write_text(yaml.safe_dump(beside | {"train.max_train_steps": 2}))
    settings = {
        "base_model": str(tiny_pipeline),
        "evaluation.protocol": "own",
        "evaluation.prompts": "['a photo of [V] car at night']",
        "evaluation.images_per_prompt": 2,
        "evaluation.num_inference_steps": 1,
        "evaluation.bank": "miniature",
        "evaluation.image_encoder": "miniature",
        "prior.prior_loss_weight": 0,
        "storage.root": str(tmp_path / "output"),
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
    }
    folder = f"counted://{tmp_path}/photos"
    what = ["run", "--images", f"{folder}/coral-car"] if command == "run" else ["batch", folder]
    arguments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    environment = os.environ | counted_files.install(tmp_path / "counted")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *what, *arguments],
        check=False,
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reads = counted_files.reads(tmp_path / "counted")
    for name in names:
        photographs = [path for path in (tmp_path / "photos" / name).iterdir() if path.suffix in (".jpg", ".png")]
        assert len(photographs) >= 3
        for path in photographs:
            assert reads[str(path)] == ONCE, path.name
        # The settings beside the photographs are read at remote addresses, too, by both commands.
        assert reads[str(tmp_path / "photos" / name / "subject.yaml")] == {"settings": 1}
        assert f"{name}" in done.stdout
