"""DeepFloyd IF's stages I and II with one text encoder, as their repositories have it."""

import shutil
from pathlib import Path

from replicas import deepfloyd


def build(folder: Path) -> tuple[Path, Path]:
    """The folders of both stages, in a new one."""
    small, large = folder / "small", folder / "large"
    for stage, write in ((small, deepfloyd.build), (large, deepfloyd.build_super_resolution)):
        stage.mkdir(parents=True)
        write(stage)
    shutil.rmtree(large / "text_encoder")
    shutil.copytree(small / "text_encoder", large / "text_encoder")
    return small, large
