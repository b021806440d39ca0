"""A run of every family whose worker is killed in the middle: the weights of one that nothing happened to.

Cascades are struck in test_cascade_run.py, Stable Diffusion with ZeRO in test_train_stage.py.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from replicas import built
from striking import FOUR_CPUS, after_step, struck, trained_calmly

from dreambooth.config.settings import load_config
from dreambooth.sampling.sampler import load_pipeline
from pipelines.driver.console import RunConsole
from pipelines.driver.personalize import personalize
from pipelines.driver.train_stage import find_result
from pipelines.plan.run_plan import make_plan
from pipelines.worker.publish import published_weights

pytestmark = pytest.mark.recovery
STEPS, EVERY = 100, 10


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "replica", ["stable-diffusion-xl", "stable-diffusion-3.5", "flux-dev", "pixart-sigma", "deepfloyd-if"]
)
def test_a_killed_worker_changes_nothing(replica: str, tmp_path: Path, tracking_in: Callable[[Path], str]) -> None:
    photographs = tmp_path / "rex"
    photographs.mkdir()
    for place in range(2):
        pixels = np.random.default_rng(place).integers(0, 256, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photographs / f"{place}.png")
    config = load_config(
        {
            "base_model": str(built(replica, tmp_path / "base")),
            "subject": {"name": "rex", "class_noun": "dog", "identifier": "sks", "instance_images": str(photographs)},
            "images": {"resolution": 64},
            "prior": {"num_class_images": 2, "num_inference_steps": 2},
            "train": {"max_train_steps": STEPS, "learning_rate": 1e-3, "checkpoint_every": EVERY, "ema_decay": 0.9},
            "storage": {"run": str(tmp_path / "run"), "prior": str(tmp_path / "prior"), "dtype": "float32"},
            "tracking": {"uri": tracking_in(tmp_path)},
            "evaluation": {"enabled": False},
        }
    )
    with struck(after_step(2 * EVERY)) as starts:
        summary = personalize(config, RunConsole(quiet=True)).summary
    plan = make_plan(config, FOUR_CPUS)
    result = find_result(plan)
    assert result is not None
    assert [message["start"] for message in starts] == [0, result.resumed_from]
    assert result.resumed_from in range(EVERY, STEPS, EVERY)
    [calm] = trained_calmly(plan.config, tmp_path / "calm")
    assert [step["loss"] for step in result.history] == [step["loss"] for step in calm.tuned.record["history"]]
    pipeline, expected = load_pipeline(Path(summary["model_uri"])), published_weights([calm])
    assert len(expected) > 20
    for name, weight in expected.items():
        owner, _, own = name.partition(".")
        component = getattr(pipeline, plan.base.family.denoiser.folder if owner == "denoiser" else owner)
        assert torch.equal(component.get_parameter(own), weight), name
