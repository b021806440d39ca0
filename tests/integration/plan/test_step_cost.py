"""What a step costs is counted on shapes alone, and is what a real step does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dreambooth.models.base_model import BaseModel
from dreambooth.models.families import family_of
from dreambooth.training.step_cost import StepCost, step_cost
from pipelines.plan import counted
from pipelines.plan.estimate import about_load, clock, measure_speed

AS_IT_IS: dict[str, Any] = {"resolution": 64, "pairs": 1, "text_encoders": ("text_encoder",), "checkpointing": False}


@pytest.fixture
def cost(tiny_pipeline: Path) -> Any:
    def count(**settings: Any) -> StepCost:
        return step_cost(tiny_pipeline, **(AS_IT_IS | settings))

    return count


def test_a_real_step_does_as_much(cost: Any, tiny_pipeline: Path) -> None:
    family = family_of(tiny_pipeline)
    denoiser, text_encoder = family.load(tiny_pipeline, "unet"), family.load(tiny_pipeline, "text_encoder")
    denoiser.train()
    text_encoder.train()
    ids = family.tokenize(tiny_pipeline, ["a photo of a dog"] * 2)
    # The fused kernel of CPUs is not counted; shapes alone take the plain one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        text = family.encode_text({"text_encoder": text_encoder}, ids)
        timesteps = torch.zeros(2, dtype=torch.long)
        family.denoise(denoiser, torch.randn(2, 4, 16, 16), timesteps, text, {}).sum().backward()
    assert cost().flops == counter.get_total_flops()


def test_what_makes_a_step_dearer_or_cheaper(cost: Any) -> None:
    plain = cost()
    assert 2 < plain.flops / plain.forward_flops < 3.5
    assert cost(pairs=3).flops == 3 * plain.flops
    assert cost(resolution=128).flops > 3 * plain.flops
    assert cost(text_encoders=()).flops < plain.flops
    assert cost(checkpointing=True).flops > plain.flops


def test_what_other_code_counted_is_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Path
) -> None:
    """A newer version keeps other figures under the same name, and an older one's file is still there."""
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    base = BaseModel(address=str(tiny_pipeline), revision=None, directory=tiny_pipeline)

    def count_by(code: str) -> Any:
        monkeypatch.setattr(counted, "_code", lambda: code)
        monkeypatch.setattr(counted, "_counted", {})  # as in a new process
        return counted.counted("step-cost", base, AS_IT_IS, lambda: code)

    assert [count_by("old"), count_by("new"), count_by("old")] == ["old", "new", "old"]
    assert len([*(tmp_path / "cache" / "step-cost").iterdir()]) == 2


def test_speed_is_measured_here() -> None:
    speed = measure_speed("cpu", 1)
    assert 1e8 < speed.fp32 < 1e14
    assert 1e7 < speed.half < 1e15


@pytest.mark.parametrize("num_threads", [1, 2])
def test_others_that_are_at_work_make_an_estimate_little_longer(num_threads: int) -> None:
    """On a machine that has four times as much to do as it has cores for, against the same without."""
    spin = [sys.executable, "-c", "while True: pass"]
    alone = measure_speed("cpu", num_threads)
    others = [subprocess.Popen(spin) for _ in range(4 * (os.cpu_count() or 1))]
    try:
        busy = [measure_speed("cpu", num_threads) for _ in range(2)]
    finally:
        for other in others:
            other.kill()
            other.wait()
    for speed in busy:
        assert speed.fp32 > alone.fp32 / 3
        assert speed.half > alone.half / 3


def test_a_busy_machine_is_told_with_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0, 3.0, 1.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert about_load(measure_speed("cpu", 1)) == (
        "; measured while the machine was busy (load 7 on 2 cores): longer as long as it is"
    )
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 3.0, 1.0))
    assert about_load(measure_speed("cpu", 1)) == ""


@pytest.mark.parametrize(("seconds", "shown"), [(7.4, "7 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")])
def test_times_are_shown_as_a_person_would(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
