"""A replica of every family's repositories, and a run on it: one photograph, one class image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from replicas import REPLICAS, built

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.batches import TrainingData
from dreambooth.data.images import find_instance_images
from dreambooth.data.prepare import prepare_data

SIDE = 64
Config = Callable[..., DreamBoothConfig]


WITH_OWN_TESTS = ("pixart-sigma",)  # in flux_and_pixart/


@pytest.fixture(scope="session", params=[name for name in REPLICAS if name not in WITH_OWN_TESTS])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository, built once. Not to be written to."""
    return built(request.param, tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A smooth square."""
    return Image.radial_gradient("L").resize((SIDE, SIDE)).convert("RGB")


@pytest.fixture
def config(base: Path, picture: Image.Image, tmp_path: Path) -> Config:
    def make(*overrides: str) -> DreamBoothConfig:
        photographs = tmp_path / "photographs"
        photographs.mkdir(exist_ok=True)
        picture.save(photographs / "00.png")
        subject = {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(photographs)}
        return load_config({"base_model": str(base), "subject": subject, "images": {"resolution": SIDE}}, overrides)

    return make


@pytest.fixture
def data(base: Path, picture: Image.Image) -> Any:
    def make(config: DreamBoothConfig) -> TrainingData:
        images = find_instance_images(config.subject.instance_images)
        return prepare_data(base, config, images, [picture.rotate(90)])

    return make
