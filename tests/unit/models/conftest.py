"""A base model's folder to change."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def base(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
