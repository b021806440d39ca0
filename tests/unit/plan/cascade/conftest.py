"""Plans of a cascade of two small stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from replicas import cascade

from dreambooth.config.settings import load_config
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.run_plan import Plan, make_plan

RESOURCES = Resources(cpus=2, gpus=0)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cascade.build(tmp_path_factory.mktemp("cascade"))


@pytest.fixture
def settings(bases: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for place in range(2):
        Image.effect_noise((100, 100), 80).convert("RGB").save(photographs / f"{place}.png")
    return {
        "base_model": str(bases[0]),
        "super_resolution": {"base_model": str(bases[1]), "max_train_steps": 5},
        "subject": {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(photographs)},
        "train": {"max_train_steps": 3},
        "storage": {"root": str(tmp_path / "output")},
    }


@pytest.fixture
def planned(settings: dict[str, Any]) -> Callable[..., Plan]:
    return lambda *overrides, **given: make_plan(load_config(settings, overrides), RESOURCES, **given)
