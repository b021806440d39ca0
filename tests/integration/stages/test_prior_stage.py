"""Class images from real Ray actors: the same whoever makes them, made once, topped up after an interruption."""

from pathlib import Path
from typing import Any

import pytest

from dreambooth.models.base_model import resolve_base_model
from dreambooth.sampling.class_images import PriorPlan, image_name
from pipelines.stages.prior_stage import make_class_images
from pipelines.storage.publications import read_manifest
from pipelines.tasks import Source
from pipelines.worker.sampler_pool import SamplerPool

pytestmark = pytest.mark.usefixtures("ray_session")


def plan(base: Path, count: int) -> PriorPlan:
    return PriorPlan(
        base_hash=resolve_base_model(str(base)).hash,
        class_prompt="a photo of a car",
        resolution=64,
        num_inference_steps=2,
        guidance_scale=4.0,
        batch_size=3,
        seed=0,
        dtype="float32",
        sampler="dpm-solver++",
        count=count,
    )


def make(wanted: PriorPlan, base: Path, folder: Path, actors: int) -> tuple[Any, list[tuple[int, int]]]:
    progress: list[tuple[int, int]] = []
    made = make_class_images(
        wanted,
        Source(address=str(base)),
        str(folder),
        SamplerPool(actors=actors, use_gpu=False),
        lambda done, total: progress.append((done, total)),
    )
    return made, progress


def test_images_do_not_depend_on_the_number_of_actors_and_are_made_once(tiny_pipeline: Path, tmp_path: Path) -> None:
    wanted = plan(tiny_pipeline, 10)
    one, progress = make(wanted, tiny_pipeline, tmp_path / "one", actors=1)
    four, _ = make(wanted, tiny_pipeline, tmp_path / "four", actors=4)
    assert progress[-1] == (10, 10)
    assert read_manifest(one.uri).files == read_manifest(four.uri).files
    assert len({record.sha256 for record in read_manifest(one.uri).files.values()}) == 10

    _, progress = make(wanted, tiny_pipeline, tmp_path / "one", actors=1)
    assert progress == []


def test_an_interrupted_set_is_completed_and_a_larger_one_topped_up(tiny_pipeline: Path, tmp_path: Path) -> None:
    whole, _ = make(plan(tiny_pipeline, 7), tiny_pipeline, tmp_path / "prior", actors=1)
    files = dict(read_manifest(whole.uri).files)
    folder = Path(whole.uri)
    (folder / "manifest.json").unlink()
    for index in (1, 5, 6):
        (folder / image_name(index)).unlink()

    again, progress = make(plan(tiny_pipeline, 7), tiny_pipeline, tmp_path / "prior", actors=1)
    assert progress[-1] == (3, 3)
    assert read_manifest(again.uri).files == files

    larger, progress = make(plan(tiny_pipeline, 9), tiny_pipeline, tmp_path / "prior", actors=1)
    assert progress[-1] == (2, 2)
    assert larger.uri == whole.uri
    assert files.items() < dict(read_manifest(larger.uri).files).items()
