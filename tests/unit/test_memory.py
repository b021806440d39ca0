"""What the plan says of memory, against what training takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dreambooth.base_model import BaseModel
from dreambooth.config import load_config
from dreambooth.families import family_of
from dreambooth.miniature import PIPELINE_DIR, subject_dir
from dreambooth.step_memory import step_memory
from pipelines.cluster import Resources
from pipelines.memory import peak_bytes
from pipelines.plan import Plan, make_plan

WITHIN = 0.15
AS_IT_IS: dict[str, Any] = {
    "resolution": 64,
    "images": 2,
    "train_text_encoder": True,
    "checkpointing": False,
    "autocast": False,
    "keep_gradients": False,
}
PAGES = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}
"""Every tensor gets pages of its own: what is freed is gone, and what is held shows."""
MEASURE = Path(__file__).with_name("measure_memory.py")


def measured_bytes(base: Path, **settings: Any) -> int:
    """By how much a process of its own grows in three steps, at their peak."""
    command = [sys.executable, str(MEASURE), str(base), json.dumps(settings)]
    done = subprocess.run(command, env=os.environ | PAGES, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def plan_of(*overrides: str) -> Plan:
    photographs = str(subject_dir("coral-car"))
    subject = {"name": "rex", "class_noun": "car", "identifier": "tfz", "instance_images": photographs}
    return make_plan(load_config({"subject": subject}, overrides), Resources(cpus=8, gpus=0))


def test_what_takes_more_and_less(tiny_pipeline: Path) -> None:
    def memory(**settings: Any) -> int:
        return step_memory(tiny_pipeline, **(AS_IT_IS | settings))

    plain, twice = memory(), memory(images=4)
    assert twice > 1.5 * plain
    assert memory(images=4, autocast=True) < twice
    assert memory(checkpointing=True) < plain
    assert memory(train_text_encoder=False) < plain


def test_gradients_count_where_they_are_kept() -> None:
    given_away, kept = (step_memory(PIPELINE_DIR, **AS_IT_IS | {"keep_gradients": keep}) for keep in (False, True))
    assert kept > 1.1 * given_away


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [1, 4])
def test_the_miniature(pairs: int) -> None:
    planned = peak_bytes(plan_of(f"train.micro_batch_size={pairs}"))
    assert measured_bytes(PIPELINE_DIR, pairs=pairs) == pytest.approx(planned, rel=WITHIN)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_full_size(full_size: Path) -> None:
    """As large as Stable Diffusion, at 256 pixels, measured where there is memory for it."""
    if psutil.virtual_memory().available < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    components = zip(("unet", "text_encoder"), family_of(full_size).empty_components(full_size), strict=True)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in components}
    assert sum(counts.values()) == pytest.approx(982.5e6, rel=0.001)
    small = plan_of("train.micro_batch_size=1")
    config = small.config.model_copy(update={"images": small.config.images.model_copy(update={"resolution": 256})})
    base = BaseModel(address=str(full_size), revision=None, directory=full_size)
    vars(base)["parameter_counts"] = counts  # else read from the weights
    planned = peak_bytes(replace(small, config=config, base=base))
    assert planned > 14 * 2**30
    assert measured_bytes(full_size, pairs=1, resolution=256) == pytest.approx(planned, rel=WITHIN)
