"""A sampler holds one pipeline at a time."""

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from dreambooth.sampling.sampler import load_pipeline
from pipelines.tasks import Source
from pipelines.worker.held_pipeline import HeldPipeline


def test_a_pipeline_is_freed_before_the_next_is_loaded(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(tiny_pipeline, tmp_path / "other"))
    held = HeldPipeline("cpu")
    denoiser = weakref.ref(held.get(Source(address=str(tiny_pipeline)), "float32").unet)
    alive: list[bool] = []

    def load(*arguments: Any, **named: Any) -> Any:
        alive.append(denoiser() is not None)
        return load_pipeline(*arguments, **named)

    monkeypatch.setattr("dreambooth.sampling.sampler.load_pipeline", load)
    gc.disable()  # so that it doesn't happen by chance
    try:
        held.get(Source(address=str(other)), "float32")
    finally:
        gc.enable()
    assert alive == [False]
