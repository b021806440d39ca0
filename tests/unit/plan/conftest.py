"""A plan of a run on a machine of eight CPUs."""

from pathlib import Path

import pytest
from machine_plan import MachinePlan

from dreambooth.config.settings import load_config
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.run_plan import Plan, make_plan


@pytest.fixture
def plan(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path, mlflow_database: str) -> MachinePlan:
    def make(
        *overrides: str,
        images: Path = instance_folder,
        base: str | Path = tiny_pipeline,
        resources: Resources = Resources(cpus=8, gpus=0),  # noqa: B008 - frozen
    ) -> Plan:
        settings = {
            "base_model": str(base),
            "subject": {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": str(images)},
            "prior": {"num_class_images": 8},
            "train": {"max_train_steps": 10},
            "storage": {"root": str(tmp_path / "output")},
            "tracking": {"uri": mlflow_database},
        }
        return make_plan(load_config(settings, overrides), resources)

    return make
