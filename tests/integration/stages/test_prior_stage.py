"""Sets of class images as lanes make them: the same by any number of workers, made once, completed and topped up."""

from pathlib import Path

from dreambooth.models.base_model import resolve_base_model
from dreambooth.sampling.class_images import PriorPlan, image_name
from pipelines.queue.class_image_sets import ClassImageSets, WantedSet
from pipelines.stages.prior_stage import prior_set, seal
from pipelines.storage.publications import read_manifest
from pipelines.tasks import PriorSet, Source
from pipelines.worker.samplers import ImageSampler


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


def make(wanted: PriorPlan, base: Path, folder: Path, workers: int) -> tuple[PriorSet, int]:
    """The set of a lane with these workers, and the number of images it made."""
    sets = ClassImageSets([WantedSet(plan=wanted, source=Source(address=str(base)), parent_uri=str(folder))])
    samplers = [ImageSampler(use_gpu=False) for _ in range(workers)]
    if sets.waits("rex", wanted.key):
        while (work := sets.hand_out("lane", workers)) is not None:
            for rank, sampler in enumerate(samplers):
                mine = slice(rank, None, workers)
                made = sampler.class_images(work.source, work.plan, work.blocks[mine], work.wanted[mine], work.uri)
                sets.written("lane", wanted.key, made)
            if not work.blocks:
                seal(work.parent_uri, work.plan)
                assert sets.sealed("lane", wanted.key) == ("rex",)
    return prior_set(str(folder), wanted), sets.made


def test_images_do_not_depend_on_the_number_of_workers_and_are_made_once(tiny_pipeline: Path, tmp_path: Path) -> None:
    wanted = plan(tiny_pipeline, 10)
    one, made = make(wanted, tiny_pipeline, tmp_path / "one", workers=1)
    three, _ = make(wanted, tiny_pipeline, tmp_path / "three", workers=3)
    assert made == 10
    assert read_manifest(one.uri).files == read_manifest(three.uri).files
    assert len({record.sha256 for record in read_manifest(one.uri).files.values()}) == 10

    _, made = make(wanted, tiny_pipeline, tmp_path / "one", workers=1)
    assert made == 0


def test_an_interrupted_set_is_completed_and_a_larger_one_topped_up(tiny_pipeline: Path, tmp_path: Path) -> None:
    whole, _ = make(plan(tiny_pipeline, 7), tiny_pipeline, tmp_path / "prior", workers=1)
    files = dict(read_manifest(whole.uri).files)
    folder = Path(whole.uri)
    (folder / "manifest.json").unlink()
    for index in (1, 5, 6):
        (folder / image_name(index)).unlink()

    again, made = make(plan(tiny_pipeline, 7), tiny_pipeline, tmp_path / "prior", workers=1)
    assert made == 3
    assert read_manifest(again.uri).files == files

    larger, made = make(plan(tiny_pipeline, 9), tiny_pipeline, tmp_path / "prior", workers=1)
    assert made == 2
    assert larger.uri == whole.uri
    assert files.items() < dict(read_manifest(larger.uri).files).items()
