"""What the plan says of memory, against what training takes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from full_size import plan_of, plan_of_weightless

from dreambooth.miniature import PIPELINE_DIR
from dreambooth.models.base_model import BaseModel
from dreambooth.training.optimizer_memory import UPDATE_BYTES
from dreambooth.training.step_memory import step_memory
from pipelines.plan import counted
from pipelines.plan.memory import peak_bytes

WITHIN = 0.15
AS_IT_IS: dict[str, Any] = {
    "size": (64, 64),
    "images": 2,
    "text_encoders": ("text_encoder",),
    "checkpointing": False,
    "autocast": False,
}
PAGES = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}
"""Every tensor gets pages of its own: what is freed is gone, and what is held shows."""
MEASURE = Path(__file__).with_name("measure_memory.py")
MEASURE_UPDATE = Path(__file__).with_name("measure_update.py")


def measured_bytes(base: Path, **settings: Any) -> int:
    """By how much a process of its own grows in three steps, at their peak."""
    command = [sys.executable, str(MEASURE), str(base), json.dumps(settings)]
    done = subprocess.run(command, env=os.environ | PAGES, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_what_takes_more_and_less(tiny_pipeline: Path) -> None:
    def memory(**settings: Any) -> int:
        return step_memory(tiny_pipeline, **(AS_IT_IS | settings)).released

    plain, twice = memory(), memory(images=4)
    assert twice > 1.5 * plain
    assert memory(images=4, autocast=True) < twice
    assert memory(autocast=True, bf16_weights=True) < memory(autocast=True)
    assert memory(checkpointing=True) < plain
    assert memory(text_encoders=()) < plain


def test_gradients_count_where_they_are_kept() -> None:
    given_away, kept = step_memory(PIPELINE_DIR, **AS_IT_IS)
    assert kept > 1.1 * given_away


def test_what_other_code_counted_is_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Path
) -> None:
    """A newer version keeps other figures under the same name, and an older one's file is still there."""
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    base = BaseModel(address=str(tiny_pipeline), revision=None, directory=tiny_pipeline)

    def count_by(code: str) -> Any:
        monkeypatch.setattr(counted, "_code", lambda: code)
        monkeypatch.setattr(counted, "_counted", {})  # as in a new process
        return counted.counted("step-memory", base, AS_IT_IS, lambda: code)

    assert [count_by("old"), count_by("new"), count_by("old")] == ["old", "new", "old"]
    assert len([*(tmp_path / "cache" / "step-memory").iterdir()]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", ["adamw", "adafactor", pytest.param("adamw8bit", marks=pytest.mark.extras("torchao"))]
)
def test_an_update_takes_what_is_planned_beside_state_and_gradient(optimizer: str) -> None:
    cases = [(optimizer, shape) for shape in ((2048, 512), (512, 256, 3, 3))]
    command = [sys.executable, str(MEASURE_UPDATE), json.dumps(cases)]
    done = subprocess.run(command, env=os.environ | PAGES, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for (_, shape), measured in zip(cases, json.loads(done.stdout), strict=True):
        planned = UPDATE_BYTES[optimizer] * math.prod(shape)
        assert 0.7 * planned <= measured <= 1.05 * planned + 2**20, shape


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
    plan = plan_of_weightless(full_size, 256, "train.micro_batch_size=1")
    assert sum(plan.base.parameter_counts.values()) == pytest.approx(982.5e6, rel=0.001)
    planned = peak_bytes(plan)
    assert planned > 14 * 2**30
    assert measured_bytes(full_size, pairs=1, resolution=256) == pytest.approx(planned, rel=WITHIN)
