"""What sampling takes of a GPU: a pipeline's weights, and a batch."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.config.settings import load_config
from dreambooth.miniature import CASCADE_DIR
from dreambooth.training.sampling_memory import sampling_memory
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver.train_stage import train_task
from pipelines.plan.memory import peak_bytes, sampling_peak
from pipelines.plan.published import published_models
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.plan.sampling_memory import batch_bytes, weights_bytes

A_GPU, NO_GPU = Resources(cpus=4, gpus=1, gpu_bytes=24 << 30), Resources(cpus=4, gpus=0)
Planned = Callable[..., Plan]


@pytest.fixture
def planned(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> Planned:
    """The plan of a subject on one GPU."""

    def make(*overrides: str, resources: Resources = A_GPU) -> Plan:
        settings = {
            "base_model": str(tiny_pipeline),
            "subject": {
                "name": "rex",
                "class_noun": "dog",
                "identifier": "tfz",
                "instance_images": str(instance_folder),
            },
            "storage": {"root": str(tmp_path)},
        }
        return make_plan(load_config(settings, overrides), resources)

    return make


def test_more_images_guidance_and_pixels_take_more() -> None:
    """On a model of pixels, without a VAE, which takes most at such a size."""

    def memory(images: int = 2, side: int = 16, *, guided: bool = True) -> int:
        return sampling_memory(CASCADE_DIR / "stage-1", size=(side, side), images=images, guided=guided)

    assert memory(4) > 1.5 * memory()
    assert memory() > 1.5 * memory(guided=False)
    assert memory(side=32) > 2 * memory()


def test_scores_keep_a_pipeline_beside_the_training(planned: Planned) -> None:
    scored = ("evaluation.every=10", "evaluation.bank=miniature")
    plain, kept = planned(), planned(*scored)
    least = peak_bytes(plain) + weights_bytes(plain.bases)
    assert least <= peak_bytes(kept) <= peak_bytes(plain) + sampling_peak(plain)
    assert peak_bytes(planned(*scored, resources=NO_GPU)) == peak_bytes(planned(resources=NO_GPU))


def test_a_megapixel_is_decoded_at_once_however_many_images_there_are(tiny_pipeline: Path) -> None:
    """Without its denoiser's passes, which take the rest."""
    one, eight = (sampling_memory(tiny_pipeline, size=(1024, 1024), images=n, guided=False) for n in (1, 8))
    assert eight < 6 * one


def test_a_batch_takes_little_beside_the_weights_of_published_bases() -> None:
    """So batches needn't shrink with the GPU: of which a base has room for its weights, 8 images at once fit."""
    base = next(one for one in published_models() if one.address == "stable-diffusion-1.5")
    assert batch_bytes(base, 512, images=8, guided=True) < 1.5 * weights_bytes([base])


def test_a_task_says_what_training_takes_beside_the_pipeline(planned: Planned) -> None:
    plan = planned()
    beside = train_task(plan, None).gpu_bytes
    assert beside == peak_bytes(plan) + weights_bytes(plan.bases)
    assert train_task(planned("cluster.graph_sampling=auto"), None).gpu_bytes > beside
    assert train_task(planned(resources=NO_GPU), None).gpu_bytes == 0
