"""The benchmarks' random batches and steps: of the kind that training makes, for every family."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from full_size import random_batch
from published_steps import bare_model, on_one_gpu, one_step
from replicas import built, deepfloyd
from torch import Tensor

from dreambooth.data.batches import Batch
from dreambooth.models.base_model import BaseModel
from pipelines.plan.changes import Changed
from pipelines.plan.published import published_models, published_plan
from pipelines.plan.run_plan import Plan

SIDE = 64
OF_EACH_FAMILY = [
    "stable-diffusion-1.5",
    "stable-diffusion-xl",
    "stable-diffusion-3.5-medium",
    "flux.1-schnell",
    "pixart-sigma-1024",
    "deepfloyd-if-i-m",
]


def kinds(batch: Batch) -> dict[str, Any]:
    """Shape and dtype of each tensor, by name."""
    found: dict[str, Any] = {}

    def note(name: str, part: Tensor) -> Tensor:
        found[name] = (part.shape, part.dtype)
        return part

    batch.mapped(note)
    return found


def test_a_random_batch_is_of_the_kind_that_training_makes(base: Path, config: Any, data: Any) -> None:
    settings = config()
    found = random_batch(base, settings, pairs=1, resolution=SIDE)
    assert kinds(found) == kinds(data(settings).batch(range(1)))
    assert len(found.timesteps.unique()) == 2


def plan_of(base: Path, side: int) -> Plan:
    """The plan of a published model, for a replica of it."""
    plan = published_plan(BaseModel(address=base.name, revision=None, directory=base))
    images = plan.config.images.model_copy(update={"resolution": side})
    return replace(plan, config=plan.config.model_copy(update={"images": images}))


@pytest.mark.parametrize("replica", ["flux-dev", "pixart-sigma", "second stage"])
def test_a_step_is_measured(replica: str, tmp_path: Path) -> None:
    if replica == "second stage":
        (tmp_path / "base").mkdir()
        deepfloyd.build_super_resolution(tmp_path / "base")
    else:
        built(replica, tmp_path / "base")
    changed = Changed(plan=plan_of(tmp_path / "base", SIDE), changes=(), stages=(0,))
    figures = one_step(changed, "cpu", steps=1)
    assert figures["steps_per_second"] > 0
    assert figures["planned_gib"] >= 0
    assert figures["changes"] == "none"


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_a_step_of_full_size_fits_together(name: str) -> None:
    """On the meta device: names, shapes and dtypes."""
    base = next(one for one in published_models() if one.address == name)
    plan = published_plan(base)
    model = bare_model(plan, "meta")
    assert sum(p.numel() for p in model.parameters()) == plan.trained_parameters
    batch = random_batch(base.directory, plan.config, pairs=1, resolution=base.resolution).to("meta")
    latents, noise, timesteps, text, conditions, *_ = batch
    noisy = model.process.noisy(latents, noise, timesteps)
    encoded = model.family.encode_text(model.text_encoders, text)
    found = model.family.denoise(model.denoiser, noisy, timesteps, encoded, conditions)
    assert found.shape == model.process.target(latents, noise, timesteps).shape


def test_a_plan_that_no_gpu_holds_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = published_plan(next(one for one in published_models() if one.address == "flux.1-dev"))
    monkeypatch.setattr("pipelines.plan.memory._step_bytes", lambda *_: 5 * 2**30)
    told = on_one_gpu(plan, 20 * 2**30)
    assert isinstance(told, str)
    assert told.startswith("it takes ")
    assert told.endswith(" GiB at least by its plan, and this GPU has room for 20")
    fits = on_one_gpu(plan, 120 * 2**30)
    assert isinstance(fits, Changed)
    assert "train.optimizer: adafactor" in fits.changes
