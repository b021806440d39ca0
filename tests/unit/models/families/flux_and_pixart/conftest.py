"""Tiny random replicas of FLUX.1 and PixArt-Sigma."""

from pathlib import Path

import pytest
from replicas import built

NAMES = ["flux-dev", "flux-schnell", "pixart-sigma"]


@pytest.fixture(scope="session", params=NAMES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(request.param, tmp_path_factory.mktemp("replica") / request.param)


@pytest.fixture(scope="session")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("flux-dev", tmp_path_factory.mktemp("replica") / "flux-dev")
