"""Replicas of both stages of DeepFloyd IF, and photographs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from replicas import deepfloyd

STAGES = {"deepfloyd-if-1": deepfloyd.build, "deepfloyd-if-2": deepfloyd.build_super_resolution}


@pytest.fixture(scope="module", params=STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, build in STAGES.items():
            (folder / name).mkdir()
            build(folder / name)
    return {name: folder / name for name in STAGES}


@pytest.fixture
def base(bases: dict[str, Path], stage: str) -> Path:
    return bases[stage]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for place in range(2):
        pixels = rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return folder
