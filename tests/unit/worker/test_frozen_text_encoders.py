"""A lane loads the text encoders that it doesn't train once, whatever number of subjects it goes through."""

from pathlib import Path
from typing import Any

import pytest
import torch
from replicas import built

from dreambooth.config.settings import load_config
from dreambooth.models.families import Family
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.train_stage import train_task
from pipelines.plan.run_plan import make_plan
from pipelines.tasks import TrainTask
from pipelines.worker.bases import Bases
from pipelines.worker.train_data import ClassLatents, train_data

IDENTIFIERS = {"rex": "sks", "mug": "dgo", "bag": "otp"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: built(name, folder / name) for name in ("stable-diffusion-3.5", "deepfloyd-if")}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of the text encoders that were loaded, in order."""
    folders: list[str] = []
    load = Family.load

    def counted(self: Family, directory: Path, folder: str, dtype: Any = None) -> Any:
        if folder.startswith("text_encoder"):
            folders.append(f"{directory.name}/{folder}")
        return load(self, directory, folder, dtype)

    monkeypatch.setattr(Family, "load", counted)
    return folders


def task_of(base: Path, name: str, photographs: Path, *overrides: str) -> TrainTask:
    subject = {"name": name, "class_noun": "dog", "identifier": IDENTIFIERS[name], "instance_images": str(photographs)}
    settings = {"base_model": str(base), "subject": subject, "images": {"resolution": 64}}
    config = load_config(settings, ("prior.prior_loss_weight=0", *overrides))
    return train_task(make_plan(config, Resources(cpus=2, gpus=0)), None)


def test_frozen_ones_are_loaded_once_a_base(
    bases: dict[str, Path], instance_folder: Path, loaded: list[str], tmp_path: Path
) -> None:
    lane, class_latents = Bases(), ClassLatents()

    def texts(task: TrainTask, of: Bases) -> dict[str, Any]:
        base = of.get(task)
        data = train_data(base, task, class_latents, of.text_encoders, device="cpu")
        return data.instance.text

    three, pixels = bases["stable-diffusion-3.5"], bases["deepfloyd-if"]
    subjects = [task_of(three, name, instance_folder) for name in ("rex", "mug", "bag")]
    found = [texts(task, lane) for task in subjects]
    trained = [f"{three.name}/text_encoder", f"{three.name}/text_encoder_2"]
    assert sorted(loaded) == [*trained, f"{three.name}/text_encoder_3"]
    states = [text["text_encoder_3.states"] for text in found]
    assert len({one.numpy().tobytes() for one in states}) == 3  # each identifier reads otherwise
    loaded.clear()
    alone = texts(subjects[1], Bases())
    assert all(torch.equal(alone[name], found[1][name]) for name in alone)
    loaded.clear()
    for name in ("rex", "mug"):
        texts(task_of(pixels, name, instance_folder), lane)
    assert loaded == [f"{pixels.name}/text_encoder"]
    loaded.clear()
    texts(task_of(three, "rex", instance_folder, "train.text_encoders=none"), lane)
    assert sorted(loaded) == [*trained, f"{three.name}/text_encoder_3"]
